"""The SQLite library in use, and its known bugs."""

import importlib
import importlib.util
import logging
from types import ModuleType

from sqlalchemy import Engine

from kkt_buffer.backend import backend_of
from kkt_buffer.errors import BufferStorageError

logger = logging.getLogger(__name__)

SQLITE_MINIMUM = (3, 38, 0)  # unixepoch() in our triggers
WAL_RESET_BUG = (
    "has the WAL-reset bug (fixed in 3.51.3, 3.50.7 and 3.44.6): let no other program write to the buffer or "
    "checkpoint it. The extra `sqlite` of kkt-buffer brings a fixed SQLite."
)


def load_driver(*, writing: bool) -> ModuleType:
    """
    The driver of the `sqlite` extra if installed, else the standard library's.

    All engines of a process use the same one: two SQLite libraries in one process would cancel each other's locks.
    """
    driver = importlib.import_module("pysqlite3" if importlib.util.find_spec("pysqlite3") else "sqlite3")
    if driver.sqlite_version_info < SQLITE_MINIMUM:
        raise BufferStorageError(
            f"SQLite {driver.sqlite_version} is too old, {'.'.join(map(str, SQLITE_MINIMUM))} is needed. "
            "Nothing was opened. Install kkt-buffer[sqlite], which brings its own."
        )
    if writing and has_wal_reset_bug(driver.sqlite_version_info):
        _warn_once(f"SQLite {driver.sqlite_version} {WAL_RESET_BUG}")
    return driver


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether concurrent writes and checkpoints of several programs can damage the WAL with this SQLite version."""
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return not fixed


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def known_bugs(engine: Engine) -> str:
    """The version of the SQLite in use, and its known bug if it has one."""
    driver = backend_of(engine).driver
    affected = has_wal_reset_bug(driver.sqlite_version_info)
    return f"{driver.sqlite_version} {WAL_RESET_BUG if affected else 'no known bug that concerns a buffer'}"
