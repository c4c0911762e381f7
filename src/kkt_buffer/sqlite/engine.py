"""
`create_buffer_engine`: an SQLAlchemy engine whose every connection is durable, or is refused.

PRAGMAs are applied and read back on connect. BEGIN is ours: IMMEDIATE for writes, behind the write gate, DEFERRED for
reads. A `GuardedConnection` sees to it that nothing is acknowledged that is not on disk.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sqlite3
import sys
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, ExceptionContext, QueuePool, create_engine, event, make_url
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util.queue import Empty, Full, QueueCommon

from kkt_buffer.errors import (
    BufferBusyError,
    BufferDamagedError,
    BufferStorageError,
)

if TYPE_CHECKING:
    from kkt_buffer.sqlite.gate import WriteGate

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_SECONDS = 10.0
SQLITE_MINIMUM = (3, 38, 0)  # unixepoch() in our triggers

WAL_LIMIT = 1 << 20  # bytes

# Execution option: with True, BEGIN DEFERRED, which locks nobody and must not write.
READ_ONLY = "kkt_buffer_read_only"


class Pragma(NamedTuple):
    """A setting, what it reads as once it holds, and why we want it."""

    name: str
    value: str | int
    reads: str | int
    reason: str


WAL = Pragma("journal_mode", "WAL", "wal", "readers and the writer do not block each other; one sync per commit")
MEMORY = Pragma("journal_mode", "MEMORY", "memory", "the only mode that a database in memory has")
DURABLE = (
    Pragma("synchronous", "FULL", 2, "a commit is on disk before it is acknowledged"),
    Pragma("fullfsync", 1, 1, "on macOS a plain fsync stops at the drive's cache"),
    Pragma("checkpoint_fullfsync", 1, 1, "the same, for checkpoints"),
    Pragma("wal_autocheckpoint", 100, 100, "a short WAL, so that a restart is quick"),
    Pragma("journal_size_limit", WAL_LIMIT, WAL_LIMIT, "a WAL that grew under a long reader shrinks again (bytes)"),
)
COMMON = (
    Pragma("foreign_keys", 1, 1, "a dead letter belongs to a receipt"),
    Pragma("recursive_triggers", 1, 1, "REPLACE counts as the deletion that it is"),
    Pragma("cell_size_check", 1, 1, "a damaged page is noticed when it is read"),
    Pragma("cache_size", -4000, -4000, "4 MB at most for each connection; more is not faster"),
)
QUERY_ONLY = Pragma("query_only", 1, 1, "a monitor must not write")


class _Fault(NamedTuple):
    error: type[BufferStorageError]
    happened: str
    advice: str


_SAFE = "Nothing of this was acknowledged; what was acknowledged before is safe."
_LEFT = "The file was left as it is."


# By primary result code, https://www.sqlite.org/rescode.html
_FAULTS = {
    3: _Fault(BufferStorageError, "access to the file was denied", f"{_SAFE} Check its owner and permissions."),
    5: _Fault(BufferBusyError, "another program has kept it locked", f"{_SAFE} Try again; close it."),
    6: _Fault(BufferBusyError, "another connection has kept it locked", f"{_SAFE} Try again."),
    8: _Fault(BufferStorageError, "it is read-only here", f"{_SAFE} Check folder, file and mount."),
    10: _Fault(
        BufferStorageError, "the disk reported an error", f"{_SAFE} Check the disk and its free room; try again."
    ),
    11: _Fault(
        BufferDamagedError, "SQLite found it damaged", f"{_LEFT} Stop, keep a copy of all its files, restore a backup."
    ),
    13: _Fault(BufferStorageError, "the disk is full", f"{_SAFE} Make room and try again; no restart is needed."),
    14: _Fault(BufferStorageError, "the file cannot be opened", f"{_SAFE} Folder and file must exist and be ours."),
    26: _Fault(BufferDamagedError, "the file is not an SQLite database", f"{_LEFT} Check the path."),
}


def create_buffer_engine(
    path_or_url: str | os.PathLike[str] | URL,
    *,
    read_only: bool = False,
    busy_timeout: float = BUSY_TIMEOUT_SECONDS,
    **engine_options: Any,  # noqa: ANN401 (passed on to create_engine)
) -> Engine:
    """
    Open an engine on a buffer: a path, an SQLite URL, or `":memory:"`.

    A missing file is created, owner-only, with its folders; the schema is not (see `kkt_buffer.upgrade`). An engine
    in memory is shared by all threads of this process and is gone with `dispose()`. With `read_only`, the file must
    exist, and every write is refused. `busy_timeout` is how many seconds a writer waits for its turn. Other options
    go to `sqlalchemy.create_engine`.

    The engine may be used after a fork, unless a connection was in use at that moment: then every use of it in the
    child raises `BufferStorageError`.

    Raises `BufferStorageError` if the path cannot be used or SQLite is too old, `BufferDamagedError` if the file is
    no SQLite database, `ValueError` for a URL of another kind.
    """
    if sys.platform == "win32":
        raise BufferStorageError("kkt-buffer runs on Linux and macOS; Windows has no flock. Nothing was opened.")
    driver = _driver(writing=not read_only)
    path = _path(path_or_url)
    if path is None and read_only:
        raise ValueError("read_only: an in-memory buffer that nobody can write would stay empty")
    database = _Database(driver, path, read_only=read_only, busy_timeout=busy_timeout)
    url = URL.create("sqlite+pysqlite", database=":memory:" if path is None else str(path))
    if "poolclass" not in engine_options:
        # As many connections as there are threads at work; a few stay open between their uses.
        engine_options = {"pool_size": 8, "max_overflow": -1, "pool_use_lifo": True} | engine_options
        engine_options["poolclass"] = _UnlockedPool if engine_options["max_overflow"] == -1 else QueuePool
    engine = create_engine(url, **engine_options, creator=database.connect, module=driver)
    event.listen(engine, "connect", database.configure)
    event.listen(engine, "begin", database.begin)
    event.listen(engine, "savepoint", database.join)
    event.listen(engine, "handle_error", database.explain)
    event.listen(engine, "engine_disposed", database.disposed)
    _databases[engine] = database
    try:
        with engine.connect():
            pass
    except BaseException:
        engine.dispose()
        raise
    return engine


class _Idle(QueueCommon[ConnectionPoolEntry]):
    """
    The idle connections of a pool that nobody ever waits for, the last used first.

    SQLAlchemy's own queue has a lock that an exception out of a signal handler can leave locked, and then every other
    thread waits for ever. The steps of a deque cannot be interrupted.
    """

    def __init__(self, maxsize: int = 0, use_lifo: bool = True) -> None:  # noqa: FBT001, FBT002 (SQLAlchemy's signature)
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self._connections: deque[ConnectionPoolEntry] = deque()

    def qsize(self) -> int:
        return len(self._connections)

    def put(self, item: ConnectionPoolEntry, block: bool = True, timeout: float | None = None) -> None:  # noqa: ARG002, FBT001, FBT002
        if len(self._connections) >= self.maxsize:
            raise Full
        self._connections.append(item)

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:  # noqa: ARG002, FBT001, FBT002
        try:
            return self._connections.pop()
        except IndexError:
            raise Empty from None


class _UnlockedPool(QueuePool):
    __module__ = QueuePool.__module__  # so that it logs as SQLAlchemy's pools do
    _queue_class = _Idle


def gate_of(engine: Engine) -> "WriteGate":
    """The write gate of an engine that `create_buffer_engine` has made, or of one derived from it."""
    return _database_of(engine).gate


def _database_of(engine: Engine) -> "_Database":
    for known, database in _databases.items():
        if known.dialect is engine.dialect:
            return database
    raise TypeError(f"engine: expected one that create_buffer_engine has made, got {engine!r}")


def _path(path_or_url: str | os.PathLike[str] | URL) -> Path | None:
    """The file that is meant, without symbolic links (SQLite puts the WAL beside the real one); None is memory."""
    if isinstance(path_or_url, str) and "://" in path_or_url:
        path_or_url = make_url(path_or_url)
    if isinstance(path_or_url, URL):
        url = path_or_url
        if url.get_backend_name() != "sqlite" or url.get_driver_name() != "pysqlite" or url.query:
            raise ValueError(
                f"path_or_url: expected a path or a URL like sqlite:////var/lib/shop/buffer.db, got {url!r}"
            )
        path_or_url = url.database or ":memory:"
    name = os.fspath(path_or_url)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"path_or_url: expected the path of a file, got {name!r}")
    return None if name == ":memory:" else Path(os.path.realpath(name))


def _driver(*, writing: bool) -> ModuleType:
    """
    The driver of the `sqlite` extra where it is installed, else the standard one.

    One for the whole process: two SQLite libraries in one process would cancel each other's locks.
    """
    driver = importlib.import_module("pysqlite3" if importlib.util.find_spec("pysqlite3") else "sqlite3")
    version = driver.sqlite_version_info
    if version < SQLITE_MINIMUM:
        raise BufferStorageError(
            f"SQLite {driver.sqlite_version} is too old, {'.'.join(map(str, SQLITE_MINIMUM))} is needed. "
            "Nothing was opened. Install kkt-buffer[sqlite], which brings its own."
        )
    if writing and _has_wal_reset_bug(version):
        _warn_once(f"SQLite {driver.sqlite_version} {WAL_RESET_BUG}")
    return driver


WAL_RESET_BUG = (
    "has the WAL-reset bug (fixed in 3.51.3, 3.50.7 and 3.44.6): let no other program write to the buffer or "
    "checkpoint it. The extra `sqlite` of kkt-buffer brings a fixed SQLite."
)


def known_bugs(engine: Engine) -> str:
    """The version of the SQLite in use, and what is wrong with it."""
    driver = driver_of(engine)
    affected = _has_wal_reset_bug(driver.sqlite_version_info)
    return f"{driver.sqlite_version} {WAL_RESET_BUG if affected else 'no known bug that concerns a buffer'}"


def pragmas(engine: Engine) -> dict[str, str | int]:
    """The settings of a connection that writes, read back."""
    with engine.execution_options(**{READ_ONLY: True}).connect() as connection:
        return {
            pragma.name: connection.exec_driver_sql(f"PRAGMA {pragma.name}").scalar_one()
            for pragma in (WAL, *DURABLE, *COMMON)
        }


def _has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return not fixed


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


class GuardedConnection(sqlite3.Connection if TYPE_CHECKING else object):  # type: ignore[misc]
    """
    A driver connection that is true to what it acknowledges. Mixed into the driver's own class.

    A write transaction holds the write gate from BEGIN to its end. COMMIT is refused when SQLite has rolled back by
    itself, when the files were replaced, and in a forked child.
    """

    database: "_Database"
    files: tuple[tuple[str, tuple[int, int]], ...] = ()
    pid = 0
    in_write = False
    in_begun = False
    lost = False  # SQLite has rolled the transaction back by itself, and the program believes to be inside it

    def begin(self, *, write: bool) -> None:
        """Begin a transaction; a write takes the gate first, unless this database is read-only."""
        self.refuse_child()
        database = self.database
        self.in_write = write = write and not database.read_only
        try:
            if write:
                database.gate.acquire(self)
            self._refuse_changed_files()
            self.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            self.in_begun = True
        except BaseException as error:
            self._finish()
            if isinstance(error, (OSError, database.driver.Error)):
                raise _refusal(database, error) from error
            raise

    def commit(self) -> None:
        """Commit what `begin` began, or raise if it is not there any more."""
        self.refuse_child()
        self.notice_loss()
        self.refuse_lost()
        super().commit()
        if self.in_write:
            self.database.sizes = self._sizes("The last transaction may be lost.")
        self._finish()

    def notice_loss(self) -> None:
        """If SQLite has rolled back by itself, begin a transaction in its place, so that nothing commits on its own."""
        if self.in_begun and not self.in_transaction and self.pid == os.getpid():
            self.lost = True
            self.execute("BEGIN")

    def refuse_lost(self) -> None:
        """Raise if SQLite has rolled back by itself."""
        if self.lost:
            raise self.lost_error()

    def lost_error(self) -> BufferStorageError:
        """What is said of a transaction that SQLite has rolled back by itself."""
        return BufferStorageError(
            f"{self.database}: SQLite had to roll the transaction back (see the error before this one). "
            "Nothing of it was stored; what was acknowledged before is safe. Try again."
        )

    def rollback(self) -> None:
        """Roll back, and let the next writer in."""
        if self.pid == os.getpid():
            try:
                super().rollback()
            finally:
                self._finish()

    def close(self) -> None:
        """
        Close. The last connection of a file checkpoints it, so this too happens behind the gate.

        It does not wait there: whoever has the gate has the file open, so we are not the last.
        """
        if self.pid != os.getpid():
            return  # closing would write to the shared memory of the parent's WAL
        if self.database.read_only:
            super().close()
        else:
            with self.database.gate.held_if_free():
                super().close()
            self._finish()
        self.database.connections.discard(self)

    def _finish(self) -> None:
        if self.in_write:
            self.database.gate.release(self)
        self.in_begun = self.in_write = self.lost = False

    def refuse_child(self) -> None:
        """Raise if this is not the process that opened the connection."""
        if self.pid != os.getpid():
            raise self.database.forked()

    def _refuse_changed_files(self) -> None:
        known = self.database.sizes  # before we look: what another thread commits meanwhile makes them larger
        found = self._sizes("Nothing was written.")
        if any(size < before for size, before in zip(found, known, strict=False)):
            self.database.refuse_cut_files(found)

    def _sizes(self, consequence: str) -> tuple[int, ...]:
        """How large the files are that we have open; raises if they are not those that others would open now."""
        sizes = []
        for name, identity in self.files:
            status = _stat(name)
            if status is None or (status.st_dev, status.st_ino) != identity:
                raise BufferStorageError(
                    f"{name} was deleted or replaced while it was in use. {consequence} Stop every program that uses "
                    "the buffer, put the right files in place, and start again."
                )
            sizes.append(status.st_size)
        return tuple(sizes)


def _stat(name: str) -> os.stat_result | None:
    try:
        return os.stat(name)  # noqa: PTH116 (four times in every transaction)
    except OSError:
        return None


def _identity(name: str) -> tuple[int, int] | None:
    status = _stat(name)
    return None if status is None else (status.st_dev, status.st_ino)


class _Database:
    """What the connections of one engine share: the file that they all must have open, and the gate before it."""

    def __init__(self, driver: ModuleType, path: Path | None, *, read_only: bool, busy_timeout: float) -> None:
        from kkt_buffer.sqlite.gate import WriteGate  # noqa: PLC0415 (needs fcntl, which Windows has not)

        self.path = path
        self.read_only = read_only
        self.busy_timeout = busy_timeout
        self.connections: weakref.WeakSet[GuardedConnection] = weakref.WeakSet()
        self.sizes: tuple[int, ...] = ()  # of the database and its WAL after the last commit here
        self.inherited = False
        self.driver = driver
        self._class = type("Connection", (GuardedConnection, driver.Connection), {})
        self.gate: WriteGate = WriteGate(None if path is None else Path(f"{path}-gate"), busy_timeout)
        self._anchor: sqlite3.Connection | None = None
        if path is None:
            # The memdb VFS has real locks between connections; the database lives as long as one is open.
            self._target = f"file:/kkt-buffer-{uuid.uuid4()}?vfs=memdb"
            self._anchor = self._open()
            self.identity = None
            return
        # mode=rw: SQLite itself must never create the file, least of all one that was there a moment ago.
        self._target = f"file:{quote(str(path))}?mode={'ro' if read_only else 'rw'}"
        if _identity(str(path)) in _inherited_files:
            raise self.forked()
        with self.explained():
            if path.is_dir():
                raise BufferStorageError(f"{path} is a folder; give the path of a file in it. Nothing was opened.")
            if path.exists() and not path.is_file():
                raise BufferStorageError(f"{path} is a device or a pipe, not a file. Nothing was opened.")
            if read_only:
                path.stat()
            else:
                self._create(path)
        self.identity = _identity(str(path))

    def __str__(self) -> str:
        return "the in-memory buffer" if self.path is None else str(self.path)

    def connect(self) -> GuardedConnection:
        """Open one connection. For `create_engine(creator=…)`."""
        with _fork_lock:
            if self.inherited or self.identity in _inherited_files:
                raise self.forked()
            with self.explained():
                connection = cast("GuardedConnection", self._open(factory=self._class))
            connection.database = self
            connection.pid = os.getpid()
            self.connections.add(connection)
        return connection

    def configure(self, connection: GuardedConnection, _record: object) -> None:
        """Apply the PRAGMAs and read them back. For the pool's `connect` event."""
        with self.explained():
            for pragma in self._journal(connection):
                self._set(connection, pragma)
            # The first read opens the WAL; from now on it must stay the file that it is.
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if self.path is not None:
            names = (str(self.path), f"{self.path}-wal")
            connection.files = tuple((name, identity) for name in names if (identity := _identity(name)))
            if not connection.files or connection.files[0][1] != self.identity:
                raise BufferStorageError(
                    f"{self.path} was deleted or replaced since this engine was made. Nothing was written. Stop every "
                    "program that uses the buffer, put the right files in place, and start again."
                )

    def _journal(self, connection: GuardedConnection) -> tuple[Pragma, ...]:
        if self.path is None:
            return (MEMORY, *COMMON)
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if self.read_only:
            if mode != WAL.reads:
                raise BufferStorageError(
                    f"{self} is no buffer: its journal mode is {mode!r}. Nothing was touched. Check the path; "
                    "`python -m kkt_buffer upgrade PATH` would make a buffer of it."
                )
            return (QUERY_ONLY, *COMMON)
        if mode != WAL.reads:
            # The change needs the file for itself, and SQLite does not wait for that.
            with self.gate.held():
                self._set(connection, WAL)
        return (WAL, *DURABLE, *COMMON)

    def _set(self, connection: GuardedConnection, pragma: Pragma) -> None:
        connection.execute(f"PRAGMA {pragma.name} = {pragma.value}").fetchone()
        found = connection.execute(f"PRAGMA {pragma.name}").fetchone()[0]
        if found != pragma.reads:
            raise BufferStorageError(
                f"{self}: PRAGMA {pragma.name} is {found!r} where {pragma.reads!r} is needed ({pragma.reason}). The "
                "buffer was not used. Put it on a local disk: a network or read-only mount cannot keep a receipt safe."
            )

    def refuse_cut_files(self, sizes: tuple[int, ...]) -> None:
        """
        Raise if a file that is smaller than it was has lost something.

        SQLite itself makes a long WAL shorter, to `journal_size_limit`; that is nothing to stop for. Another program's
        checkpoint or VACUUM may do more. Whether all is there can only be said by reading it, on a connection that has
        nothing in its cache yet.
        """
        if sizes[0] >= self.sizes[0] and sizes[1:] == (WAL_LIMIT,):
            self.sizes = sizes
            return
        try:
            with contextlib.closing(self._open()) as fresh:
                found = fresh.execute("PRAGMA quick_check(1)").fetchone()[0]
        except self.driver.Error as error:
            found = str(error)
        if found != "ok":
            raise BufferDamagedError(
                f"{self} or its WAL was cut short while it was in use ({found}). Nothing was written. Stop every "
                "program that uses the buffer, keep a copy of all its files, and restore a backup."
            )
        self.sizes = sizes

    def begin(self, connection: Connection) -> None:
        """Begin in the way that the transaction needs. For the engine's `begin` event."""
        write = not connection.get_execution_options().get(READ_ONLY, False)
        cast("GuardedConnection", connection.connection.dbapi_connection).begin(write=write)

    def join(self, connection: Connection, _name: str) -> None:
        """Refuse to go on with the parent's transaction in a forked child. For the engine's `savepoint` event."""
        driver_connection = cast("GuardedConnection", connection.connection.dbapi_connection)
        driver_connection.refuse_child()
        driver_connection.refuse_lost()

    def explain(self, context: ExceptionContext) -> BaseException | None:
        """Turn what the driver says of the file into our errors. For `handle_error`."""
        error = context.original_exception
        connection = context.connection
        if connection is not None and not connection.closed and not connection.invalidated:
            driver_connection = cast("GuardedConnection", connection.connection.dbapi_connection)
            if driver_connection.lost and str(error).startswith("no such savepoint"):
                return driver_connection.lost_error()
            driver_connection.notice_loss()
        return translated(self, error)

    def disposed(self, _engine: Engine) -> None:
        """Let go of the lock file, or of a database in memory. For the `engine_disposed` event."""
        self.gate.close()
        if self._anchor is not None:
            self._anchor.close()

    def forked(self) -> BufferStorageError:
        """The error of a child process that may not use what its parent had open."""
        return BufferStorageError(
            f"{self} was in use in the parent process at the moment of the fork, and SQLite cannot go on in the child. "
            "Nothing was written here; the parent is not affected. Open the buffer after the fork, or call "
            "close_buffer_db() (or engine.dispose()) before it."
        )

    def _open(self, **options: Any) -> sqlite3.Connection:  # noqa: ANN401 (the driver's own options)
        if hasattr(self.driver, "LEGACY_TRANSACTION_CONTROL"):
            # The new autocommit=False opens transactions by itself, which makes BEGIN IMMEDIATE impossible.
            options["autocommit"] = self.driver.LEGACY_TRANSACTION_CONTROL
        connection: sqlite3.Connection = self.driver.connect(
            self._target, uri=True, isolation_level=None, check_same_thread=False, timeout=self.busy_timeout, **options
        )
        return connection

    def _create(self, path: Path) -> None:
        """Create the file, owner-only, so that not even a power cut can take its name away."""
        if path.exists() and path.stat().st_size:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.gate.held():
            with contextlib.suppress(FileExistsError):
                # Exclusively: opening a file that SQLite has open, and closing it, would cancel SQLite's locks.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            if path.stat().st_size == 0:
                for folder in path.parents:
                    sync_folder(folder)

    def explained(self) -> contextlib.AbstractContextManager[None]:
        """Turn what the driver and the system say of the file into our errors."""
        return storage_errors(self, self.driver)


def checkpoint(engine: Engine) -> None:
    """Bring what is in the WAL into the database, as far as no reader needs it there."""
    database = _database_of(engine)
    with database.gate.held(), database.explained():
        connection = engine.raw_connection()
        try:
            cast("GuardedConnection", connection.dbapi_connection).execute("PRAGMA wal_checkpoint").fetchone()
        finally:
            connection.close()


@contextlib.contextmanager
def lenient_text(connection: Connection) -> Iterator[None]:
    """Read text that is no UTF-8 all the same, its stray bytes as escapes."""
    driver_connection = cast("GuardedConnection", connection.connection.dbapi_connection)
    before = driver_connection.text_factory
    driver_connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    try:
        yield
    finally:
        driver_connection.text_factory = before


def driver_of(engine: Engine) -> ModuleType:
    """The module that an engine's connections come from: the standard one, or that of the extra `sqlite`."""
    return cast("ModuleType", engine.dialect.dbapi)


@contextlib.contextmanager
def storage_errors(what: object, driver: ModuleType) -> Iterator[None]:
    """Turn what the driver and the system say of the file `what` into our errors."""
    try:
        yield
    except (OSError, UnicodeDecodeError, driver.Error) as error:
        raise _refusal(what, error) from error


def _refusal(what: object, error: BaseException) -> BufferStorageError:
    return translated(what, error) or BufferStorageError(
        f"{what}: SQLite refused to go on ({error}). Nothing was written."
    )


def translated(what: object, error: BaseException | None) -> BufferStorageError | None:
    """Our error for what the driver or the system say of the file `what`; None if it is not about the file."""
    if isinstance(error, UnicodeDecodeError) or str(error).startswith("Could not decode to UTF-8"):
        error_of_text = _FAULTS[11]
        return error_of_text.error(f"{what}: it holds text that is no UTF-8 ({error}). {error_of_text.advice}")
    if isinstance(error, OSError):
        return BufferStorageError(
            f"{what} cannot be used: {error.strerror or error}. Nothing was written. Check that the folder exists "
            "and that this user may read and write it."
        )
    fault = _FAULTS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    if fault is None:
        return None
    return fault.error(f"{what}: {fault.happened} ({error}). {fault.advice}")


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: what fsync of a file leaves out."""
    with contextlib.suppress(PermissionError):  # a folder above ours that we may pass but not read
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# A connection must not be carried over a fork (https://www.sqlite.org/howtocorrupt.html, section 2.6): SQLite in the
# child believes in locks that only the parent has. So idle connections are closed before a fork, and where one is in
# use, the child is refused. No connection is opened between the two.
_databases: weakref.WeakKeyDictionary[Engine, _Database] = weakref.WeakKeyDictionary()
_inherited_files: set[tuple[int, int] | None] = set()
_fork_lock = threading.RLock()


def _before_fork() -> None:
    _fork_lock.acquire()
    for engine in list(_databases):
        # Not engine.dispose(), which would forget the connections that are in use.
        engine.pool.dispose()


def _after_fork_in_child() -> None:
    import ctypes  # noqa: PLC0415 (slow to import, and few processes fork)

    for engine, database in list(_databases.items()):
        # Another thread may have been inside the pool: its locks would never be free here.
        engine.pool = engine.pool.recreate()
        database.gate.forget()
        database.inherited = database.path is None or bool(database.connections)
        if database.identity is not None and database.connections:
            _inherited_files.add(database.identity)
        for connection in database.connections:
            # Never to be freed, not even at exit: that would close it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    _fork_lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_fork_lock.release, after_in_child=_after_fork_in_child)
