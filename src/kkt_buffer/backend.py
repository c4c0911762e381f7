"""
`Backend`: what an engine must answer. Everything else in this package is the same on each of them.

`create_buffer_engine` gives the engine its backend; operations meet it as `Transaction.backend`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

from sqlalchemy import Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError

from kkt_buffer.errors import ReceiptBufferError

OPTION = "kkt_buffer_backend"

# Execution option: with True, transactions lock nobody, and the database refuses to write in them.
READ_ONLY = "kkt_buffer_read_only"

# Execution option: marks the transactions that this package opens.
OPERATION = "kkt_buffer_operation"


Parameters = dict[str, Any] | Sequence[dict[str, Any]]


class Reference(NamedTuple):
    """A foreign key that points at receipts: its table, its column, and the column of receipts."""

    table: str
    column: str
    target: str


class Backend(ABC):
    """
    The differences between engines.

    `str(backend)` names the buffer in messages. `driver` is the DBAPI module. `insert` stores one receipt with its
    timestamp, from the parameters id, pos_id, fiscal_doc, digest, held_at and now. `last_synced_at` is a
    query for when a receipt was delivered last (Unix seconds, or null), whatever was pruned since. `json_array` is the
    function that makes a JSON array of its arguments.
    """

    driver: ModuleType
    insert: str
    last_synced_at: str
    json_array: str

    @abstractmethod
    def connect(self, engine: Engine) -> Connection:
        """A connection for a transaction of ours; `engine` says with `READ_ONLY` for what kind of one."""

    @abstractmethod
    def run(self, connection: Connection, sql: str, parameters: Parameters) -> CursorResult[Any]:
        """
        Run a constant statement with `:name` parameters, for one set of them or for several.

        Three times cheaper than a `text()`, whose parameters SQLAlchemy looks through each time; `echo` and events of
        the engine see it all the same.
        """

    @abstractmethod
    def end(self) -> None:
        """End what an operation of this thread has left open because an exception kept SQLAlchemy from ending it."""

    @abstractmethod
    def refuse_second(self) -> None:
        """Raise `BufferBusyError` if this thread is writing: a second write transaction would wait for it for ever."""

    @abstractmethod
    def explain(self, error: DBAPIError) -> ReceiptBufferError | None:
        """What a refusal of a statement of ours means; None for what a service's own trigger or table raised."""

    @abstractmethod
    def lenient_text(self, connection: Connection) -> AbstractContextManager[None]:
        """Read invalid UTF-8 too, decoded with backslash escapes."""

    @abstractmethod
    def references(self, connection: Connection) -> list[Reference]:
        """Every foreign key of the database that points at receipts, whoever added it."""

    @abstractmethod
    def checks(self) -> Mapping[str, Callable[[Connection], list[str]]]:
        """What `check_integrity` asks of this engine alone: for each subject, a function that lists problems."""

    @abstractmethod
    def backup(self, engine: Engine, path: str | os.PathLike[str]) -> None:
        """Copy the buffer as it is at this moment to the file `path`."""

    @abstractmethod
    def upgraded(self, engine: Engine) -> None:
        """Called after each upgrade of the schema."""


def backend_of(engine: Engine) -> Backend:
    """The backend of an engine that `create_buffer_engine` made, or of one derived from it."""
    backend = engine.get_execution_options().get(OPTION)
    if not isinstance(backend, Backend):
        raise TypeError(f"engine: expected one that create_buffer_engine made, got {engine!r}")
    return backend
