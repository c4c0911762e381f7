"""Which SQLite library is used, which are refused, and which are warned of."""

import json
import os
import sqlite3
import sys
from types import ModuleType

import pytest
from builders import driver, new_receipt, run_python

from kkt_buffer import BufferStorageError, ReceiptRepository
from kkt_buffer.backend import backend_of

# Whether a version has the WAL-reset bug.
AFFECTED = {
    "3.40.1": True,
    "3.44.5": True,
    "3.44.6": False,
    "3.45.0": True,
    "3.50.6": True,
    "3.50.7": False,
    "3.51.2": True,
    "3.51.3": False,
    "3.53.0": False,
}

# How often the library is warned of, in two engines, for each version that it says it is.
WARNINGS = """
import json, logging, sys
import kkt_buffer
from builders import driver

class Counter(logging.Handler):
    def emit(self, record):
        seen.append(record.getMessage())

seen, counts = [], {}
kkt_buffer.create_buffer_engine(":memory:").dispose()
module = driver()
logging.getLogger("kkt_buffer").addHandler(Counter())
for version in json.loads(sys.argv[1]):
    seen.clear()
    module.sqlite_version = version
    module.sqlite_version_info = tuple(map(int, version.split(".")))
    for _ in range(2):
        kkt_buffer.create_buffer_engine(":memory:", driver=module).dispose()
    counts[version] = sum("WAL-reset bug" in message and version in message for message in seen)
print(json.dumps(counts))
"""


def test_wal_reset_bug(pytestconfig):
    """An affected library is named in the log, once for each process; one that is not affected is not."""
    versions = [version for version in AFFECTED if version != driver().sqlite_version]  # that has been said already
    done = run_python(WARNINGS, json.dumps(versions), cwd=pytestconfig.rootpath / "tests")
    assert {version: int(AFFECTED[version]) for version in versions} == json.loads(done.stdout)


# A second SQLite library: the one of this Python, which says that it has another version.
SECOND = """
import sqlite3 as standard
from sqlite3 import *

class Connection(standard.Connection):
    pass

sqlite_version = "{version}"
sqlite_version_info = tuple(map(int, sqlite_version.split(".")))
"""
# Which driver is used, and what is said in two engines, if the standard library's SQLite has this version.
CHOICE = """
import logging, sqlite3, sys
from kkt_buffer import create_buffer_engine
from kkt_buffer.backend import backend_of

sqlite3.sqlite_version = sys.argv[1]
sqlite3.sqlite_version_info = tuple(map(int, sys.argv[1].split(".")))
logging.basicConfig(format="%(message)s", stream=sys.stdout)
for _ in range(2):
    engine = create_buffer_engine(":memory:")
print(backend_of(engine).driver.__name__, "pysqlite3" in sys.modules)
"""


class TestChoice:
    @pytest.mark.parametrize(
        ("standard", "second", "expected", "said"),
        [
            ("3.51.3", "3.53.0", "sqlite3", []),
            ("3.40.1", "3.53.0", "pysqlite3", ["used through pysqlite3", "Never open the file with `sqlite3`"]),
            ("3.40.1", "3.46.0", "sqlite3", ["SQLite 3.40.1 has the WAL-reset bug"]),
            ("3.37.2", "3.46.0", "pysqlite3", ["used through pysqlite3", "SQLite 3.46.0 has the WAL-reset bug"]),
        ],
    )
    def test_default(self, tmp_path, standard, second, expected, said):
        """The standard library's SQLite, unless it has the WAL-reset bug and pysqlite3 has not; said once."""
        (tmp_path / "pysqlite3.py").write_text(SECOND.format(version=second))
        *lines, name = run_python(CHOICE, standard, env=os.environ | {"PYTHONPATH": str(tmp_path)}).stdout.splitlines()
        # What is not needed is not even loaded.
        assert f"{expected} {standard != '3.51.3'}" == name
        told = "\n".join(lines)
        assert [1] * len(said) == [told.count(words) for words in said]
        assert len(lines) <= len(said)

    def test_not_installed(self, monkeypatch, open_engine):
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        assert sqlite3 is backend_of(open_engine(":memory:")).driver

    def test_chosen(self, monkeypatch, open_engine):
        """By name, or as a module."""
        for choice in ("sqlite3", sqlite3, sqlite3.dbapi2):
            assert sqlite3.Connection is backend_of(open_engine(":memory:", driver=choice)).driver.Connection
        monkeypatch.setitem(sys.modules, "pysqlite3", sqlite3)
        assert sqlite3 is backend_of(open_engine(":memory:", driver="pysqlite3")).driver

    @pytest.mark.parametrize("choice", ["psycopg", json, 5])
    def test_no_driver(self, open_engine, choice):
        with pytest.raises(ValueError, match=r"driver: expected a module like sqlite3, or one of"):
            open_engine(":memory:", driver=choice)

    def test_two_on_one_file(self, path, tmp_path, open_engine):
        """Two libraries in one process cancel each other's locks: the second one is refused, for reading too."""
        second = ModuleType("second")
        exec(SECOND.format(version="3.53.0"), vars(second))
        first = open_engine(path, driver="sqlite3")
        for read_only in (False, True):
            with pytest.raises(BufferStorageError, match=r"in use in this process through sqlite3, and second is ano"):
                open_engine(path, driver=second, read_only=read_only)
        open_engine(tmp_path / "other.db", driver=second)
        ReceiptRepository(first).insert_receipt(new_receipt())


def test_old_sqlite(monkeypatch, tmp_path, open_engine):
    """A library without what the schema needs is refused before a file is made."""
    monkeypatch.setattr(driver(), "sqlite_version_info", (3, 37, 2))
    with pytest.raises(BufferStorageError, match=r"is too old, 3\.38\.0 is needed.*kkt-buffer\[sqlite\]"):
        open_engine(tmp_path / "buffer.db", driver=driver())
    assert [] == list(tmp_path.iterdir())


def test_windows(monkeypatch, open_engine):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(BufferStorageError, match="Linux and macOS"):
        open_engine(":memory:")
