"""
`Backend`: the interface to one kind of database. The rest of this package is the same for all kinds.

`create_buffer_engine` attaches a backend to the engine; operations use it as `Transaction.backend`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

from sqlalchemy import URL, Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError

from kkt_buffer.arguments import NewReceipt
from kkt_buffer.bell import Bell  # noqa: TC001 (the annotation of an attribute may be evaluated)
from kkt_buffer.errors import BufferStorageError, ReceiptBufferError

OPTION = "kkt_buffer_backend"

# Execution option: with True, transactions take no write lock, and the database refuses writes in them.
READ_ONLY = "kkt_buffer_read_only"

# What the query of a URL may tell about where the buffer is.
PLACE = frozenset({"host", "hostaddr", "port", "dbname", "service", "options"})

AT_MOST = 100  # reported problems of one kind

Parameters = dict[str, Any] | Sequence[dict[str, Any]]

# Kind and name of an object of the schema, and its definition.
Objects = Mapping[tuple[str, str], str]


class Reference(NamedTuple):
    """A foreign key that refers to receipts: its table, its column, and the column of receipts, quoted for SQL."""

    table: str
    column: str
    target: str


class Fault(NamedTuple):
    """What an error code of the database means: the error of this package, the problem, and what to do."""

    error: type[BufferStorageError]
    problem: str
    advice: str

    def as_error(self, buffer: object, cause: object) -> BufferStorageError:
        """The error for a buffer; `cause` is what the database said."""
        problem = f"{self.problem} ({cause})"
        error = self.error(f"{buffer}: {problem}. {self.advice}")
        error.problem = problem
        return error


class RefusedError(Exception):
    """
    Receipts were not stored, because an id is known or there is no room. The transaction can go on.

    `error`: of the statement that was refused; None if it was not even tried: then the caller looks again for the
    reason.
    """

    def __init__(self, error: DBAPIError | None = None) -> None:
        super().__init__()
        self.error = error


class Backend(ABC):
    """
    The differences between engines.

    `str(backend)` names the buffer in messages. `driver` is the DBAPI module. `json_array` is the SQL term for the text
    of a JSON array of the values `{}`; `unix_time` is the SQL term for the present time. `bells` are rung after each
    commit of a write transaction in this process. `is_server`: its clock rules, and an operation of one statement needs
    no transaction around it.
    """

    driver: ModuleType
    json_array: str
    unix_time: str
    is_server: bool

    def __init__(self) -> None:
        self.bells: set[Bell] = set()

    @abstractmethod
    def connect(self, engine: Engine, *, write: bool, one_statement: bool = False) -> Connection:
        """
        A connection for one transaction of this package, to write or only to read.

        With `one_statement`, each statement is a transaction by itself (only if `is_server`).
        """

    @abstractmethod
    def now(self, connection: Connection) -> float:
        """The time that rules in this transaction, in Unix seconds."""

    @abstractmethod
    def insert(self, connection: Connection, many: Sequence[NewReceipt], now: int | None) -> None:
        """
        Store receipts, each with its timestamp, or none of them: `RefusedError`.

        `now` is the time; None for that of the server, after the write lock was granted.
        """

    @abstractmethod
    def run(self, connection: Connection, sql: str, parameters: Parameters) -> CursorResult[Any]:
        """
        Run a constant statement with `:name` parameters, for one set of them or for several.

        Three times cheaper than `text()`, whose parameters SQLAlchemy processes on each call. `echo` and engine events
        still see the statement.
        """

    @abstractmethod
    def explain(self, error: DBAPIError) -> ReceiptBufferError | None:
        """The domain error for a refused statement; None if a trigger or table of the service itself refused it."""

    @abstractmethod
    def references(self, connection: Connection) -> list[Reference]:
        """Every foreign key of the database that refers to receipts, those of other programs included."""

    @abstractmethod
    def checks(self) -> Mapping[str, Callable[[Connection], list[str]]]:
        """The checks of this backend for `check_integrity`: for each subject, a function that lists problems."""

    @abstractmethod
    def objects(self, connection: Connection, made_by: Callable[[str], list[str]]) -> tuple[Objects, Objects]:
        """
        The objects of the schema: those that this release expects, and those of the database.

        `made_by`: the statements by which the migrations make a schema with this name on a server.
        """

    @abstractmethod
    def migrating(self, engine: Engine) -> AbstractContextManager[Connection]:
        """A connection for migrations, which then begin a transaction that keeps out other migrations."""

    # What only some engines need. These do nothing.

    def lock(self, connection: Connection) -> None:
        """Keep out every transaction that inserts receipts or takes this lock, until the end of the transaction."""

    def confirm(self, connection: Connection) -> None:
        """Make the commit wait until everything that this transaction has read is durable; outside of one, wait now."""

    def patience(self, connection: Connection) -> AbstractContextManager[None]:
        """For statements that read whole tables: wait for their answers, however long they take."""
        del connection
        return nullcontext()

    def end(self) -> None:
        """Roll back a transaction that this thread left open because an exception interrupted SQLAlchemy."""

    def refuse_second(self) -> None:
        """Raise `BufferBusyError` if this thread has a write transaction open: a second one would deadlock."""

    def lenient_text(self, connection: Connection) -> AbstractContextManager[None]:
        """Read invalid UTF-8 too, decoded with backslash escapes."""
        del connection
        return nullcontext()

    def why_refused(self, connection: Connection) -> str | None:
        """Why every insert would be refused, in words; None if it would not."""
        del connection
        return None

    def pruned(self, connection: Connection) -> None:
        """Called after receipts were deleted, in the same transaction."""

    def refuse_backup(self) -> None:
        """Raise `BufferStorageError` if `backup` cannot copy this buffer."""

    def backup(self, engine: Engine, path: str | os.PathLike[str]) -> None:
        """Copy a consistent snapshot of the buffer to the file `path`. Not called where `refuse_backup` raises."""

    def violations(self, connection: Connection) -> set[tuple[object, ...]]:
        """The rows that violate a foreign key, if a migration can leave such rows."""
        del connection
        return set()

    def upgraded(self, engine: Engine) -> None:
        """Called after each upgrade of the schema."""


def with_query(url: URL, keys: frozenset[str]) -> URL:
    """The URL with these parts of its query; others may be secrets."""
    return url.set(query={key: value for key, value in url.query.items() if key in keys})


def place_of(url: URL) -> str:
    """Where the buffer is: the URL without its user."""
    return with_query(url, PLACE)._replace(username=None, password=None).render_as_string()


def backend_of(engine: Engine) -> Backend:
    """The backend of an engine from `create_buffer_engine`, or of one derived from it."""
    backend = engine.get_execution_options().get(OPTION)
    if not isinstance(backend, Backend):
        raise TypeError(f"engine: expected one that create_buffer_engine made, got {engine!r}")
    return backend
