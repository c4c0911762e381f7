"""
`Database`: the SQLite backend, which the connections of one engine share: the file, its settings and the write gate.

Write transactions begin with BEGIN IMMEDIATE, after the write gate; read transactions with a plain BEGIN.
"""

import contextlib
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from urllib.parse import quote

from sqlalchemy import (
    Connection,
    CursorResult,
    Engine,
    ExceptionContext,
    Pool,
    event,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError

from kkt_buffer.arguments import NewReceipt
from kkt_buffer.backend import READ_ONLY, Backend, Objects, Parameters, Reference, RefusedError
from kkt_buffer.errors import BufferDamagedError, BufferStorageError, ReceiptBufferError
from kkt_buffer.sqlite import file, fork
from kkt_buffer.sqlite.connection import Files, GuardedConnection, Identity, Sizes
from kkt_buffer.sqlite.ddl import REFERENCES, quoted
from kkt_buffer.sqlite.errors import statement_error, storage_error, storage_errors
from kkt_buffer.sqlite.gate import WriteGate
from kkt_buffer.sqlite.pragmas import COMMON, DURABLE, MEMORY, QUERY_ONLY, WAL, Pragma, cache
from kkt_buffer.sqlite.schema import objects

# Scalar subqueries: if the row of buffer_state is missing, they are NULL and NOT NULL refuses the receipt.
# INSERT … SELECT … FROM buffer_state would store nothing and report success.
INSERT = """\
INSERT INTO receipts (
    id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest, held_at)
VALUES (
    :id, :pos_id, :now,
    (SELECT MAX(hlc_local_time, :now) FROM buffer_state),
    (SELECT CASE WHEN :now > hlc_local_time THEN 0 ELSE hlc_logical_counter + 1 END FROM buffer_state),
    :fiscal_doc, :digest, :held_at)"""


def driver_connection(connection: Connection) -> GuardedConnection:
    """The driver connection of an SQLAlchemy connection."""
    return cast("GuardedConnection", connection.connection.dbapi_connection)


class Database(Backend):
    """The state that the connections of one engine share: the file, its settings and the write gate."""

    json_array = "json_array({})"
    unix_time = "unixepoch()"
    is_server = False

    def __init__(
        self, driver: ModuleType, path: Path | None, *, read_only: bool, busy_timeout: float, cache_size: int
    ) -> None:
        super().__init__()
        self.driver = driver
        self.path = path
        self.read_only = read_only
        self.gate = WriteGate(None if path is None else Path(f"{path}-gate"), busy_timeout)
        self.connections: weakref.WeakSet[GuardedConnection] = weakref.WeakSet()
        self.identity: Identity | None = None
        self.inherited = False
        self._readers: Pool | None = None
        self._readers_lock = threading.Lock()
        self.pragmas: tuple[Pragma, ...] = (*COMMON, cache(cache_size))
        self._busy_timeout = busy_timeout
        self._sizes = Sizes()
        self._class = type("Connection", (GuardedConnection, driver.Connection), {})
        self._anchor: sqlite3.Connection | None = None
        if path is None:
            # The memdb VFS has real locks between connections; the database lives as long as one is open.
            self._target = f"file:/kkt-buffer-{uuid.uuid4()}?vfs=memdb"
            self._anchor = self._connect()
            return
        # mode=rw: SQLite must not create the file; a file that was just deleted must not become a new, empty one.
        self._target = f"file:{quote(str(path))}?mode={'ro' if read_only else 'rw'}"
        if fork.is_inherited(file.identity(path)):
            raise self.forked()
        with storage_errors(self, driver):
            if path.is_dir():
                raise BufferStorageError(f"{path} is a folder; give the path of a file in it. Nothing was opened.")
            if path.exists() and not path.is_file():
                raise BufferStorageError(f"{path} is a device or a pipe, not a file. Nothing was opened.")
            if not read_only:
                file.create(path, self.gate)
            file.refuse_second_name(path)
        self.identity = file.identity(path)

    def __str__(self) -> str:
        return "the in-memory buffer" if self.path is None else str(self.path)

    # Called by SQLAlchemy.

    def watch(self, engine: Engine) -> None:
        """Listen to the events of the engine."""
        event.listen(engine, "connect", self._configure)
        event.listen(engine, "begin", self._begin)
        event.listen(engine, "savepoint", self._savepoint)
        event.listen(engine, "handle_error", self._handle_error)
        event.listen(engine, "engine_disposed", self._disposed)
        fork.watch(engine, self)

    def open(self) -> GuardedConnection:
        """Open one connection. For `create_engine(creator=…)`."""
        with fork.lock:
            if self.inherited or fork.is_inherited(self.identity):
                raise self.forked()
            with storage_errors(self, self.driver):
                connection = cast("GuardedConnection", self._connect(factory=self._class))
            connection.database = self
            connection.pid = os.getpid()
            self.connections.add(connection)
        return connection

    def _configure(self, connection: GuardedConnection, _record: object) -> None:
        """Apply the PRAGMAs and read them back. For the pool's `connect` event."""
        with storage_errors(self, self.driver):
            if (files := self._files(has_wal=False)) is not None:
                files.before(connection, write=False)  # first: SQLite would make a new database of an emptied file
            for pragma in (*self._journal(connection), *self.pragmas):
                self._set(connection, pragma)
            # The first read opens the WAL; from now on the WAL must not be replaced.
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            connection.files = self._files(has_wal=True)

    def _files(self, *, has_wal: bool) -> Files | None:
        if self.path is None or self.identity is None:
            return None
        return Files(str(self.path), self.identity, self._sizes, self.driver, has_wal=has_wal)

    def _journal(self, connection: GuardedConnection) -> tuple[Pragma, ...]:
        if self.path is None:
            return (MEMORY,)
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if self.read_only:
            if mode != WAL.reads:
                raise BufferStorageError(
                    f"{self} is not a buffer: its journal mode is {mode!r}. Nothing was changed. Check the path; "
                    "`kkt-buffer upgrade PATH` would make it a buffer."
                )
            return (QUERY_ONLY,)
        if mode != WAL.reads:
            # The change needs an exclusive lock, and SQLite does not wait for that.
            with self.gate.held():
                self._set(connection, WAL)
        return (WAL, *DURABLE)

    def _set(self, connection: GuardedConnection, pragma: Pragma) -> None:
        connection.execute(f"PRAGMA {pragma.name} = {pragma.value}").fetchone()
        found = connection.execute(f"PRAGMA {pragma.name}").fetchone()[0]
        if found != pragma.reads:
            raise BufferStorageError(
                f"{self}: PRAGMA {pragma.name} is {found!r} where {pragma.reads!r} is needed ({pragma.reason}). The "
                "buffer was not used. Put it on a local disk: a network or read-only mount cannot keep a receipt safe."
            )

    def _begin(self, connection: Connection) -> None:
        driver = driver_connection(connection)
        driver.begin(write=not (driver.is_reader or connection.get_execution_options().get(READ_ONLY, False)))

    def _savepoint(self, connection: Connection, _name: str) -> None:
        driver_connection(connection).refuse_child()

    def _handle_error(self, context: ExceptionContext) -> BaseException | None:
        connection = context.connection
        if connection is not None and not connection.closed and not connection.invalidated:
            driver = driver_connection(connection)
            if driver.was_rolled_back:
                # SQLite would commit each later statement by itself: invalidate the connection.
                driver.finish()
                answer = cast("Any", context)  # SQLAlchemy 2.0 declares these attributes as fixed
                answer.is_disconnect = True
                answer.invalidate_pool_on_disconnect = False
        return storage_error(self, context.original_exception)

    def _disposed(self, _engine: Engine) -> None:
        self._close_readers()
        self.gate.close()
        if self._anchor is not None:
            self._anchor.close()

    # Called at a fork.

    def close_idle(self, engine: Engine) -> None:
        """Close the idle connections. (`engine.dispose()` would also drop the pool of those in use.)"""
        engine.pool.dispose()
        self._close_readers()

    def start_afresh(self, engine: Engine) -> None:
        """Replace the pools in a forked child: another thread of the parent may have been using them."""
        engine.pool = engine.pool.recreate()
        self._readers = None

    def forked(self) -> BufferStorageError:
        """The error for a forked child that uses the buffer which its parent had in use."""
        return BufferStorageError(
            f"{self} was in use in the parent process at the moment of the fork, and SQLite cannot go on in the child. "
            "Nothing was written here; the parent is not affected. Open the buffer after the fork, or call "
            "close_buffer_db() (or engine.dispose()) before it."
        )

    # Called by operations.

    def connect(self, engine: Engine, *, write: bool, one_statement: bool = False) -> Connection:
        """
        A connection for a transaction: to write from the engine's pool, to read from a second pool.

        A change of `query_only` makes SQLite prepare all statements of a connection again.
        """
        del one_statement
        if write:
            connection = engine.connect()
            driver_connection(connection).is_operation = True
            return connection
        with self._readers_lock:
            if self._readers is None:
                self._readers = engine.pool.recreate()  # created late, so that it has all listeners of the engine
            readers = self._readers
        connection = Connection(engine, readers.connect())
        driver_connection(connection).is_reader = True
        return connection

    def _close_readers(self) -> None:
        readers, self._readers = self._readers, None
        if readers is not None:
            readers.dispose()

    def now(self, connection: Connection) -> float:
        """The wall clock of this machine."""
        del connection
        return time.time()

    def insert(self, connection: Connection, many: Sequence[NewReceipt], now: int | None) -> None:
        """Insert with one statement per receipt."""
        rows = [
            {
                "id": receipt.id,
                "pos_id": receipt.pos_id,
                "fiscal_doc": receipt.fiscal_doc,
                "digest": receipt.digest,
                "held_at": now if receipt.hold else None,
                "now": now,
            }
            for receipt in many
        ]
        try:
            stored = self.run(connection, INSERT, rows if len(rows) > 1 else rows[0]).rowcount
        except IntegrityError as error:
            raise RefusedError(error) from error
        if stored != len(rows):
            raise BufferDamagedError.found(self, f"{stored} of {len(rows)} receipts were stored")

    def run(self, connection: Connection, sql: str, parameters: Parameters) -> CursorResult[Any]:
        """Run the text unchanged: SQLite supports `:name` parameters."""
        return connection.exec_driver_sql(sql, parameters)

    def end(self) -> None:
        """Roll back a connection of this thread that still holds the gate after its operation has ended."""
        holder = self.gate.holder_here
        if isinstance(holder, GuardedConnection) and (holder.is_operation or not holder.in_transaction):
            holder.rollback()

    def refuse_second(self) -> None:
        """Raise if this thread holds the gate in a transaction that the caller opened on the engine."""
        self.end()
        self.gate.refuse_second()

    def explain(self, error: DBAPIError) -> ReceiptBufferError | None:
        """The domain error for a statement that SQLite refused."""
        return statement_error(self, error)

    def lenient_text(self, connection: Connection) -> contextlib.AbstractContextManager[None]:
        """Read invalid UTF-8 too, decoded with backslash escapes."""
        return file.lenient_text(driver_connection(connection))

    def references(self, connection: Connection) -> list[Reference]:
        """The foreign keys that refer to receipts, from SQLite's schema table."""
        return [Reference(*map(quoted, row)) for row in connection.execute(text(REFERENCES))]

    def checks(self) -> Mapping[str, Callable[[Connection], list[str]]]:
        """The checks of pages, references, texts, counts and the order of timestamps."""
        return file.CHECKS

    def pruned(self, connection: Connection) -> None:
        """Adjust `adopted_rows`."""
        connection.execute(file.ADOPTED)

    def backup(self, engine: Engine, path: str | os.PathLike[str]) -> None:
        """Copy a consistent snapshot of the file."""
        file.backup(self, engine, path)

    def objects(self, connection: Connection, made_by: Callable[[str], list[str]]) -> tuple[Objects, Objects]:
        """The objects of the schema, as the SQL text that SQLite keeps."""
        del made_by
        return objects(connection)

    @contextlib.contextmanager
    def migrating(self, engine: Engine) -> Iterator[Connection]:
        """
        Foreign keys are off: rebuilding a table would delete the rows that refer to it; the setting cannot be changed
        inside a transaction. legacy_alter_table: a rename must not change the references of other tables, and must not
        fail because a view of another program reads the table.
        """
        with engine.connect().execution_options(**{READ_ONLY: False}) as connection:
            connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
            connection.connection.cursor().execute("PRAGMA legacy_alter_table = ON")
            try:
                yield connection
            finally:
                connection.invalidate()  # closes it: with these settings it must not be used again

    def violations(self, connection: Connection) -> set[tuple[object, ...]]:
        """The rows that violate a foreign key, which a migration can do."""
        return {tuple(row) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")}

    def upgraded(self, engine: Engine) -> None:
        """Checkpoint, so that the schema is in the database file even if somebody copies it without its WAL."""
        with self.gate.held(), engine.connect() as connection, storage_errors(self, self.driver):
            driver_connection(connection).execute("PRAGMA wal_checkpoint").fetchone()

    def _connect(self, **options: Any) -> sqlite3.Connection:  # noqa: ANN401 (the driver's own options)
        if hasattr(self.driver, "LEGACY_TRANSACTION_CONTROL"):
            # autocommit=False opens transactions by itself, which makes BEGIN IMMEDIATE impossible.
            options["autocommit"] = self.driver.LEGACY_TRANSACTION_CONTROL
        connection: sqlite3.Connection = self.driver.connect(
            self._target, uri=True, isolation_level=None, check_same_thread=False, timeout=self._busy_timeout, **options
        )
        return connection
