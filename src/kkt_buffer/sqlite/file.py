"""
Copies of a database in use, made by SQLite itself.

Never by opening the file: closing it again would cancel the locks that SQLite holds in this process.
"""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqlalchemy import Engine

from kkt_buffer.progress import progress
from kkt_buffer.sqlite.engine import READ_ONLY, driver_of, storage_errors, sync_folder

if TYPE_CHECKING:
    import sqlite3

PAGES_AT_ONCE = 1000


def backup(engine: Engine, path: str | os.PathLike[str]) -> None:
    """
    Copy the database as it is at this moment to `path`, readable for the owner alone, whoever writes meanwhile.

    What was at `path` is replaced when the copy is complete and on disk: a crash leaves the old file or the new one.

    Raises `BufferStorageError` if the copy cannot be written; nothing was changed then. Raises `ValueError` if `path`
    is the database itself or one of the files that belong to it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the path of a file, got {path!r}")
    if not Path(path).name or "\0" in str(path):
        raise ValueError(f"path: expected the path of a file, got {path!r}")
    target = Path(os.path.realpath(path))
    if str(target) in {f"{engine.url.database}{suffix}" for suffix in ("", "-wal", "-shm", "-gate")}:
        raise ValueError(f"path: {target} belongs to the buffer itself; give another one. Nothing was copied.")
    unfinished = target.with_name(f".{target.name}.unfinished")
    with storage_errors(f"the backup {target}", driver_of(engine)):
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _copy(engine, unfinished)
            os.fsync(descriptor)
            unfinished.replace(target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_folder(target.parent)


def _copy(engine: Engine, path: Path) -> None:
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        # One snapshot from the first page to the last: without it, each write of somebody else starts the copy anew.
        connection.exec_driver_sql("SELECT COUNT(*) FROM sqlite_master")
        source = cast("sqlite3.Connection", connection.connection.driver_connection)
        with contextlib.closing(driver_of(engine).connect(path, isolation_level=None)) as copy:
            # It is no database yet, so it needs no journal of its own.
            copy.execute("PRAGMA journal_mode = OFF")
            copy.execute("PRAGMA synchronous = OFF")
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            with progress("backup, pages", pages) as tell:
                source.backup(copy, pages=PAGES_AT_ONCE, progress=lambda _status, left, total: tell(total - left))
