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
RECENT_NANOSECONDS = 1_000_000_000


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
    query_only: bool | None = None  # as it was set last; None: not by us
    is_writing = False
    is_begun = False
    owner = 0
    began = 0.0

    def begin(self, *, write: bool, owner: int) -> None:
        """Begin a transaction: a write takes the gate first, any other one cannot write. `owner` identifies it."""
        self.owner = owner
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
        self.is_begun, self.owner = False, 0
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


class Files:
    """
    The database and its WAL as a connection has them open, compared with what stands on disk under their names.

    A program that replaces a file leaves us writing to one that nobody else will ever read; one that cuts a file takes
    acknowledged receipts away. Looks cost time in every transaction, so there are three: both files before a write,
    and after its COMMIT the folder, whose time every replacement moves.
    """

    def __init__(self, path: str, identity: Identity, sizes: dict[str, int], driver: ModuleType) -> None:
        self._path = path
        self._wal = f"{path}-wal"
        self._folder = os.path.dirname(path)  # noqa: PTH120 (as below: in every transaction)
        self._known = {path: identity}
        self._sizes = sizes  # shared by the connections of an engine; as they were at the last look
        self._driver = driver
        self._seen: tuple[int, int, int] | None = None
        with contextlib.suppress(FileNotFoundError):
            wal = os.stat(self._wal)  # noqa: PTH116
            self._known[self._wal] = (wal.st_dev, wal.st_ino)
        self._refuse_replaced("Nothing was written.")

    def before(self, connection: sqlite3.Connection, *, write: bool) -> None:
        """Look before a transaction begins. Raises `BufferStorageError`, or `BufferDamagedError` for what was cut."""
        if not write:
            self.after()
            return
        wal = self._look(self._wal, "Nothing was written.").st_size
        database = self._look(self._path, "Nothing was written.").st_size
        if wal < self._sizes.get(self._wal, 0):
            # A checkpoint may have emptied it. SQLite knows which frames must be there, and reads them for this one.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if database < self._sizes.get(self._path, 0):
            self._refuse_damaged()
        self._sizes.update({self._wal: wal, self._path: database})

    def after(self) -> None:
        """Look after a COMMIT, or before reading. Raises `BufferStorageError` if a file was replaced."""
        folder = os.stat(self._folder)  # noqa: PTH116
        seen = (folder.st_dev, folder.st_ino, folder.st_mtime_ns)
        if seen != self._seen:
            self._refuse_replaced("The last transaction may be lost.")
            # File systems keep time in steps of some milliseconds, and a later change may have the same one.
            if time.time_ns() - folder.st_mtime_ns > RECENT_NANOSECONDS:
                self._seen = seen
        if not self._sizes.get(self._wal):
            self._sizes[self._wal] = self._look(self._wal, "The last transaction may be lost.").st_size

    def _refuse_replaced(self, consequence: str) -> None:
        for name in self._known:
            self._look(name, consequence)

    def _look(self, name: str, consequence: str) -> os.stat_result:
        try:
            found = os.stat(name)  # noqa: PTH116
        except FileNotFoundError:
            found = None
        if found is None or self._known.get(name, (found.st_dev, found.st_ino)) != (found.st_dev, found.st_ino):
            raise BufferStorageError(
                f"{name} was deleted or replaced while it was in use. {consequence} Stop every program that uses the "
                "buffer, put the right files in place, and start again."
            )
        return found

    def _refuse_damaged(self) -> None:
        """Let SQLite read a database that has become shorter, as VACUUM makes it, on a connection without a cache."""
        with contextlib.closing(self._driver.connect(f"file:{quote(self._path)}?mode=ro", uri=True)) as fresh:
            found = fresh.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise BufferDamagedError(
                f"{self._path} was cut short while it was in use ({found}). Nothing was written. Stop every program "
                "that uses the buffer, keep a copy of all its files, and restore a backup."
            )
