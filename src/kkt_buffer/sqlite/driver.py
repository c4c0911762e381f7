"""The SQLite library in use, and its known bugs."""

import importlib
import importlib.util
import logging
import sqlite3
from types import ModuleType
from typing import Literal, get_args

from sqlalchemy import Engine

from kkt_buffer.backend import backend_of
from kkt_buffer.errors import BufferStorageError

logger = logging.getLogger(__name__)

Driver = Literal["sqlite3", "pysqlite3"]
SQLITE_MINIMUM = (3, 38, 0)  # unixepoch() in our triggers
WAL_RESET_BUG = (
    "has the WAL-reset bug (fixed in 3.51.3, 3.50.7 and 3.44.6): let no other program write to the buffer or "
    "checkpoint it. The extra `sqlite` of kkt-buffer brings a fixed SQLite."
)
ONE_LIBRARY = (
    "Never open the file with `sqlite3` in this process: two SQLite libraries in one process cancel each other's "
    "locks, and the file is damaged."
)


def load_driver(choice: Driver | ModuleType | None, *, writing: bool) -> ModuleType:
    """
    The driver that the caller chose, else the standard library's, else pysqlite3.

    Without a choice, pysqlite3 is used only where the standard SQLite is affected by the WAL-reset bug or too old, and
    pysqlite3 is installed and is not: a service that opens the file with `sqlite3` then uses the same library.
    """
    driver = _chosen(choice)
    if driver.sqlite_version_info < SQLITE_MINIMUM:
        raise BufferStorageError(
            f"SQLite {driver.sqlite_version} is too old, {'.'.join(map(str, SQLITE_MINIMUM))} is needed. "
            "Nothing was opened. Install kkt-buffer[sqlite], which brings its own."
        )
    if writing:
        for warning in _warnings(driver) - _logged:
            logger.warning(warning)
            _logged.add(warning)
    return driver


_logged: set[str] = set()  # in this process


def _warnings(driver: ModuleType) -> set[str]:
    warnings = set()
    if has_wal_reset_bug(driver):
        warnings.add(f"SQLite {driver.sqlite_version} {WAL_RESET_BUG}")
    if not is_same_library(driver, sqlite3):
        warnings.add(f"the buffer is used through {driver.__name__} (SQLite {driver.sqlite_version}). {ONE_LIBRARY}")
    return warnings


def _chosen(choice: Driver | ModuleType | None) -> ModuleType:
    if isinstance(choice, ModuleType) and hasattr(choice, "sqlite_version_info"):
        return choice
    if choice is not None:
        if choice not in get_args(Driver):
            raise ValueError(f"driver: expected a module like sqlite3, or one of {get_args(Driver)}, got {choice!r}")
        return importlib.import_module(str(choice))
    if not has_wal_reset_bug(sqlite3) or importlib.util.find_spec("pysqlite3") is None:
        return sqlite3
    candidates = sqlite3, importlib.import_module("pysqlite3")
    return min(candidates, key=lambda driver: (driver.sqlite_version_info < SQLITE_MINIMUM, has_wal_reset_bug(driver)))


def is_same_library(one: ModuleType, other: ModuleType) -> bool:
    """Whether two driver modules are one library: `sqlite3.dbapi2` is `sqlite3`."""
    return one.Connection is other.Connection


def has_wal_reset_bug(driver: ModuleType) -> bool:
    """Whether concurrent writes and checkpoints of several programs can damage the WAL with this SQLite."""
    version: tuple[int, int, int] = driver.sqlite_version_info
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return not fixed


def known_bugs(engine: Engine) -> str:
    """The version of the SQLite in use, and its known bug if it has one. It is then not written to the log too."""
    driver = backend_of(engine).driver
    _logged.update(_warnings(driver))
    affected = has_wal_reset_bug(driver)
    return f"{driver.sqlite_version} {WAL_RESET_BUG if affected else 'no known bug that concerns a buffer'}"
