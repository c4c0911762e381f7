"""
Exceptions that strike between any two steps, and other processes that hang or checkpoint: nothing stays locked.

After an exception out of a signal handler the file is right and nothing acknowledged is lost. No other process is kept
out once the exception has left the call, or this process has ended. Inside this process a later write works, or raises
`BufferBusyError` that advises a restart.
"""

import contextlib
import json
import os
import random
import resource
import signal
import threading
import time

import pytest
from builders import new_receipt, run_python, start_python, unmeasured

from kkt_buffer import BufferBusyError, BufferDamagedError, BufferStorageError, ReceiptRepository

# What all programs below begin with.
PRELUDE = """
import ctypes, faulthandler, json, random, signal, sys, threading, time, uuid
from kkt_buffer import BufferBusyError, ReceiptRepository, create_buffer_engine

signal.signal(signal.SIGINT, signal.default_int_handler)  # a program that was started in the background ignores it
faulthandler.dump_traceback_later(90, exit=True)
repository = ReceiptRepository(create_buffer_engine(sys.argv[1], busy_timeout=5))
repository.set_config("buffer_capacity", 1_000_000)
receipt = {"pos_id": "till-1", "fiscal_doc": "{}"}
acknowledged = []

def write_afterwards():
    "Inserts in the main thread and in a new one; what those said that were refused."
    refusals = []
    def write():
        try:
            for _ in range(3):
                acknowledged.append(repository.insert_receipt(receipt))
        except BufferBusyError as error:
            refusals.append(str(error))
    write()
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(30)
    if thread.is_alive():
        refusals.append("it hangs")
    return refusals

def tell(**more):
    print(json.dumps({"acknowledged": acknowledged, **more}), flush=True)
    sys.stdin.read()
"""

# The main thread is interrupted 300 times in the middle of its inserts, while other threads insert.
INTERRUPTED = """
class TimeLimit(Exception):
    "As the time limits of job runners are."

def interrupt(*_):
    raise TimeLimit

def insert_until_stopped():
    while not stop.is_set():
        acknowledged.append(repository.insert_receipt(receipt))
        time.sleep(0.001)

stop, interrupted, refused = threading.Event(), 0, []
signal.signal(signal.SIGALRM, interrupt if sys.argv[2] == "time limit" else signal.default_int_handler)
threads = [threading.Thread(target=insert_until_stopped, daemon=True) for _ in range(int(sys.argv[3]))]
for thread in threads:
    thread.start()
until = time.monotonic() + 40
while interrupted < 300 and time.monotonic() < until and not refused:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00005 + interrupted % 97 * 0.00002)
        try:
            acknowledged.append(repository.insert_receipt(receipt))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BufferBusyError as error:
        refused.append(str(error))
    except BaseException:  # SQLAlchemy may make something else of it
        interrupted += 1
stop.set()
for thread in threads:
    thread.join(20)
hanging = sum(thread.is_alive() for thread in threads)
tell(interrupted=interrupted, hanging=hanging, refused=refused + write_afterwards())
"""

# Thousands of exceptions are thrown into eight threads in the middle of their inserts; one that dies of it is replaced.
STRUCK = """
class Struck(Exception):
    pass

def insert_until_stopped():
    while not stop.is_set():
        try:
            acknowledged.append(repository.insert_receipt(receipt))
        except BufferBusyError as error:
            refused.append(str(error))
        except BaseException:
            pass

def start():
    thread = threading.Thread(target=insert_until_stopped, daemon=True)
    thread.start()
    started.append(thread)
    return thread

threading.excepthook = lambda _: None
stop, refused, started, strikes = threading.Event(), [], [], 0
threads = [start() for _ in range(8)]
strike = ctypes.pythonapi.PyThreadState_SetAsyncExc
until = time.monotonic() + 30
while strikes < 3000 and time.monotonic() < until and not refused:
    at = random.randrange(len(threads))
    if not threads[at].is_alive():
        threads[at] = start()
    strikes += strike(ctypes.c_ulong(threads[at].ident), ctypes.py_object(Struck))
    time.sleep(random.uniform(0.0005, 0.003))
stop.set()
deadline = time.monotonic() + 30
for thread in started:
    thread.join(max(0.0, deadline - time.monotonic()))
hanging = sum(thread.is_alive() for thread in started)
tell(strikes=strikes, hanging=hanging, refused=refused + write_afterwards())
"""

# Inserts until a signal ends the process; each id is told when it is acknowledged.
ENDED = """
def leave(*_):
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
faulthandler.cancel_dump_traceback_later()
while True:
    print(repository.insert_receipt(receipt), flush=True)
"""

# What another process finds; it writes first, and waits for that.
LOOK = """
import json, sqlite3, sys
from kkt_buffer import ReceiptRepository, create_buffer_engine

engine = create_buffer_engine(sys.argv[1], busy_timeout=10)
repository = ReceiptRepository(engine)
repository.insert_receipt({"pos_id": "till-2", "fiscal_doc": "{}"})
findings = repository.check_integrity().findings
engine.dispose()
connection = sqlite3.connect(sys.argv[1])
ids = [row[0] for row in connection.execute("SELECT id FROM receipts")]
print(json.dumps({"ids": ids, "findings": [text for texts in findings.values() for text in texts]}))
"""


def look(path):
    found = json.loads(run_python(LOOK, path).stdout)
    assert [] == found["findings"]
    return set(found["ids"])


def played(path, program, *arguments):
    """What the program told, and what another process finds while that program still runs."""
    environment = unmeasured()  # coverage has a lock of its own, which an exception can leave locked
    with start_python(PRELUDE + program, path, *arguments, stdin=-1, env=environment) as process:
        told = json.loads(process.stdout.readline() or "{}")
        assert told, "the process has hung"
        found = look(path)
        process.kill()
    assert 0 == told["hanging"]
    assert set(told["acknowledged"]) <= found
    assert [] == [refusal for refusal in told["refused"] if "restart" not in refusal]
    return told


class TestSignals:
    @pytest.mark.parametrize("threads", [0, 4])
    @pytest.mark.parametrize("kind", ["time limit", "control-C"])
    def test_survived(self, path, kind, threads):
        """Exceptions out of a handler, in a process that goes on."""
        told = played(path, INTERRUPTED, kind, threads)
        assert told["interrupted"] == 300 or told["refused"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["control-C", "sys.exit in a handler"])
    def test_ended(self, path, number):
        """A signal that ends the process in the middle of its inserts: what it has told of is there, and it ends."""
        chance = random.Random(number)
        for _ in range(4):
            with start_python(PRELUDE + ENDED, path, stderr=-1) as process:
                acknowledged = [process.stdout.readline().strip()]
                threading.Timer(chance.uniform(0.05, 0.2), process.send_signal, [number]).start()
                out, _ = process.communicate(timeout=60)
                # The last line may have been cut by the exception.
                acknowledged += [line for line in out.split("\n")[:-1] if line]
            assert process.returncode in {0, 1, 130, -signal.SIGINT}
            assert set(acknowledged) <= look(path)


class TestThreads:
    def test_struck(self, path):
        """Exceptions thrown into threads, as a debugger or a runner's thread time limit does."""
        told = played(path, STRUCK)
        assert told["strikes"] >= 2000 or told["refused"]


# A process that hangs with the gate in its hand.
HUNG = """
import fcntl, sys
gate = open(sys.argv[1] + "-gate", "a")
fcntl.flock(gate, fcntl.LOCK_EX)
print("hung", flush=True)
sys.stdin.read()
"""

CHECKPOINT = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
print(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
"""


def descriptors():
    return len(os.listdir("/proc/self/fd"))


class TestHungProcess:
    def test_nothing_piles_up(self, path, open_engine):
        """Writers that time out at the gate of a hung process leave no threads and no descriptors behind."""
        engine = open_engine(path, busy_timeout=0.02)
        repository = ReceiptRepository(engine)
        repository.insert_receipt(new_receipt())
        with start_python(HUNG, path, stdin=-1) as hung:
            assert hung.stdout.readline() == "hung\n"
            threads, files = threading.active_count(), descriptors()
            for _ in range(50):
                with pytest.raises(BufferBusyError, match="another process"):
                    repository.insert_receipt(new_receipt())
            assert threading.active_count() <= threads + 1
            assert descriptors() <= files + 2
            hung.kill()
        patient = ReceiptRepository(open_engine(path, busy_timeout=30))
        patient.insert_receipt(new_receipt())
        assert 2 == patient.get_buffer_status().pending
        assert 3 == len(look(path))


def bytes_read():
    with open("/proc/self/io") as counters:
        return int(counters.readline().split()[1])


@contextlib.contextmanager
def no_descriptors():
    """As long as the block lasts, no file can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class TestCheckpointOfAnotherProcess:
    @pytest.fixture
    def large(self, file_engine):
        """A buffer of some megabytes, in use."""
        repository = ReceiptRepository(file_engine)
        for _ in range(40):
            repository.insert_receipt(new_receipt(fiscal_doc={"text": "x" * 100_000}))
        repository.get_buffer_status()
        return repository

    def test_not_read_whole(self, large, path):
        """A WAL that another process has cut is no reason to read the whole file."""
        for _ in range(3):
            large.insert_receipt(new_receipt())
            assert run_python(CHECKPOINT, path).stdout.startswith("(0, ")
            assert os.path.getsize(f"{path}-wal") == 0
            before = bytes_read()
            large.insert_receipt(new_receipt())
            large.get_buffer_status()
            large.mark_synced(large.insert_receipt(new_receipt()), int(time.time()))
            assert bytes_read() - before < os.path.getsize(path) / 4
        assert 46 == large.get_buffer_status().pending

    def test_no_descriptor(self, large, path):
        """A process that cannot open one more file at that moment says nothing of damage, and goes on afterwards."""
        assert run_python(CHECKPOINT, path).stdout.startswith("(0, ")
        refusals = []
        with no_descriptors():
            try:
                large.insert_receipt(new_receipt())
            except BufferStorageError as error:
                refusals.append(type(error))
        assert BufferDamagedError not in refusals
        large.insert_receipt(new_receipt())
        assert 42 - len(refusals) == large.get_buffer_status().pending
