"""
`GuardedConnection`: a driver connection whose `commit()` returns only when the transaction is on disk, in the file that
everybody else has open.
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
    """What the connections of one engine share."""

    driver: ModuleType
    read_only: bool
    gate: WriteGate

    def forked(self) -> BufferStorageError:
        """The error of a child process that may not use what its parent had open."""


class GuardedConnection(sqlite3.Connection if TYPE_CHECKING else object):  # type: ignore[misc]
    """
    A driver connection that is mixed into the driver's own class.

    A write transaction holds the write gate from BEGIN to its end. A transaction is refused when the files were
    replaced, and in a forked child.
    """

    database: Database
    files: "Files | None" = None  # None: in memory
    pid = 0
    query_only = False
    is_writing = False
    is_begun = False
    is_operation = False  # whether `Transactions` has opened the transaction, or the caller, on the engine
    began = 0.0

    def begin(self, *, write: bool) -> None:
        """Begin a transaction: a write takes the gate first, any other one cannot write."""
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
            self.finish()
            raise
        self.is_begun, self.began = True, time.monotonic()

    def commit(self) -> None:
        """Commit what `begin` began. Fails where there is no transaction: SQLite may have rolled it back by itself."""
        self.refuse_child()
        self.execute("COMMIT")
        if self.is_writing and self.files is not None:
            self.files.after()
        self.finish()

    def rollback(self) -> None:
        """Roll back, and let the next writer in."""
        if self.pid == os.getpid():
            try:
                super().rollback()
            finally:
                self.finish()

    def close(self) -> None:
        """
        Close. The last connection of a file checkpoints it, so this too happens behind the gate.

        It does not wait there: whoever has the gate has the file open, so we are not the last.
        """
        if self.pid != os.getpid():
            return  # closing would write to the shared memory of the parent's WAL
        try:
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
        """Whether SQLite has ended a write transaction of ours by itself."""
        return self.is_writing and self.is_begun and not self.in_transaction

    def finish(self) -> None:
        """The transaction is over, whoever ended it: let the next writer in."""
        lasted = time.monotonic() - self.began if self.is_writing and self.is_begun else 0.0
        self.is_begun = False
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
    """How large the database and its WAL were when a connection of this engine last looked, in bytes."""

    database = 0
    wal = 0


class Files:
    """
    The database and its WAL as a connection has them open, compared with what stands on disk under their names.

    A program that replaces a file leaves us writing to one that nobody else will ever read; one that cuts a file takes
    acknowledged receipts away.
    """

    def __init__(self, path: str, database: Identity, known: Sizes, driver: ModuleType) -> None:
        self._path = path
        self._wal_path = f"{path}-wal"
        self._database = database
        self._wal: Identity | None = None
        with contextlib.suppress(FileNotFoundError):
            wal = os.stat(self._wal_path)  # noqa: PTH116 (here and below: in every transaction)
            self._wal = (wal.st_dev, wal.st_ino)
        self._known = known
        self._driver = driver
        self._look("Nothing was written.")

    def before(self, connection: sqlite3.Connection, *, write: bool) -> None:
        """Look before a transaction begins. Raises `BufferStorageError`, or `BufferDamagedError` for what was cut."""
        # What is known, before we look: what another thread commits meanwhile makes the files larger.
        database_before, wal_before = self._known.database, self._known.wal
        database, wal = self._look("Nothing was written.")
        if wal < wal_before and write:
            # A checkpoint may have emptied it. SQLite knows which frames must be there, and reads them for this one.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if database < database_before:
            self._refuse_damaged()
        if database != database_before or (wal != wal_before and write):
            self._known.database, self._known.wal = database, wal

    def after(self) -> None:
        """Look after a COMMIT. Raises `BufferStorageError` if a file was replaced meanwhile."""
        self._known.database, self._known.wal = self._look("The last transaction may be lost.")

    def _look(self, consequence: str) -> tuple[int, int]:
        database, wal = _stat(self._path), _stat(self._wal_path)
        if database is None or (database.st_dev, database.st_ino) != self._database:
            raise _replaced(self._path, consequence)
        if self._wal is None:
            return database.st_size, 0
        if wal is None or (wal.st_dev, wal.st_ino) != self._wal:
            raise _replaced(self._wal_path, consequence)
        return database.st_size, wal.st_size

    def _refuse_damaged(self) -> None:
        """Let SQLite read a database that has become shorter, as VACUUM makes it, on a connection without a cache."""
        with contextlib.closing(self._driver.connect(f"file:{quote(self._path)}?mode=ro", uri=True)) as fresh:
            try:
                found = fresh.execute("PRAGMA quick_check(1)").fetchone()[0]
                if fresh.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                    found = "it is empty"  # which SQLite takes for a new database
            except self._driver.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
                    raise
                found = str(error)
        if found != "ok":
            raise BufferDamagedError(
                f"{self._path} was cut short while it was in use ({found}). Nothing was written. Stop every program "
                "that uses the buffer, keep a copy of all its files, and restore a backup."
            )


_DAMAGE = {11, 26}  # SQLITE_CORRUPT, SQLITE_NOTADB


def _stat(name: str) -> os.stat_result | None:
    try:
        return os.stat(name)  # noqa: PTH116
    except FileNotFoundError:
        return None


def _replaced(name: str, consequence: str) -> BufferStorageError:
    return BufferStorageError(
        f"{name} was deleted or replaced while it was in use. {consequence} Stop every program that uses the buffer, "
        "put the right files in place, and start again."
    )
