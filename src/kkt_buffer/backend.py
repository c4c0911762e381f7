"""
`Backend`: the interface to one kind of database. The rest of this package is the same for all kinds.

`create_buffer_engine` attaches a backend to the engine; operations use it as `Transaction.backend`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

from sqlalchemy import Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError

from kkt_buffer.bell import Bell  # noqa: TC001 (the annotation of an attribute may be evaluated)
from kkt_buffer.errors import ReceiptBufferError

OPTION = "kkt_buffer_backend"

# Execution option: with True, transactions take no write lock, and the database refuses writes in them.
READ_ONLY = "kkt_buffer_read_only"

AT_MOST = 100  # reported problems of one kind

Parameters = dict[str, Any] | Sequence[dict[str, Any]]


class Reference(NamedTuple):
    """A foreign key that refers to receipts: its table, its column, and the column of receipts."""

    table: str
    column: str
    target: str


class Backend(ABC):
    """
    The differences between engines.

    `str(backend)` names the buffer in messages. `driver` is the DBAPI module. `insert` stores one receipt with its
    timestamp, from the parameters id, pos_id, fiscal_doc, digest, held_at and now. `last_synced_at` is a
    query for the time of the last delivery (Unix seconds, or null), including receipts that were pruned since.
    `json_array` is the SQL function that makes a JSON array of its arguments. `bells` are rung after each commit of a
    write transaction in this process.
    """

    driver: ModuleType
    insert: str
    last_synced_at: str
    json_array: str

    def __init__(self) -> None:
        self.bells: set[Bell] = set()

    @abstractmethod
    def connect(self, engine: Engine, *, write: bool) -> Connection:
        """A connection for one transaction of this package, to write or only to read."""

    @abstractmethod
    def run(self, connection: Connection, sql: str, parameters: Parameters) -> CursorResult[Any]:
        """
        Run a constant statement with `:name` parameters, for one set of them or for several.

        Three times cheaper than `text()`, whose parameters SQLAlchemy processes on each call. `echo` and engine events
        still see the statement.
        """

    @abstractmethod
    def end(self) -> None:
        """Roll back a transaction that this thread left open because an exception interrupted SQLAlchemy."""

    @abstractmethod
    def refuse_second(self) -> None:
        """Raise `BufferBusyError` if this thread has a write transaction open: a second one would deadlock."""

    @abstractmethod
    def explain(self, error: DBAPIError) -> ReceiptBufferError | None:
        """The domain error for a refused statement; None if a trigger or table of the service itself refused it."""

    @abstractmethod
    def lenient_text(self, connection: Connection) -> AbstractContextManager[None]:
        """Read invalid UTF-8 too, decoded with backslash escapes."""

    @abstractmethod
    def references(self, connection: Connection) -> list[Reference]:
        """Every foreign key of the database that refers to receipts, those of other programs included."""

    @abstractmethod
    def checks(self) -> Mapping[str, Callable[[Connection], list[str]]]:
        """The checks of this backend for `check_integrity`: for each subject, a function that lists problems."""

    @abstractmethod
    def backup(self, engine: Engine, path: str | os.PathLike[str]) -> None:
        """Copy a consistent snapshot of the buffer to the file `path`."""

    @abstractmethod
    def upgraded(self, engine: Engine) -> None:
        """Called after each upgrade of the schema."""


def backend_of(engine: Engine) -> Backend:
    """The backend of an engine from `create_buffer_engine`, or of one derived from it."""
    backend = engine.get_execution_options().get(OPTION)
    if not isinstance(backend, Backend):
        raise TypeError(f"engine: expected one that create_buffer_engine made, got {engine!r}")
    return backend
