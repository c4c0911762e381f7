"""
Other durable queues over SQLite, beside ours: persist-queue, litequeue and huey's storage.

All of them are set to WAL and synchronous=FULL, read back from the connection that they write with, and commit once
for each message; everything else is as they come (they let the WAL grow to 1,000 pages before a checkpoint, we to 100).
The payload is our 2 KB document, as text or bytes. They use Python's own `sqlite3`, as ours does unless the extra
`sqlite` is installed.

To claim and acknowledge 50 takes 51 commits here, which lease the batch and record each delivery; 100 in persist-queue
and litequeue, which take a message at a time; 50 in huey, which has no acknowledgement: what is taken is deleted, and a
worker that dies has lost it. They keep few messages here, as they search among them all: at most 100 wait, and what is
done is cleared away between the rounds, off the clock. Ours keeps it.
"""

from itertools import cycle

from figures import Row, block, figures, interleaved
from ours_and_floor import BATCH, Ours, documents

try:
    from huey.storage import SqliteStorage
    from litequeue import LiteQueue
    from persistqueue import SQLiteAckQueue
except ImportError as error:
    raise SystemExit(
        f"The peers are not installed ({error}): use `make bench`, or leave them out with --only."
    ) from error

TITLE, REFERENCE = "other queues over SQLite", "theirs"


class PersistQueue:
    name = "persist-queue SQLiteAckQueue"

    def __init__(self, folder):
        self.queue = SQLiteAckQueue(str(folder / "persist-queue"))
        self.connection = self.queue._putter
        self.connection.execute("PRAGMA synchronous = FULL")
        self.documents = cycle(documents())

    def enqueue(self):
        self.queue.put(next(self.documents))

    def claim_and_ack(self):
        for message in [self.queue.get(block=False, raw=True) for _ in range(BATCH)]:
            self.queue.ack(id=message["pqid"])

    def clear(self):
        self.queue.clear_acked_data(max_delete=BATCH, keep_latest=0)

    def close(self):
        self.queue.close()


class Lite:
    name = "litequeue LiteQueue"

    def __init__(self, folder):
        self.queue = LiteQueue(folder / "litequeue.db")
        self.connection = self.queue.conn
        self.connection.execute("PRAGMA synchronous = FULL")
        self.documents = cycle(documents())

    def enqueue(self):
        self.queue.put(next(self.documents))

    def claim_and_ack(self):
        for message in [self.queue.pop() for _ in range(BATCH)]:
            self.queue.done(message.message_id)

    def clear(self):
        self.queue.prune()

    def close(self):
        self.queue.close()


class Huey:
    name = "huey SqliteStorage"

    def __init__(self, folder):
        self.storage = SqliteStorage(filename=str(folder / "huey.db"), fsync=True)
        self.connection = self.storage.conn
        self.documents = cycle([document.encode() for document in documents()])

    def enqueue(self):
        self.storage.enqueue(next(self.documents))

    def claim_and_ack(self):
        for message in [self.storage.dequeue() for _ in range(BATCH)]:
            assert message

    def clear(self):
        """Nothing is left of what was taken."""

    def close(self):
        self.storage.close()


def rows(folder, scale):
    ours = Ours(folder / "beside-peers.db")
    peers = [PersistQueue(folder), Lite(folder), Huey(folder)]
    blocks = {}
    for side in (ours, *peers):
        enqueue = ours.insert if side is ours else side.enqueue
        for _ in range(BATCH):  # so that every second round can begin with a claim
            enqueue()
        blocks["enqueue", side] = block(enqueue, BATCH)
    for side in (ours, *peers):
        after = None if side is ours else side.clear
        blocks["claim and ack", side] = block(side.claim_and_ack, 1, after=after)
    for peer in peers:
        assert_durable(peer)
    taken = interleaved(blocks, scale.rounds)
    found = {key: figures(rounds) for key, rounds in taken.items()}
    for what, told in (("enqueue", "enqueue"), ("claim and ack", f"claim and ack of {BATCH}")):
        for peer in peers:
            yield Row(f"{told}: {peer.name}", "µs", found[what, ours], found[what, peer], 1)
    for side in (ours, *peers):
        side.close()


def assert_durable(peer):
    """WAL and FULL on the connection that writes, and a message is committed when the call returns."""
    settings = [peer.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2], (peer.name, settings)
    commits = []
    peer.connection.set_trace_callback(lambda statement: commits.append(statement.split()[0].upper() == "COMMIT"))
    peer.enqueue()
    peer.connection.set_trace_callback(None)
    assert sum(commits) <= 1, (peer.name, "more than one commit")  # none: a statement that commits by itself
    assert not peer.connection.in_transaction, peer.name
