"""
What other code of the same process does to SQLite's locks: forks, and copies of the open file.

POSIX locks belong to the process: a `shutil.copy` of the open database cancels them. Nothing may be acknowledged that
another process cannot read, and no lock may be inherited.
"""

import contextlib
import os
import signal

import pytest
from builders import new_receipt, run_python, start_python, unmeasured

from kkt_buffer import ReceiptRepository, create_buffer_engine

# A hundred inserts; after the second, the file is copied, and another process opens the buffer and closes it again.
COPIED = """
import logging, shutil, sqlite3, subprocess, sys
from kkt_buffer import BufferStorageError, ReceiptRepository, create_buffer_engine
from kkt_buffer.sqlite.connection import Files

path, fault = sys.argv[1:]
logging.disable()  # which SQLite it is
OTHER = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT 1 FROM receipts'); c.close()"
if fault == "no comparison":
    Files.before = Files.after = lambda self, *_, **__: None
if fault == "plain":
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE receipts (id)")
else:
    repository = ReceiptRepository(create_buffer_engine(path))

def insert(number):
    if fault == "plain":
        connection.execute("INSERT INTO receipts VALUES (?)", [number])
        return number
    return repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})

for number in range(100):
    try:
        print(insert(number), flush=True)
    except BufferStorageError as error:
        print(error, file=sys.stderr)
    if number == 1:
        shutil.copy(path, path + ".copy")
        subprocess.run([sys.executable, "-c", OTHER, path], check=True)
input()
"""


def ids(path):
    """What a process finds that comes now."""
    program = """
        import sqlite3, sys
        print(*(row[0] for row in sqlite3.connect(sys.argv[1]).execute("SELECT id FROM receipts")), sep="\\n")
    """
    return run_python(program, path).stdout.split()


def acknowledged_and_visible(path, fault, inserts=100):
    with start_python(COPIED, path, fault, stdin=-1, stderr=-1) as process:
        acknowledged = []
        while len(acknowledged) < inserts and not (len(acknowledged) == 2 and fault == "nothing"):
            acknowledged.append(process.stdout.readline().strip())
        if fault == "nothing":
            told = [process.stderr.readline() for _ in range(90)]
            assert all("was deleted or replaced while it was in use" in line for line in told)
        visible = ids(path)
        process.stdin.write("\n")
        process.stdin.flush()
        acknowledged += process.stdout.read().split()
    return acknowledged, visible


class TestCopies:
    def test_driver_loses(self, tmp_path):
        """The driver alone acknowledges a hundred rows of which another process sees two."""
        acknowledged, visible = acknowledged_and_visible(tmp_path / "plain.db", "plain")
        assert (100, 2) == (len(acknowledged), len(visible))

    def test_comparison_is_needed(self, path):
        """So would this package, if it did not compare the open files with those on disk."""
        acknowledged, visible = acknowledged_and_visible(path, "no comparison")
        print(f"without the comparison: {len(acknowledged)} acknowledged, {len(visible)} visible to another process")
        assert len(acknowledged) == 100 > len(visible)

    def test_noticed(self, path):
        """With it, nothing is acknowledged any more from that moment on, and nothing is lost; a restart goes on."""
        acknowledged, visible = acknowledged_and_visible(path, "nothing")
        assert len(acknowledged) == 2
        assert sorted(acknowledged) == sorted(visible)
        own = create_buffer_engine(path)
        ReceiptRepository(own).insert_receipt(new_receipt())
        assert ReceiptRepository(own).get_buffer_status().pending == 3
        own.dispose()


START = """
import os, sys, threading, time
from kkt_buffer import BufferStorageError, buffer

path = os.environ["BUFFER_DB_PATH"] = sys.argv[1]
receipt = {"pos_id": "till-1", "fiscal_doc": "{}"}

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def insert(times):
    for _ in range(times):
        try:
            say("kept", buffer.insert_receipt(receipt))
        except BufferStorageError as error:
            assert "at the moment of the fork" in str(error), error
            say("refused")

def fork(work, *arguments):
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException as error:
            say("error", repr(error))
            os._exit(1)
    return child

buffer.init_buffer_db(path)
buffer.set_config("buffer_capacity", 100_000)
buffer.insert_receipt(receipt)
buffer.get_pending_receipts()
"""


def run(program, path):
    """What the parent and its children said: kept ids, how many refusals, and all of it is on disk."""
    # Coverage has a database of its own: a child that was forked while a thread was inside SQLite hangs in it.
    lines = run_python(START + program, path, env=unmeasured()).stdout.split("\n")
    assert [line for line in lines if line.startswith("error")] == []
    kept = [line.split()[1] for line in lines if line.startswith("kept")]
    found = ids(path)
    assert set(kept) <= set(found)
    assert len(kept) == len(set(kept))
    assert len(found) == len(kept) + 1  # the parent's first
    return len(kept), lines.count("refused")


class TestForks:
    def test_prefork(self, path):
        """Workers that are forked from a parent that has used the buffer, as gunicorn may do it, all go on."""
        program = """
def work():
    threads = [threading.Thread(target=insert, args=(25,)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

workers = [fork(work) for _ in range(4)]
insert(25)
assert [0] * 4 == [os.waitpid(worker, 0)[1] for worker in workers]
"""
        assert (425, 0) == run(program, path)

    def test_multiprocessing(self, path):
        """So do those of `multiprocessing`, with results that come back, and an ordinary exit."""
        program = """
import multiprocessing

def one(_):
    return buffer.insert_receipt(receipt)

with multiprocessing.get_context("fork").Pool(3) as pool:
    for receipt_id in pool.map(one, range(60)):
        say("kept", receipt_id)
    pool.close()
    pool.join()
insert(5)
"""
        assert (65, 0) == run(program, path)

    def test_parent_closes(self, path):
        """A parent that closes while its children work takes nothing from them, nor one that exits first."""
        program = """
first = fork(insert, 100)
buffer.close_buffer_db()
second = fork(insert, 100)
buffer.insert_receipts([])
buffer.close_buffer_db()
assert [0, 0] == [os.waitpid(worker, 0)[1] for worker in (first, second)]
"""
        assert (200, 0) == run(program, path)

    @pytest.mark.slow
    def test_busy_parent(self, path):
        """Forks while other threads write: each child inserts or is refused, and what was acknowledged is there."""
        program = """
stop = threading.Event()

def busy():
    while not stop.is_set():
        insert(1)

threads = [threading.Thread(target=busy) for _ in range(3)]
[thread.start() for thread in threads]
for _ in range(40):
    worker = fork(insert, 2)
    assert os.waitpid(worker, 0)[1] == 0
stop.set()
[thread.join() for thread in threads]
"""
        kept, refused = run(program, path)
        print(f"forks of a busy parent: {kept} kept, {refused // 2} of 40 children refused")
        assert kept > 40
        assert refused

    @pytest.mark.slow
    def test_no_inherited_lock(self, path):
        """
        A child that was forked while its parent queued for the gate does not keep it when the parent is killed later.

        The lock of a dead process is free only when nobody has a copy of its descriptor.
        """
        program = """
def die():
    with buffer.transaction():
        buffer.insert_receipt(receipt)
        say("inside", os.getpid())
        time.sleep(60)

say("ready")
sys.stdin.readline()
waiter = threading.Thread(target=die, daemon=True)
waiter.start()
time.sleep(0.3)  # it is in the kernel's queue now
child = fork(time.sleep, 60)
say("forked", child)
time.sleep(60)
"""
        with contextlib.ExitStack() as stack:
            parent = stack.enter_context(start_python(START + program, path, stdin=-1))
            stack.callback(parent.kill)
            own = create_buffer_engine(path, busy_timeout=2)
            stack.callback(own.dispose)
            repository = ReceiptRepository(own)
            assert parent.stdout.readline() == "ready\n"
            with repository.transaction():
                repository.insert_receipt(new_receipt())
                parent.stdin.write("go\n")
                parent.stdin.flush()
                word, child = parent.stdout.readline().split()
                assert word == "forked"
                stack.callback(os.kill, int(child), signal.SIGKILL)
            assert parent.stdout.readline().startswith("inside")
            parent.kill()
            parent.wait()
            repository.insert_receipt(new_receipt())
            assert repository.get_buffer_status().pending == 3
