"""Which SQLite libraries are refused, and which are warned of."""

import json

import pytest
from builders import driver, run_python

from kkt_buffer import BufferStorageError

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
        kkt_buffer.create_buffer_engine(":memory:").dispose()
    counts[version] = sum("WAL-reset bug" in message and version in message for message in seen)
print(json.dumps(counts))
"""


def test_wal_reset_bug(pytestconfig):
    """An affected library is named in the log, once for each process; one that is not affected is not."""
    versions = [version for version in AFFECTED if version != driver().sqlite_version]  # that has been said already
    done = run_python(WARNINGS, json.dumps(versions), cwd=pytestconfig.rootpath / "tests")
    assert {version: int(AFFECTED[version]) for version in versions} == json.loads(done.stdout)


def test_old_sqlite(monkeypatch, tmp_path, open_engine):
    """A library without what the schema needs is refused before a file is made."""
    monkeypatch.setattr(driver(), "sqlite_version_info", (3, 37, 2))
    with pytest.raises(BufferStorageError, match=r"is too old, 3\.38\.0 is needed.*kkt-buffer\[sqlite\]"):
        open_engine(tmp_path / "buffer.db")
    assert [] == list(tmp_path.iterdir())


def test_windows(monkeypatch, open_engine):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(BufferStorageError, match="Linux and macOS"):
        open_engine(":memory:")
