"""
The database file: creation, refusal of second names, backup, and checks for damage.

SQLite itself makes the copy. The file is never opened directly: closing it would cancel the locks that SQLite holds in
this process (https://www.sqlite.org/howtocorrupt.html, section 2.2).
"""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqlalchemy import Connection, Engine, text

from kkt_buffer.backend import AT_MOST, READ_ONLY, Backend
from kkt_buffer.errors import BufferDamagedError, BufferStorageError
from kkt_buffer.progress import progress
from kkt_buffer.sqlite.connection import GuardedConnection, Identity
from kkt_buffer.sqlite.errors import storage_errors
from kkt_buffer.sqlite.gate import WriteGate

if TYPE_CHECKING:
    import sqlite3

PAGES_AT_ONCE = 1000

# The files of a database, by what follows its name.
SUFFIXES = ("", "-wal", "-shm", "-journal", "-gate")

# A backup that has not written for so long was killed.
ABANDONED_SECONDS = 3600


def identity(path: Path) -> Identity | None:
    """Device and inode of a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def refuse_second_name(path: Path) -> None:
    """
    Raise `BufferStorageError` if other processes can reach the file by another name, in another folder.

    SQLite puts the WAL beside the name by which the file was opened. Two WALs overwrite each other's receipts.
    """
    names = path.stat().st_nlink
    if names > 1:
        raise BufferStorageError(
            f"{path} has {names} names (hard links). Programs that open it under different names overwrite what the "
            "others have acknowledged. Nothing was opened. Stop every program that uses it; list the names with "
            f"`find -samefile {path}`; keep the name that has a -wal beside it, and remove the other name."
        )
    if _is_mount_point(path):
        raise BufferStorageError(
            f"{path} is mounted by itself. Its -wal is not, so programs inside and outside overwrite what the others "
            f"have acknowledged. Nothing was opened. Mount its folder instead, and put nothing else into that folder."
        )


def _is_mount_point(path: Path) -> bool:
    mounts = b""
    with contextlib.suppress(OSError):  # macOS has no such file, and cannot mount a file
        mounts = Path("/proc/self/mountinfo").read_bytes()
    escaped = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(path))
    return any(line.split(b" ")[4] == escaped for line in mounts.splitlines())


def create(path: Path, gate: WriteGate) -> None:
    """Create the file, readable by the owner only, and put its directory entry on disk."""
    if path.exists() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with gate.held():
        with contextlib.suppress(FileExistsError):
            # O_EXCL: opening and closing a file that SQLite has open would cancel SQLite's locks.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if path.stat().st_size == 0:
            for folder in path.parents:
                sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Put the entries of a folder on disk, which fsync of a file does not do."""
    with contextlib.suppress(PermissionError):  # a parent folder without read permission
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def backup(backend: Backend, engine: Engine, path: str | os.PathLike[str]) -> None:
    """
    Copy a consistent snapshot of the database to `path`, readable by the owner only. Writers can continue.

    A file at `path` is replaced when the copy is complete and on disk: a crash leaves the old file or the new one.

    Raises `BufferStorageError` if the copy cannot be written; nothing was changed then. Raises `ValueError` if `path`
    is the database itself or one of the files that belong to it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the path of a file, got {path!r}")
    if not Path(path).name or "\0" in str(path):
        raise ValueError(f"path: expected the path of a file, got {path!r}")
    target = Path(os.path.realpath(path))
    if _belongs(target, Path(str(engine.url.database))):
        raise ValueError(f"path: {target} belongs to the buffer itself; give another one. Nothing was copied.")
    # A name of its own: another backup to the same path must not write into this one, or put it in place half done.
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.unfinished")
    with storage_errors(f"the backup {target}", backend.driver):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _remove_abandoned(target, os.fstat(descriptor).st_mtime)
            _copy(backend, engine, unfinished)
            os.fsync(descriptor)
            unfinished.replace(target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_folder(target.parent)


def _belongs(target: Path, database: Path) -> bool:
    """
    Whether `target` is one of the files of the database, under whatever name.

    The folder is compared too, because a file of the database need not exist at this moment.
    """
    own = [database.with_name(f"{database.name}{suffix}") for suffix in SUFFIXES]
    in_its_folder = identity(target.parent) == identity(database.parent)
    return (in_its_folder and target.name in {file.name for file in own}) or (
        target.exists() and identity(target) in {identity(file) for file in own}
    )


def _remove_abandoned(target: Path, now: float) -> None:
    """Remove what killed backups to this target have left. `now` is by the clock of the file system."""
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        for file in target.parent.iterdir():
            is_unfinished = file.name.startswith(f".{target.name}.") and file.name.endswith(".unfinished")
            if is_unfinished and now - file.stat().st_mtime > ABANDONED_SECONDS:
                file.unlink()


def _copy(backend: Backend, engine: Engine, path: Path) -> None:
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        # This read begins the snapshot. Without it, each write of another connection would restart the copy.
        connection.exec_driver_sql("SELECT COUNT(*) FROM sqlite_master")
        source = cast("sqlite3.Connection", connection.connection.driver_connection)
        with contextlib.closing(backend.driver.connect(path, isolation_level=None)) as copy:
            # An unfinished copy is never used, so it needs neither a journal nor a sync after each write.
            copy.execute("PRAGMA journal_mode = OFF")
            copy.execute("PRAGMA synchronous = OFF")
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            with progress("backup, pages", pages) as report:
                source.backup(copy, pages=PAGES_AT_ONCE, progress=lambda _status, left, total: report(total - left))


@contextlib.contextmanager
def lenient_text(connection: GuardedConnection) -> Iterator[None]:
    """Read invalid UTF-8 too, decoded with backslash escapes."""
    before = connection.text_factory
    connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    try:
        yield
    finally:
        connection.text_factory = before


def _pages(connection: Connection) -> list[str]:
    try:
        found = list(connection.scalars(text(f"PRAGMA integrity_check({AT_MOST})")))
    except BufferDamagedError as error:
        # integrity_check stops at an unreadable page; quick_check continues and names the page.
        found = [*connection.scalars(text(f"PRAGMA quick_check({AT_MOST})")), str(error)]
    return [line for line in found if line != "ok"]


def _references(connection: Connection) -> list[str]:
    return [
        f"row {row.rowid} of {row.table} refers to a row of {row.parent} that is not there"
        for row in connection.execute(text("PRAGMA foreign_key_check"))
    ]


def _texts(connection: Connection) -> list[str]:
    problems = []
    columns = ("id", "pos_id", "fiscal_doc", "last_error")
    for receipt_id, *values in connection.execute(_TEXTS):
        for column, value in zip(columns, (receipt_id, *values), strict=True):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                problems.append(f"{column} of receipt {receipt_id.decode(errors='backslashreplace')}: {error}")
    return problems


_TEXTS = text(
    "SELECT CAST(id AS BLOB), CAST(pos_id AS BLOB), CAST(fiscal_doc AS BLOB), CAST(last_error AS BLOB) FROM receipts"
)
# The rowid gives the order of commits. Receipts adopted from the sqlite3 version need not be in order.
_ORDER = text(
    """\
SELECT 'receipt ' || id || ' has a timestamp that is not above the one before it' FROM (
    SELECT rowid AS number, id, hlc_local_time AS time, hlc_logical_counter AS counter,
        LAG(hlc_local_time) OVER (ORDER BY rowid) AS time_before,
        LAG(hlc_logical_counter) OVER (ORDER BY rowid) AS counter_before
    FROM receipts)
WHERE (time, counter) <= (time_before, counter_before)
    AND number > COALESCE((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'adopted_rows'), 0)"""
)
# If the receipts with the greatest rowids are deleted, SQLite gives these rowids to new receipts. Lower `adopted_rows`,
# so that it does not include them.
ADOPTED = text(
    """\
UPDATE config SET value = (SELECT COALESCE(MAX(rowid), 0) FROM receipts)
WHERE key = 'adopted_rows' AND CAST(value AS INTEGER) > (SELECT COALESCE(MAX(rowid), 0) FROM receipts)"""
)
CHECKS: Mapping[str, Callable[[Connection], list[str]]] = {
    "pages and indexes": _pages,
    "references": _references,
    "texts": _texts,
    "order of timestamps": lambda connection: list(connection.scalars(_ORDER).fetchmany(AT_MOST)),
}
