"""
Hosts whose clocks differ by hours: the order of commits, the capacity and the leases are the database's.

The clock of a host is set before anything is imported there, as if the machine's own were wrong.
"""

import subprocess
import threading
import time
from collections import Counter
from itertools import groupby, pairwise

import pytest
from builders import start_python
from postgresql.cluster import migrate
from servers import Server
from sqlalchemy import text

HOURS = (-2, -0.5, 0, 1)  # one host each
THREADS = 8
CAPACITY = 100
SECONDS = 4

# Arguments: the URL, the hours that its clock is wrong, threads, and whether the repository is given the clock. Lines:
# "stored" or "sent", and the receipt. With a given clock it fills the buffer; else it sells and delivers until it is
# told to stop, and goes on delivering until the end of its standard input.
HOST = """
import sys, threading, time
right, hours = time.time, float(sys.argv[2])
time.time = lambda: right() + hours * 3600

from kkt_buffer import BufferFullError, DeliveryWorker, ReceiptRepository, create_buffer_engine

url, threads, is_given = sys.argv[1], int(sys.argv[3]), sys.argv[4] == "given"
repository = ReceiptRepository(create_buffer_engine(url), **({"now": time.time} if is_given else {}))
repository.get_buffer_status()
stopping = threading.Event()

def say(*words):
    print(" ".join(words) + "\\n", end="", flush=True)  # in one piece, as they print at the same moment

def sell():
    while is_given or not stopping.is_set():
        try:
            say("stored", repository.insert_receipt({"pos_id": f"host{hours}", "fiscal_doc": "{}"}))
        except BufferFullError:
            if is_given:
                return
            stopping.wait(0.2)

def send(receipt):
    say("sent", receipt.id)
    return 5

sellers = [threading.Thread(target=sell) for _ in range(threads)]
worker = DeliveryWorker(repository, send, batch=5, poll_seconds=0.02)
say("ready")
sys.stdin.readline()
for seller in sellers:
    seller.start()
if not is_given:
    worker.start()
sys.stdin.readline()
stopping.set()
for seller in sellers:
    seller.join()
say("full")
sys.stdin.read()
if not is_given:
    worker.stop()
"""

UNDELIVERED = "SELECT count(*) FROM receipts WHERE status IN ('pending', 'syncing')"
# Of each transaction that added receipts, in the order of their commits: the timestamps of its receipts. The row of a
# receipt is changed by its delivery; the event of its insertion never is.
ADDED = """
    SELECT pg_xact_commit_timestamp(buffer_events.xmin) AS committed, hlc_local_time, hlc_logical_counter
    FROM buffer_events JOIN receipts ON receipts.id = buffer_events.receipt_id
    WHERE event_type = 'receipt_added' ORDER BY committed, hlc_local_time, hlc_logical_counter
"""


@pytest.fixture(scope="module")
def timed_server():
    with Server() as server:
        yield server


@pytest.fixture
def url(timed_server):
    timed_server.execute("DROP SCHEMA public CASCADE")
    timed_server.execute("CREATE SCHEMA public")
    migrate(timed_server.url())
    return timed_server.url()


@pytest.fixture
def repository(url, open_repository):
    repository = open_repository(url)
    repository.set_config("buffer_capacity", CAPACITY)
    repository.set_config("lease_seconds", 600)  # whoever takes a receipt twice has read another clock
    return repository


class Hosts:
    """One process for each clock."""

    def __init__(self, url, clock):
        self._processes = [start_python(HOST, url, hours, THREADS, clock, stdin=subprocess.PIPE) for hours in HOURS]
        self.lines = []
        self._readers = [threading.Thread(target=self._read, args=[process]) for process in self._processes]
        for reader in self._readers:
            reader.start()
        self.wait_for("ready")

    def tell(self, word):
        for process in self._processes:
            process.stdin.write(f"{word}\n")
            process.stdin.flush()

    def wait_for(self, word):
        deadline = time.monotonic() + 60
        while self.lines.count([word]) < len(HOURS):
            assert time.monotonic() < deadline, f"not every host has said {word!r}"
            time.sleep(0.01)

    def end(self):
        for process in self._processes:
            process.stdin.close()
        assert [0] * len(HOURS) == [process.wait(timeout=60) for process in self._processes]
        for reader in self._readers:
            reader.join()
        for process in self._processes:
            process.stdout.close()

    def receipts(self, word):
        return [line[1] for line in self.lines if line[0] == word]

    def _read(self, process):
        for line in process.stdout:
            self.lines.append(line.split())


def assert_in_order(engine):
    """The timestamps of each transaction are after those of every transaction that was committed before it."""
    with engine.connect() as connection:
        rows = connection.execute(text(ADDED)).all()
    together = [
        [(row.hlc_local_time, row.hlc_logical_counter) for row in added]
        for _, added in groupby(rows, key=lambda row: row.committed)
    ]
    assert all(max(earlier) < min(later) for earlier, later in pairwise(together))
    assert len(rows) == len({stamp for stamps in together for stamp in stamps})


@pytest.mark.slow
@pytest.mark.one_python
class TestClocks:
    def test_wrong(self, timed_server, url, repository):
        """Eight threads and a worker on each host: the capacity is never exceeded, and nothing is claimed twice."""
        hosts = Hosts(url, "the database's")
        hosts.tell("go")
        deadline, counts = time.monotonic() + SECONDS, []
        with repository.engine.connect() as connection:
            while time.monotonic() < deadline:
                counts.append(connection.scalar(text(UNDELIVERED)))
                connection.rollback()
        hosts.tell("stop")
        hosts.wait_for("full")
        while (status := repository.get_buffer_status()).pending or status.syncing:
            time.sleep(0.05)
        hosts.end()
        stored, sent = hosts.receipts("stored"), Counter(hosts.receipts("sent"))
        print(f"\n{len(stored)} receipts of {len(HOURS)} hosts, at most {max(counts)} of {CAPACITY} at one moment")
        assert CAPACITY // 2 < max(counts) <= CAPACITY
        assert Counter(stored) == sent
        assert [(0,)] == timed_server.execute("SELECT sum(deadlocks) FROM pg_stat_database")
        assert_in_order(repository.engine)

    def test_given(self, timed_server, url, repository):
        """Hosts that give their own, wrong time keep the order, and fill the buffer to its last place."""
        repository.set_config("buffer_capacity", 5 * CAPACITY)
        hosts = Hosts(url, "given")
        hosts.tell("go")
        hosts.tell("stop")
        hosts.wait_for("full")
        hosts.end()
        assert 5 * CAPACITY == repository.get_buffer_status().pending
        assert 5 * CAPACITY == len(hosts.receipts("stored"))
        assert_in_order(repository.engine)
