"""Threads and processes on one buffer: nothing lost, doubled or out of order, and the capacity is never exceeded."""

import contextlib
import subprocess
import sys
from pathlib import Path

import predecessor
import pytest
from builders import (
    PROOF,
    another_program,
    checkouts,
    is_server,
    new_receipt,
    open_files,
    run_python,
    start_python,
    together,
)

from kkt_buffer import BufferFullError

ROOT = Path(__file__).parents[2]
THREADS = 16
PROCESSES = 4
ROUNDS = 50 if PROOF else 1  # of those that start together

# Four threads insert until the buffer is full or enough is done, and print each id once it is acknowledged. The wall
# clock of every process is another one, and jumps.
TILL = """
import random, sys, threading, time
from kkt_buffer import BufferFullError, ReceiptRepository, create_buffer_engine

path, threads, each, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)
repository = ReceiptRepository(create_buffer_engine(path), now=lambda: time.time() + chance.choice((-3600, 0, 0, 7)))
sys.stdin.readline()

def work():
    for number in range(each):
        try:
            receipt_id = repository.insert_receipt({"pos_id": f"till-{seed}", "fiscal_doc": {"n": number}})
        except BufferFullError:
            return
        print(receipt_id + "\\n", end="", flush=True)  # in one piece, as they print at the same moment

workers = [threading.Thread(target=work) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
"""


def sell(buffer, threads, each):
    """Let the processes insert at the same time; return the ids that they acknowledged."""
    with contextlib.ExitStack() as stack:
        tills = [
            stack.enter_context(start_python(TILL, buffer, threads, each, seed, stdin=-1)) for seed in range(PROCESSES)
        ]
        for till in tills:
            till.stdin.write("go\n")
            till.stdin.flush()
        acknowledged = [line.strip() for till in tills for line in till.stdout]
        assert [0] * PROCESSES == [till.wait() for till in tills]
    return acknowledged


def stored(buffer):
    """Ids and timestamps in the order of commits, read by a program of its own: of SQLite, by rowid."""
    if is_server(buffer):
        with another_program(buffer) as db:
            rows = db.execute(
                "SELECT id, hlc_local_time, hlc_logical_counter FROM receipts"
                # Those that shared a commit come in their own order.
                " ORDER BY pg_xact_commit_timestamp(xmin), hlc_local_time, hlc_logical_counter"
            ).fetchall()
        return [row[0] for row in rows], [row[1:] for row in rows]
    program = """
        import contextlib, sqlite3, sys
        with contextlib.closing(sqlite3.connect(sys.argv[1])) as db:
            rows = db.execute("SELECT id, hlc_local_time, hlc_logical_counter FROM receipts ORDER BY rowid").fetchall()
        print(*("|".join(map(str, row)) for row in rows), sep="\\n")
    """
    lines = run_python(program, buffer).stdout.split()
    rows = [line.split("|") for line in lines]
    return [row[0] for row in rows], [(int(row[1]), int(row[2])) for row in rows]


def in_use_by(buffer):
    """What this process has open of a file; of a server, which no other process of the run uses, the connections."""
    if not is_server(buffer):
        return open_files(buffer)
    with another_program(buffer) as db:
        return db.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'").fetchone()


def assert_all_there(buffer, acknowledged):
    ids, stamps = stored(buffer)
    assert sorted(acknowledged) == sorted(ids)
    assert len(ids) == len(set(ids))
    assert sorted(set(stamps)) == stamps


STARTER = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from kkt_buffer import buffer
sys.stdin.readline()
buffer.init_buffer_db(sys.argv[1])
print("id", buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"}))
"""


def assert_started_together(buffer):
    with contextlib.ExitStack() as stack:
        starters = [
            stack.enter_context(start_python(STARTER, buffer, stdin=-1, stderr=subprocess.PIPE)) for _ in range(6)
        ]
        for starter in starters:
            starter.stdin.write("go\n")
            starter.stdin.flush()
        said = [starter.communicate() for starter in starters]
    lines = [line.split() for out, _ in said for line in out.splitlines()]
    acknowledged = [line[1] for line in lines if line[0] == "id"]
    assert len(acknowledged) == 6, said
    assert sum(line[:3] == ["upgraded", "the", "schema"] for line in lines) == 1
    ids, stamps = stored(buffer)
    assert sorted(ids[-6:]) == sorted(acknowledged)
    assert sorted(set(stamps[-6:])) == stamps[-6:]


@pytest.mark.slow
class TestProcesses:
    def test_nothing_lost(self, buffer, shared_repository):
        """Four processes of four threads each: every acknowledged receipt is there, once, and HLC follows commits."""
        shared_repository.set_config("buffer_capacity", 10_000)
        acknowledged = sell(buffer, threads=4, each=25)
        assert len(acknowledged) == PROCESSES * 4 * 25
        assert_all_there(buffer, acknowledged)

    def test_last_places(self, buffer):
        """Racing for the last places, they fill the buffer to the last one and not beyond."""
        acknowledged = sell(buffer, threads=4, each=25)
        assert len(acknowledged) == 200
        assert_all_there(buffer, acknowledged)

    def test_same_receipt(self, buffer):
        """The same receipt sent by all of them at once is stored once."""
        program = """
            import sys
            from kkt_buffer import ReceiptRepository, create_buffer_engine
            repository = ReceiptRepository(create_buffer_engine(sys.argv[1]))
            sys.stdin.readline()
            for number in range(50):
                own = f"123e4567-e89b-42d3-a456-{number:012}"
                print(repository.insert_receipt({"id": own, "pos_id": "t", "fiscal_doc": "{}"}, exist_ok=True))
        """
        with contextlib.ExitStack() as stack:
            tills = [stack.enter_context(start_python(program, buffer, stdin=-1)) for _ in range(PROCESSES)]
            for till in tills:
                till.stdin.write("go\n")
                till.stdin.flush()
            said = [till.stdout.read().split() for till in tills]
        assert [said[0]] * PROCESSES == said
        assert said[0] == stored(buffer)[0]

    @pytest.mark.parametrize("before", ["nothing", "an old one", "of the sqlite3 version"])
    def test_start_together(self, tmp_path, before):
        """Six processes that open one buffer at once all succeed, and one of them makes or migrates it."""
        for number in range(ROUNDS):
            path = tmp_path / f"{number}" / "buffer.db"
            if before != "nothing":
                path.parent.mkdir()
                predecessor.make(path, 30) if before != "an old one" else self.an_old_one(path)
            assert_started_together(path)

    def test_start_together_on_a_server(self, server):
        """So do six that open one schema."""
        for _ in range(ROUNDS):
            with server.schema() as schema:
                assert_started_together(server.url(schema=schema))

    @staticmethod
    def an_old_one(path):
        alembic = [sys.executable, "-m", "alembic", "-x", f"db={path}", "upgrade", "0001"]
        subprocess.run(alembic, cwd=ROOT, capture_output=True, check=True, timeout=60)


class TestThreads:
    def test_nothing_lost(self, shared_repository, shared_engine, buffer):
        """Sixteen threads on one repository: every acknowledged receipt is there, once, in HLC order."""
        shared_repository.set_config("buffer_capacity", 10_000)

        def work(number):
            return [shared_repository.insert_receipt(new_receipt(pos_id=f"till-{number}")) for _ in range(20)]

        acknowledged = [receipt_id for ids in together(THREADS, work) for receipt_id in ids]
        shared_engine.dispose()
        assert len(acknowledged) == THREADS * 20
        assert_all_there(buffer, acknowledged)

    def test_last_places(self, shared_repository):
        """Capacity is exact under threads, for single receipts and for batches."""
        shared_repository.set_config("buffer_capacity", 50)

        def work(number):
            with contextlib.suppress(BufferFullError):
                for _ in range(10):
                    if number % 2:
                        shared_repository.insert_receipts([new_receipt(), new_receipt(), new_receipt()])
                    else:
                        shared_repository.insert_receipt(new_receipt())

        together(THREADS, work)
        status = shared_repository.get_buffer_status()
        # A batch of three may find less room than it needs; a single receipt never leaves any.
        assert status.pending == 50

    def test_mixed(self, shared_repository):
        """Readers and writers of every kind side by side; the books balance in the end."""

        def work(number):
            for _ in range(5):
                receipt_id = shared_repository.insert_receipt(new_receipt())
                shared_repository.get_pending_receipts(5)
                shared_repository.update_receipt_status(receipt_id, "syncing")
                if number % 2:
                    shared_repository.mark_synced(receipt_id, number)
                else:
                    shared_repository.move_to_dlq(receipt_id, "rejected")
                shared_repository.get_buffer_status()
                shared_repository.get_events(3)

        together(THREADS, work)
        status = shared_repository.get_buffer_status()
        half = THREADS // 2 * 5
        assert (0, 0, half, half, half) == (
            status.pending,
            status.syncing,
            status.synced,
            status.failed,
            status.dlq_size,
        )

    def test_short_lived(self, buffer, shared_repository):
        """A thousand short-lived threads leave no connection, transaction or file open behind them."""
        shared_repository.set_config("buffer_capacity", 10_000)
        shared_repository.insert_receipt(new_receipt())
        before = in_use_by(buffer)
        with checkouts() as in_use:
            for _ in range(1000):
                together(1, lambda _: shared_repository.insert_receipt(new_receipt()))
            assert [] == in_use
        assert before == in_use_by(buffer)
        assert shared_repository.get_buffer_status().pending == 1001
