"""How writers wait for each other: threads of one engine, engines, and processes."""

import threading
import time

import pytest
from builders import new_receipt, run_python, start_python

from kkt_buffer import BufferBusyError, ReceiptBufferError, ReceiptRepository

# Hold a write transaction open until the standard input ends.
HOLD = """
import sys
from kkt_buffer import ReceiptRepository, create_buffer_engine

with ReceiptRepository(create_buffer_engine(sys.argv[1])).transaction() as session:
    session.connection()
    print("held", flush=True)
    sys.stdin.read()
"""

# Insert one receipt, waiting no longer than it is told to.
INSERT = """
import sys
from kkt_buffer import BufferBusyError, ReceiptRepository, create_buffer_engine

engine = create_buffer_engine(sys.argv[1], busy_timeout=float(sys.argv[2]))
try:
    ReceiptRepository(engine).insert_receipt({"pos_id": "till-2", "fiscal_doc": "{}"})
    print("inserted")
except BufferBusyError:
    print("busy")
"""

# Four threads insert until the standard input ends.
HAMMER = """
import sys, threading
from kkt_buffer import ReceiptRepository, create_buffer_engine

repository = ReceiptRepository(create_buffer_engine(sys.argv[1], busy_timeout=60))

def work():
    while True:
        repository.insert_receipt({"pos_id": "till-2", "fiscal_doc": "{}"})
        inserted.set()

inserted = threading.Event()
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
inserted.wait()
print("inserting", flush=True)
sys.stdin.read()
"""


def another_process(path, patience):
    """Whether another process can write now."""
    return run_python(INSERT, path, patience).stdout.strip()


@pytest.fixture
def impatient(path, open_engine):
    return ReceiptRepository(open_engine(path, busy_timeout=0.05))


@pytest.fixture
def patient(path, open_engine):
    return ReceiptRepository(open_engine(path, busy_timeout=60))


def in_thread(function):
    """Run it in a thread of its own; return what it returned, or the error of this package that it raised."""
    results = []

    def run():
        try:
            results.append(function())
        except ReceiptBufferError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return results[0]


class TestThreads:
    def test_timeout(self, impatient):
        """A thread that waited in vain is told so, nothing of it is stored, and its next attempt is not held up."""
        with impatient.transaction() as session:
            session.connection()
            refused = in_thread(lambda: impatient.insert_receipt(new_receipt()))
            assert isinstance(refused, BufferBusyError)
            assert "another thread of this process has kept the write lock" in str(refused)
        assert isinstance(in_thread(lambda: impatient.insert_receipt(new_receipt())), str)
        assert 1 == impatient.get_buffer_status().pending

    def test_own_thread(self, path, open_engine):
        """A second write transaction in one thread would wait for the first for ever: refused at once."""
        engine = open_engine(path, busy_timeout=60)
        repository = ReceiptRepository(engine)
        began = time.monotonic()
        with engine.begin() as connection:
            connection.exec_driver_sql("SELECT COUNT(*) FROM receipts")
            with pytest.raises(BufferBusyError, match="inside a write transaction of this engine already"):
                repository.insert_receipt(new_receipt())
        assert time.monotonic() - began < 30
        repository.insert_receipt(new_receipt())
        assert 1 == repository.get_buffer_status().pending

    def test_patience(self, patient):
        """A thread that waits long enough has its turn when the first has ended."""
        with patient.transaction() as session:
            session.connection()
            inserting = threading.Thread(target=patient.insert_receipt, args=(new_receipt(),))
            inserting.start()
            inserting.join(0.1)
            assert inserting.is_alive()
        inserting.join(30)
        assert 1 == patient.get_buffer_status().pending


class TestProcesses:
    def test_timeout(self, impatient, path):
        """Another process is waited for as long as was asked for, and then named; when it has gone, all is well."""
        with start_python(HOLD, path, stdin=-1) as holder:
            assert holder.stdout.readline() == "held\n"
            for _ in range(3):
                with pytest.raises(BufferBusyError, match="another process has kept the write lock .* for 0.05 s"):
                    impatient.insert_receipt(new_receipt())
            assert 0 == impatient.get_buffer_status().pending  # a reader never waits
            holder.stdin.close()
        assert "inserted" == another_process(path, 10)
        assert 1 == impatient.get_buffer_status().pending

    def test_dead_holder(self, patient, path):
        """A process that is killed in the middle of a write keeps nobody out, neither waiting nor new writers."""
        with start_python(HOLD, path, stdin=-1) as holder:
            assert holder.stdout.readline() == "held\n"
            threading.Timer(0.2, holder.kill).start()
            patient.insert_receipt(new_receipt())
        assert "inserted" == another_process(path, 10)
        assert 2 == patient.get_buffer_status().pending

    def test_fair_enough(self, patient, path):
        """A process that inserts now and then does not starve beside one that inserts all the time."""
        patient.set_config("buffer_capacity", 1_000_000)
        longest = 0.0
        with start_python(HAMMER, path, stdin=-1) as hammer:
            assert hammer.stdout.readline() == "inserting\n"
            for _ in range(30):
                began = time.monotonic()
                patient.insert_receipt(new_receipt())
                longest = max(longest, time.monotonic() - began)
            hammer.kill()
        assert longest < 3

    def test_disposed_inside(self, path, open_engine):
        """An engine that is disposed of inside a transaction keeps the others out until the transaction has ended."""
        engine = open_engine(path)
        pool = engine.pool
        with engine.begin() as connection:
            connection.exec_driver_sql("SELECT COUNT(*) FROM receipts")
            engine.dispose()
            assert "busy" == another_process(path, 0)
        pool.dispose()  # the connection went back to the pool that it came from
        assert "inserted" == another_process(path, 10)
