"""
Many writers at once, on a good disk and on a slow one: no lock error, no long wait, a short WAL.

And what SQLite itself gets wrong when writers and checkpoints meet, which the gate keeps from happening.
`KKT_BUFFER_PROOF=1` goes on for longer.
"""

import contextlib
import json
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest
from builders import PROOF, new_receipt, start_python, together, unproven
from sqlalchemy import event, text
from wal import slow_syncs

from kkt_buffer import ReceiptRepository, create_buffer_engine
from kkt_buffer.backend import READ_ONLY

PROCESSES = 4
THREADS = 8
SECONDS = 20 if PROOF else 5
SLOWER = 0.010  # seconds that each sync of the slow disk takes longer
LONGEST = 3.0
LONGEST_WAL = 5_000_000

# Threads insert for a while, and one reads; told are the calls, the longest one, and what was raised. With `no gate`,
# SQLite's own busy handler is what they have.
TILL = """
import contextlib, json, sys, threading, time
from kkt_buffer import ReceiptRepository, create_buffer_engine
from kkt_buffer.sqlite.gate import WriteGate

path, threads, seconds, fault = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
if fault == "no gate":
    WriteGate.acquire = WriteGate.release = lambda self, holder: None
    WriteGate.held = WriteGate.held_if_free = lambda self: contextlib.nullcontext()
repository = ReceiptRepository(create_buffer_engine(path, busy_timeout=60))
repository.get_buffer_status()
receipt = {"pos_id": "till-1", "fiscal_doc": {"text": "x" * 2000}}
ids, inserts, reads, errors = [], [], [], []
print("ready", flush=True)
sys.stdin.readline()
until = time.monotonic() + seconds

def repeat(work, told):
    while (began := time.monotonic()) < until:
        try:
            work()
        except Exception as error:
            errors.append(str(error))
        told.append(time.monotonic() - began)

def read():
    repository.get_buffer_status()
    time.sleep(0.01)

workers = [
    threading.Thread(target=repeat, args=(lambda: ids.append(repository.insert_receipt(receipt)), inserts))
    for _ in range(threads)
]
workers.append(threading.Thread(target=repeat, args=(read, reads)))
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(json.dumps({"ids": ids, "longest": max(inserts), "read": max(reads), "errors": errors}))
"""


def start(stack, program, *arguments, slow=False):
    """Start a process that waits for its `go`."""
    if slow and not shutil.which("strace"):
        unproven("contention on a slow disk: there is no strace")
    process = stack.enter_context(
        start_python(program, *arguments, stdin=-1, before=slow_syncs(SLOWER) if slow else ())
    )
    stack.callback(process.kill)
    return process


def go(processes):
    for process in processes:
        if process.stdout.readline() != "ready\n":
            unproven("contention on a slow disk: strace is not permitted")
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


class Crowd:
    """Four tills of eight threads on one file; a monitor watches them."""

    def __init__(self, path, *, slow, fault="nothing", seconds=SECONDS):
        self.slow = slow
        monitor = create_buffer_engine(path, read_only=True)
        watcher = ReceiptRepository(monitor)
        wal = Path(f"{path}-wal")
        self.wal, self.watched = 0, 0.0
        with contextlib.ExitStack() as stack:
            tills = [start(stack, TILL, path, THREADS, seconds, fault, slow=slow) for _ in range(PROCESSES)]
            go(tills)
            until = time.monotonic() + seconds
            while (began := time.monotonic()) < until:
                watcher.get_buffer_status()
                self.watched = max(self.watched, time.monotonic() - began)
                self.wal = max(self.wal, wal.stat().st_size)
                time.sleep(0.01)
            told = [json.loads(till.stdout.read()) for till in tills]
        monitor.dispose()
        self.ids = [receipt_id for till in told for receipt_id in till["ids"]]
        self.shares = [len(till["ids"]) for till in told]
        self.longest = max(till["longest"] for till in told)
        self.read = max(self.watched, *(till["read"] for till in told))
        self.errors = [error for till in told for error in till["errors"]]
        print(
            f"{'slow' if slow else 'good'} disk, {fault} wrong: {len(self.ids) / seconds:.0f} inserts/s, by process "
            f"{self.shares}; longest insert {self.longest:.2f} s, longest read {self.read:.2f} s; "
            f"WAL {self.wal / 1e6:.2f} MB; errors {len(self.errors)}"
        )

    def check(self, path):
        assert self.errors == []
        if self.slow:  # on a good disk the machine itself, when it is busy, takes longer than the disk
            assert self.longest <= LONGEST
        assert self.wal <= LONGEST_WAL
        assert self.read <= 1.0
        with contextlib.closing(sqlite3.connect(path)) as connection:
            stored = [row[0] for row in connection.execute("SELECT id FROM receipts")]
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert sorted(self.ids) == sorted(stored)


@pytest.fixture
def wide(path):
    """A buffer on disk that never gets full."""
    own = create_buffer_engine(path)
    ReceiptRepository(own).set_config("buffer_capacity", 1_000_000)
    own.dispose()
    return path


@pytest.mark.slow
class TestWriters:
    @pytest.mark.parametrize("slow", [False, True], ids=["good disk", "slow disk"])
    def test_crowd(self, wide, slow):
        """No lock error reaches a caller, no wait is long, the WAL stays short, and what was acknowledged is there."""
        Crowd(wide, slow=slow).check(wide)

    def test_would_be_found(self, wide):
        """Without the gate the same check fails: SQLite's busy handler starves a writer, or the WAL grows."""
        crowd = Crowd(wide, slow=True, fault="no gate")
        with pytest.raises(AssertionError):
            crowd.check(wide)


@pytest.mark.slow
class TestReaders:
    def test_not_blocked(self, file_repository, path):
        """While a writer keeps the write lock, status and monitor answer at once."""
        monitor = create_buffer_engine(path, read_only=True)

        def read(_number):
            began = time.monotonic()
            own, seen = file_repository.get_buffer_status(), ReceiptRepository(monitor).get_buffer_status()
            return own.pending, seen.pending, time.monotonic() - began

        with file_repository.transaction():
            file_repository.insert_receipt(new_receipt())
            [(own, seen, seconds)] = together(1, read)
        assert (0, 0) == (own, seen)
        assert seconds < 1
        monitor.dispose()

    def insert_under_a_reader(self, path, inserts, *, limit=True):
        """The size of the WAL while a snapshot is kept, and some inserts after it was let go."""
        own = create_buffer_engine(path)
        if not limit:
            event.listen(own, "connect", lambda driver, _: driver.execute("PRAGMA journal_size_limit = -1").fetchone())
            own.dispose()  # the connection that looked at the file has its limit already
        repository = ReceiptRepository(own)
        wal = Path(f"{path}-wal")
        receipt = new_receipt(fiscal_doc={"text": "x" * 2000})
        with own.execution_options(**{READ_ONLY: True}).connect() as reader:
            before = reader.scalar(text("SELECT COUNT(*) FROM receipts"))
            for _ in range(inserts):
                repository.insert_receipt(receipt)
            under = wal.stat().st_size
            assert before == reader.scalar(text("SELECT COUNT(*) FROM receipts"))
        for _ in range(20):
            repository.insert_receipt(receipt)
        after = wal.stat().st_size
        assert repository.get_buffer_status().pending == before + inserts + 20
        own.dispose()
        return under, after

    def test_long_reader(self, wide):
        """
        While a reader keeps its snapshot the WAL grows with every insert; it shrinks as soon as the reader is gone.

        There is no bound but the reader's end: SQLite cannot drop what is being read.
        """
        under, after = self.insert_under_a_reader(wide, 1000)
        print(
            f"long reader: the WAL grew to {under / 1e6:.1f} MB, {under / 1000:.0f} bytes an insert; then {after} bytes"
        )
        assert under < 1000 * 64_000
        assert after <= 1 << 20

    def test_would_be_found(self, wide):
        """Without `journal_size_limit` the file would keep its size."""
        under, after = self.insert_under_a_reader(wide, 300, limit=False)
        assert after >= under > 1 << 20


# Three write, two checkpoint in a loop, with a short WAL, on a file system in memory, which is never waited for.
WRITER = """
import contextlib, sys, time
from sqlalchemy import event
from kkt_buffer import ReceiptRepository, create_buffer_engine
from kkt_buffer.sqlite.gate import WriteGate

path, role, seconds, fault = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
if fault == "no gate":
    WriteGate.acquire = WriteGate.release = lambda self, holder: None
    WriteGate.held = WriteGate.held_if_free = lambda self: contextlib.nullcontext()
engine = create_buffer_engine(path)

@event.listens_for(engine, "connect")
def quick(driver, _):
    driver.execute("PRAGMA synchronous = 0")
    driver.execute("PRAGMA wal_autocheckpoint = 4").fetchone()

engine.dispose()  # the connection that looked at the file is not as quick
repository = ReceiptRepository(engine)
connection = engine.raw_connection().driver_connection
print("ready", flush=True)
sys.stdin.readline()
until = time.monotonic() + seconds
while time.monotonic() < until:
    if role == "writer":
        try:
            print(repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": {"text": "x" * 3000}}))
        except Exception as error:
            print("refused", type(error).__name__)
    else:
        with contextlib.suppress(Exception), connection.database.gate.held():
            connection.execute("PRAGMA wal_checkpoint").fetchone()
"""


FIXED = {(3, 50): (3, 50, 7), (3, 44): (3, 44, 6)}


def assert_not_damaged(path, seconds, fault):
    with contextlib.ExitStack() as stack:
        roles = ["writer"] * 3 + ["checkpointer"] * 2
        processes = [start(stack, WRITER, path, role, seconds, fault) for role in roles]
        go(processes)
        lines = [line.strip() for process in processes for line in process.stdout]
    acknowledged = [line for line in lines if not line.startswith("refused")]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            found = connection.execute("PRAGMA integrity_check").fetchall()
            stored = {row[0] for row in connection.execute("SELECT id FROM receipts NOT INDEXED")}
        except sqlite3.DatabaseError as error:
            pytest.fail(f"damaged: {error}")
    assert found == [("ok",)]
    assert set(acknowledged) <= stored
    assert len(lines) == len(acknowledged) > 0


@pytest.mark.slow
class TestWalReset:
    @pytest.fixture
    def in_memory(self, wide):
        """A copy of the buffer on a file system in memory."""
        shared = Path("/dev/shm")
        if not shared.is_dir():
            unproven("the WAL-reset stress: there is no file system in memory to be quick on")
        with tempfile.TemporaryDirectory(dir=shared) as folder:

            def fresh():
                for file in Path(folder).iterdir():
                    file.unlink()
                return shutil.copy(wide, folder)

            yield fresh

    def test_gate(self, in_memory):
        """Writes and checkpoints behind the gate leave the file whole, on the SQLite that is in use."""
        rounds = 28 if PROOF else 2
        for _ in range(rounds):
            assert_not_damaged(in_memory(), 1.0, "nothing")
        print(f"WAL reset, SQLite {sqlite3.sqlite_version}: {rounds} rounds with the gate, nothing damaged")

    @pytest.mark.skipif(not PROOF, reason="a race that a busy machine may need minutes for; `make proof` shows it")
    def test_would_be_found(self, in_memory):
        """Without the gate an affected SQLite damages the file, or loses what was acknowledged."""
        version = sqlite3.sqlite_version_info
        if version >= (3, 51, 3) or (version[:2] in {(3, 50), (3, 44)} and version >= FIXED[version[:2]]):
            pytest.skip(f"SQLite {sqlite3.sqlite_version} does not have the WAL-reset bug")
        damaged = 0
        for rounds in range(1, 31):
            try:
                assert_not_damaged(in_memory(), 1.0, "no gate")
            except (AssertionError, pytest.fail.Exception) as error:
                damaged += 1
                print(f"WAL reset: round {rounds} without the gate: {str(error).splitlines()[0][:100]}")
                if damaged >= (10 if PROOF else 1):
                    return
        assert damaged
