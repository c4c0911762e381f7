"""
Other queues over SQLite, beside ours: persist-queue, litequeue and huey's storage; and plain `sqlite3`, our floor.

All of them are set to WAL and synchronous=FULL, read back from the connection that they write with, and commit once
for each message; everything else is as they come (they let the WAL grow to 1,000 pages before a checkpoint, ours and
the floor to 100). The payload is our 2 KB document, as text or bytes. They use Python's own `sqlite3`, as ours does
unless the extra `sqlite` is installed. Their threads share one queue and its one connection (one litequeue
for each thread was slower); the floor's have one connection each and SQLite's busy handler.

To claim and acknowledge 50 takes 51 commits here, which lease the batch and record each delivery; 100 in persist-queue
and litequeue, which take a message at a time; 50 in huey, which has no acknowledgement: what is taken is deleted, and a
worker that dies has lost it. What a worker of ours with 16 senders delivers stands beside a peer that does nothing but
claim and acknowledge. They keep few messages here, as they search among them all: what was put is deleted
between the rounds, off the clock, and claims have a queue of their own with 50 in it. Ours keeps it all.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product

from figures import Row, at_once, block, figures, interleaved, rate
from ours_and_floor import BATCH, Floor, Ours, documents
from worker import SENDERS, Worker

try:
    from huey.storage import SqliteStorage
    from litequeue import LiteQueue
    from persistqueue import SQLiteAckQueue
except ImportError as error:
    raise SystemExit(
        f"The peers are not installed ({error}): use `make bench`, or leave them out with --only."
    ) from error

TITLE, REFERENCE = "other queues over SQLite", "theirs"

THREADS = (1, 4, 8, 16)
FLOOR = "plain sqlite3"


class PersistQueue:
    name = "persist-queue"

    def __init__(self, folder):
        self.queue = SQLiteAckQueue(str(folder / "persist-queue"), multithreading=True)
        self.connection = self.queue._putter
        self.connection.execute("PRAGMA synchronous = FULL")
        self.documents = cycle([*documents()])

    def insert(self):
        self.queue.put(next(self.documents))

    def claim_and_ack(self):
        for message in [self.queue.get(block=False, raw=True) for _ in range(BATCH)]:
            self.queue.ack(id=message["pqid"])

    def clear(self):
        with self.connection:
            self.connection.execute("DELETE FROM ack_queue_default")

    def close(self):
        self.queue.close()


class Lite:
    name = "litequeue"

    def __init__(self, folder):
        self.queue = LiteQueue(folder / "litequeue.db")
        self.connection = self.queue.conn
        self.connection.execute("PRAGMA synchronous = FULL")
        self.documents = cycle([*documents()])

    def insert(self):
        self.queue.put(next(self.documents))

    def claim_and_ack(self):
        for message in [self.queue.pop() for _ in range(BATCH)]:
            self.queue.done(message.message_id)

    def clear(self):
        self.connection.execute("DELETE FROM Queue")

    def close(self):
        self.queue.close()


class Huey:
    name = "huey"

    def __init__(self, folder):
        self.storage = SqliteStorage(filename=str(folder / "huey.db"), fsync=True)
        self.connection = self.storage.conn
        self.documents = cycle([document.encode() for document in documents()])

    def insert(self):
        self.storage.enqueue(next(self.documents))

    def claim_and_ack(self):
        for message in [self.storage.dequeue() for _ in range(BATCH)]:
            assert message

    def clear(self):
        self.storage.flush_queue()

    def close(self):
        self.storage.close()


PEERS = (PersistQueue, Lite, Huey)
NAMES = [peer.name for peer in PEERS]
OURS = "ours"


def rows(folder, scale):
    found = measured(folder, scale.rounds)
    goals = {1: 0.75, 16: 4} if scale.till else {}
    for threads, name in product(THREADS, (FLOOR, *NAMES)):
        told = "1 thread" if threads == 1 else f"{threads} threads"
        ours, theirs = rate(found[threads, OURS]), rate(found[threads, name])
        goal = None if name == FLOOR else goals.get(threads)
        point = threads, name
        yield Row(f"insert, {told}: {name}", "receipts/s", ours, theirs, goal, at_least=True, point=point)
    for name in NAMES:
        ours, theirs = found["claim", OURS], found["claim", name]
        yield Row(f"claim and ack of {BATCH}, per receipt: {name}", "µs", ours, theirs, scale.on_good(1))
    delivered = rate(found["deliver", OURS])
    for name in NAMES:
        goal, theirs = 4 if scale.till else None, rate(found["claim", name])
        yield Row(f"a worker, {SENDERS} senders: {name}", "receipts/s", delivered, theirs, goal, at_least=True)
    goal = scale.on_good(1000)
    yield Row(f"a worker, {SENDERS} senders", "receipts/s", delivered, budget=goal, at_least=True, absolute=True)


def measured(folder, rounds):
    """The figures of each side, by the number of threads that insert, or what else is done."""
    inserts = {OURS: Ours(folder / "beside-peers.db"), FLOOR: Floor(folder / "floor-beside-peers.db")}
    claims = {OURS: Ours(folder / "claimed-beside-peers.db")}
    for kind, sides in (("put", inserts), ("claimed", claims)):
        (folder / kind).mkdir()
        sides |= {peer.name: peer(folder / kind) for peer in PEERS}
    for name in NAMES:
        assert_durable(inserts[name])
        assert_durable(claims[name])
    worker = Worker(folder / "delivered-beside-peers.db")
    with ThreadPoolExecutor(max(THREADS)) as pool:
        blocks = {}
        for threads, (name, side) in product(THREADS, inserts.items()):
            after = getattr(side, "clear", None)
            blocks[threads, name] = at_once(pool, threads, side.insert, 10 if threads > 1 else 20, after=after)
        for name, side in claims.items():
            fill(side)
            after = functools.partial(fill, side)
            blocks["claim", name] = block(side.claim_and_ack, 1, receipts=BATCH, after=after)
        blocks["deliver", OURS] = worker.block()
        taken = interleaved(blocks, rounds)
    for side in (*inserts.values(), *claims.values(), worker):
        side.close()
    return {key: figures(found) for key, found in taken.items()}


def fill(side):
    """Have 50 messages in a queue that is claimed from, and no others."""
    if isinstance(side, Ours):
        side.insert_batch()
    else:
        side.clear()
        for _ in range(BATCH):
            side.insert()


def assert_durable(peer):
    """WAL and FULL on the connection that writes, and a message is committed when the call returns."""
    settings = [peer.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2], (peer.name, settings)
    commits = []
    peer.connection.set_trace_callback(lambda statement: commits.append(statement.split()[0].upper() == "COMMIT"))
    peer.insert()
    peer.connection.set_trace_callback(None)
    assert sum(commits) <= 1, (peer.name, "more than one commit")  # none: a statement that commits by itself
    assert not peer.connection.in_transaction, peer.name
