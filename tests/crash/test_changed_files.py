"""
Files that are cut short under a service, copied without their WAL, or damaged: refused rather than written to.

That a file which was deleted or replaced is noticed is in `sqlite/test_replaced_files.py`.
"""

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from builders import PROOF, new_receipt, run_python, start_python
from sqlalchemy import text

from kkt_buffer import (
    BufferDamagedError,
    BufferStorageError,
    ReceiptBufferError,
    ReceiptRepository,
    buffer,
    create_buffer_engine,
)
from kkt_buffer.sqlite.pragmas import WAL_LIMIT

LARGE = {"text": "x" * 500}


def found_by_another(path):
    """The ids that another process finds, or what it says instead."""
    program = """
        import sqlite3, sys
        try:
            print(*(row[0] for row in sqlite3.connect(sys.argv[1]).execute("SELECT id FROM receipts NOT INDEXED")))
        except sqlite3.Error as error:
            print(error)
    """
    return run_python(program, path).stdout


@pytest.fixture
def service(path):
    """A service with twenty receipts in the database, and three more that are only in the WAL."""
    engine = create_buffer_engine(path)
    repository = ReceiptRepository(engine)
    for _ in range(20):
        repository.insert_receipt(new_receipt(fiscal_doc=LARGE))
    engine.dispose()
    for _ in range(3):
        repository.insert_receipt(new_receipt(fiscal_doc=LARGE))
    yield repository
    engine.dispose()


def cut(path, how):
    """Make a file shorter, from outside: opening it here would cancel SQLite's locks."""
    size = path.stat().st_size
    wanted = {"to nothing": 0, "by half": size // 8192 * 4096, "by a page": size - 4096}[how]
    os.truncate(path, wanted)
    assert wanted == path.stat().st_size < size


class TestTruncated:
    @pytest.mark.parametrize(
        ("suffix", "how"),
        [("", "to nothing"), ("", "by half"), ("-wal", "to nothing"), ("-wal", "by half"), ("-wal", "by a page")],
    )
    def test_refused(self, service, path, suffix, how):
        """A database or a WAL that was cut short is noticed before anything is acknowledged, or read wrongly."""
        cut(Path(f"{path}{suffix}"), how)
        size = path.stat().st_size
        with contextlib.suppress(BufferStorageError):  # what is read may be in the part that is left
            assert len(service.get_pending_receipts()) == 23
        with pytest.raises(BufferStorageError):
            service.insert_receipt(new_receipt())
        assert size == path.stat().st_size

    def test_nothing_missing(self, service, path):
        """The last page of the database is in the WAL too: without it nothing is missing, and the service goes on."""
        cut(path, "by a page")
        acknowledged = service.insert_receipt(new_receipt())
        assert service.check_integrity().is_sound
        found = found_by_another(path).split()
        assert len(found) == 24
        assert acknowledged in found

    @pytest.mark.parametrize("how", ["to nothing", "by half", "by a page"])
    def test_idle(self, service, path, how):
        """A database that was cut short while nothing is in the WAL is refused as damaged, and not written to."""
        service.close()
        service.get_buffer_status()
        cut(path, how)
        content = path.read_bytes()
        for operation in (service.get_pending_receipts, lambda: service.insert_receipt(new_receipt())):
            with pytest.raises(BufferDamagedError):
                operation()
        service.close()
        assert content == path.read_bytes()

    @pytest.mark.parametrize("by", ["PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM"])
    def test_not_mistaken(self, service, path, by):
        """What SQLite itself makes shorter, for another program too, is no damage."""
        program = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute(sys.argv[2])"
        run_python(program, path, by)
        service.insert_receipt(new_receipt())
        assert service.get_buffer_status().pending == 24
        assert len(found_by_another(path).split()) == 24

    def test_limited_by_sqlite(self, service, path, open_engine):
        """A WAL that SQLite has cut to its limit, after a long reader, is not taken for damage."""
        with open_engine(path, read_only=True).connect() as reader:
            reader.execute(text("SELECT COUNT(*) FROM receipts"))
            for _ in range(20):
                service.insert_receipt(new_receipt(fiscal_doc={"text": "x" * 100_000}))
        assert wal_size(path) > WAL_LIMIT
        run_python(INSERT_TWICE, path)  # the first one checkpoints, the second one begins the WAL anew
        assert wal_size(path) == WAL_LIMIT
        service.insert_receipt(new_receipt())


INSERT_TWICE = """
import sys
from kkt_buffer import ReceiptRepository, create_buffer_engine
repository = ReceiptRepository(create_buffer_engine(sys.argv[1]))
for _ in range(2):
    repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
"""


def wal_size(path):
    return Path(f"{path}-wal").stat().st_size


# Stores receipts until it is killed, and prints each id once it is acknowledged.
BUSY = """
import sys
from kkt_buffer import ReceiptRepository, create_buffer_engine
repository = ReceiptRepository(create_buffer_engine(sys.argv[1]))
repository.set_config("buffer_capacity", 1_000_000)
while True:
    print(repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": {"text": "x" * 500}}), flush=True)
"""


class TestCopiedAlone:
    def judged(self, copy):
        """How a database that came without its WAL is taken: refused as damaged, or with so many receipts."""
        try:
            engine = buffer.init_buffer_db(copy)
            count = buffer.get_buffer_status().pending
            with engine.connect() as connection:
                whole = connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        except ReceiptBufferError:
            return None, False
        finally:
            buffer.close_buffer_db()
        return count, whole

    @pytest.mark.slow
    def test_what_is_detected(self, path, tmp_path):
        """
        A `.db` that was copied under load without its `-wal`: torn copies are detected, but most are whole and older.

        Such a copy is what the database was at a checkpoint, to the last bit: nothing inside it tells that a WAL
        belonged to it. What this test holds is that none is taken for more than it is, and that a copy of both files,
        the WAL last, is complete.
        """
        seen = Counter()
        copies = 100 if PROOF else 20
        with contextlib.ExitStack() as stack:
            service = stack.enter_context(start_python(BUSY, path))
            stack.callback(service.kill)
            acknowledged = []
            for number in range(10 * copies):
                if number >= copies and seen["behind"]:  # the service may be ahead of what was read of it at first
                    break
                acknowledged += [service.stdout.readline().strip() for _ in range(17)]
                subprocess.run(["cp", path, tmp_path / f"{number}.db"], check=True)  # another process: locks are kept
                count, whole = self.judged(tmp_path / f"{number}.db")
                if count is None:
                    kind = "refused"
                elif not whole:
                    kind = "torn"
                else:
                    kind = "behind" if count < len(acknowledged) else "up to what was read by then"
                seen[kind] += 1
        print(f"{seen.total()} copies of the .db alone: {dict(seen)}")
        service.wait()
        assert seen["behind"], "then a copy alone would be safe, and the README wrong"
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", tmp_path / f"both.db{suffix}")
        with contextlib.closing(sqlite3.connect(tmp_path / "both.db")) as connection:
            stored = {row[0] for row in connection.execute("SELECT id FROM receipts")}
        assert set(acknowledged) <= stored
