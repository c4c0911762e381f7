"""
`GuardedConnection`: a driver connection that detects replaced files.

`commit()` returns only when the transaction is on disk, in the file at the path of the buffer.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from types import ModuleType
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from kkt_buffer.errors import BufferDamagedError, BufferStorageError
from kkt_buffer.sqlite.errors import storage_errors
from kkt_buffer.sqlite.gate import WriteGate

logger = logging.getLogger(__name__)

Identity = tuple[int, int]  # device and inode

LONG_TRANSACTION_SECONDS = 1.0


class Database(Protocol):
    """The state that the connections of one engine share."""

    driver: ModuleType
    read_only: bool
    gate: WriteGate

    def forked(self) -> BufferStorageError:
        """The error for a forked child that uses the buffer which its parent had in use."""


class GuardedConnection(sqlite3.Connection if TYPE_CHECKING else object):  # type: ignore[misc]
    """
    A mixin for the connection class of the driver.

    A write transaction holds the write gate from BEGIN to its end. A transaction is refused if the files were replaced,
    or if the process was forked.
    """

    database: Database
    files: "Files | None" = None  # None: in memory
    pid = 0
    query_only = False
    is_writing = False
    is_begun = False
    is_reader = False  # in the pool of the operations that read
    is_operation = (
        False  # the transaction belongs to an operation of this package, not to the caller's own use of the engine
    )
    began = 0.0

    def begin(self, *, write: bool) -> None:
        """Begin. A write transaction takes the gate first; in a read transaction SQLite refuses writes."""
        self.refuse_child()
        database = self.database
        write = write and not database.read_only
        try:
            with storage_errors(database, database.driver):
                if write:
                    self.is_writing = True
                    database.gate.acquire(self)
                if self.files is not None:
                    self.files.before(self, write=write)
                if self.query_only is write:
                    self.execute(f"PRAGMA query_only = {not write}")
                    self.query_only = not write
                self.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        except BaseException:
            self.rollback()  # an exception may have come right after BEGIN
            raise
        self.is_begun, self.began = True, time.monotonic()

    def commit(self) -> None:
        """Commit. Fails if there is no transaction: SQLite may have rolled it back by itself."""
        self.refuse_child()
        self.execute("COMMIT")
        if self.is_writing and self.files is not None:
            self.files.after()
        self.finish()

    def rollback(self) -> None:
        """Roll back, and release the gate."""
        if self.pid == os.getpid():
            super().rollback()
            self.finish()  # not in a finally: the gate stays held as long as the transaction is open

    def close(self) -> None:
        """
        Close, with the gate held if it is free: the last connection of a file checkpoints it, which is a write.

        If the gate is not free, its holder has the file open, so this connection is not the last.
        """
        if self.pid != os.getpid():
            return  # closing would write to the shared memory of the parent's WAL
        try:
            # A closed connection keeps its transaction, and SQLite's lock, until its last cursor is garbage-collected.
            with contextlib.suppress(self.database.driver.Error):
                super().rollback()
            if self.database.read_only or self.is_writing:
                super().close()
            else:
                with self.database.gate.held_if_free():
                    super().close()
        finally:
            self.finish()

    def refuse_child(self) -> None:
        """Raise if this is not the process that opened the connection."""
        if self.pid != os.getpid():
            raise self.database.forked()

    @property
    def was_rolled_back(self) -> bool:
        """Whether SQLite has rolled back the write transaction by itself."""
        return self.is_writing and self.is_begun and not self.in_transaction

    def finish(self) -> None:
        """Release the gate at the end of a transaction, and log a warning if it was long."""
        lasted = time.monotonic() - self.began if self.is_writing and self.is_begun else 0.0
        self.is_begun = self.is_operation = False
        if self.is_writing:
            self.database.gate.release(self)
            self.is_writing = False
        if lasted > LONG_TRANSACTION_SECONDS:
            logger.warning(
                "%s: the thread %r had a write transaction open for %.1f s, and other writers waited. Keep it short, "
                "and read in ReceiptRepository.reading()",
                self.database,
                threading.current_thread().name,
                lasted,
            )


class Sizes:
    """The last known sizes of the database and its WAL, in bytes, shared by the connections of an engine."""

    database = 0
    wal = 0


class Files:
    """
    Compare the database and the WAL that a connection has open with the files at their paths.

    If a program has replaced a file, this connection would write to a deleted file that no other process reads. If a
    program has truncated a file, acknowledged receipts are lost.
    """

    def __init__(self, path: str, database: Identity, known: Sizes, driver: ModuleType, *, has_wal: bool) -> None:
        self._path = path
        self._wal_path = f"{path}-wal"
        self._database = database
        self._wal: Identity | None = None
        # Before this connection has opened the WAL, another process may close the buffer and delete it.
        if has_wal and (wal := _stat(self._wal_path)) is not None:
            self._wal = (wal.st_dev, wal.st_ino)
        self._known = known
        self._driver = driver
        self._checked_sizes("Nothing was written.")

    def before(self, connection: sqlite3.Connection, *, write: bool) -> None:
        """Check before a transaction. Raises `BufferStorageError`, or `BufferDamagedError` for a truncated file."""
        # Read the known sizes before the real ones: a commit of another thread in between only makes the files larger.
        database_before, wal_before = self._known.database, self._known.wal
        database, wal = self._checked_sizes("Nothing was written.")
        if wal < wal_before and write:
            # A checkpoint may have reset the WAL. SQLite knows which frames must exist, and this checkpoint reads them.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if database < database_before:
            self._refuse_damaged()
        if database != database_before or (wal != wal_before and write):
            self._known.database, self._known.wal = database, wal

    def after(self) -> None:
        """Check after a COMMIT. Raises `BufferStorageError` if a file was replaced meanwhile."""
        self._known.database, self._known.wal = self._checked_sizes("The last transaction may be lost.")

    def _checked_sizes(self, consequence: str) -> tuple[int, int]:
        database, wal = _stat(self._path), _stat(self._wal_path)
        if database is None or (database.st_dev, database.st_ino) != self._database:
            raise _replaced(self._path, consequence)
        if self._wal is None:
            return database.st_size, 0
        if wal is None or (wal.st_dev, wal.st_ino) != self._wal:
            raise _replaced(self._wal_path, consequence)
        return database.st_size, wal.st_size

    def _refuse_damaged(self) -> None:
        """Raise if a database that became shorter is damaged (not by VACUUM). A new connection has no cached pages."""
        with contextlib.closing(self._driver.connect(f"file:{quote(self._path)}?mode=ro", uri=True)) as fresh:
            found = fresh.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fresh.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                found = "it is empty"  # SQLite takes an empty file for a new database
        if found != "ok":
            raise BufferDamagedError(
                f"{self._path} was truncated while it was in use ({found}). Nothing was written. Stop every program "
                "that uses the buffer, keep a copy of all its files, and restore a backup."
            )


def _stat(name: str) -> os.stat_result | None:
    try:
        return os.stat(name)  # noqa: PTH116 (in every transaction)
    except FileNotFoundError:
        return None


def _replaced(name: str, consequence: str) -> BufferStorageError:
    return BufferStorageError(
        f"{name} was deleted or replaced while it was in use. {consequence} Stop every program that uses the buffer, "
        "put the right files in place, and start again."
    )
