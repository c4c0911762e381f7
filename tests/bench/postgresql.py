"""
The buffer on PostgreSQL: beside a plain INSERT and other queues, with many synced receipts, under a snapshot.

A throwaway server with default settings but for its memory, so that it waits for the disk, which is that of /var/tmp.
`CPU` is that of this process alone, not of the server. The floor inserts the same row with nothing but psycopg, in
autocommit, into a table that has no index but the same primary key; its batch is `executemany` in one transaction.

Two buffers that differ in their synced receipts are compared as those of `flat` are. A snapshot is what a nightly
pg_dump holds: under it, nothing can be cleaned up that has been replaced. One thread inserts until the snapshot is as
old as it may be; a buffer in another database, where no snapshot is held and nothing was inserted, stands beside. Then
what was inserted is delivered under the snapshot, and the same calls are measured again: a claim, and the status, read
the dead index entries of all of it. There is no goal for that.

PgQueuer and procrastinate enqueue the same document with their synchronous interfaces, one commit for each job. They
check no capacity, and give their jobs no timestamps in the order of the commits.
"""

import hashlib
import itertools
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import flat
import psycopg
from figures import Row, at_once, block, figures, interleaved, rate
from ours_and_floor import BATCH, Ours, documents
from till import LeftOutError

import servers  # isort: skip (ours_and_floor puts the tests' own modules on the path)

try:
    from postgresql_peers import PEERS
except ImportError as error:
    PEERS = ()
    print(f"postgresql: PEERS LEFT OUT: not installed ({error}), use `make bench`", file=sys.stderr, flush=True)

TITLE, REFERENCE = "PostgreSQL", "reference"

MANY = 64  # receipts in a batch: as many as commit together at most
MEMORY = {"shared_buffers": "256MB", "max_wal_size": "4GB"}

FLOOR = "CREATE TABLE floor (LIKE receipts INCLUDING DEFAULTS, PRIMARY KEY (id))"
INSERT = """\
INSERT INTO floor (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest)
VALUES (%s, 'till-1', %s, %s, 0, %s, %s)"""

# Leaves the rows as a claim and a delivery of each receipt do, in two statements.
DELIVER = """\
UPDATE receipts SET status = 'syncing', lease_token = 'bench', lease_taken_at = 0, lease_expires_at = 0
WHERE id IN (SELECT id FROM receipts WHERE status = 'pending' AND held_at IS NULL
    ORDER BY hlc_local_time, hlc_logical_counter LIMIT %s)"""
RECORD = """\
UPDATE receipts SET status = 'synced', synced_at = created_at, hlc_server_time = created_at, lease_token = NULL,
    lease_taken_at = NULL, lease_expires_at = NULL
WHERE status = 'syncing'"""

# Receipts of twenty days, the last ones delivered ten days ago, as those of `flat`. A replica runs no triggers.
FILL = f"""\
SET session_replication_role = replica;
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, status, hlc_server_time,
    synced_at)
SELECT gen_random_uuid(), 'till-1', moment, moment, number, document, 'synced', moment + 60, moment + 60
FROM generate_series(1, :synced) AS number, CAST(extract(epoch FROM now()) - {30 * flat.DAY} AS bigint) AS since,
    CAST(since + number * {20.0 * flat.DAY} / :synced AS bigint) AS moment,
    json_build_object('code', 3, 'fiscalDocumentNumber', number, 'totalSum', 6490, 'user', 'ООО Ромашка') AS document;
INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
SELECT 'receipt_added', id, created_at, '{{}}' FROM receipts;
INSERT INTO buffer_changes (synced, hlc_local_time, hlc_logical_counter)
SELECT COUNT(*), MAX(hlc_local_time), COUNT(*) FROM receipts"""


class Buffer(Ours):
    """The operations of a service on a buffer in PostgreSQL, in a database of its own."""

    def __init__(self, server, name):
        super().__init__(database(server, name))
        self.engine.dispose()  # a session that has migrated is slower for ever

    def insert_many(self):
        self.undelivered += self.repository.insert_receipts(itertools.islice(self.receipts, MANY))

    def claim(self):
        claimed = [receipt.id for receipt in self.repository.claim_pending(BATCH)]
        assert claimed == [*itertools.islice(self.undelivered, BATCH)]

    def deliver_claimed(self):
        """Deliver what was claimed, and replace it."""
        for _ in range(BATCH):
            self.mark_synced()
        self.insert_batch()


class Floor:
    """Nothing but the driver."""

    def __init__(self, url):
        self.connection = psycopg.connect(plain(url), autocommit=True)
        self.connection.execute(FLOOR)
        self.documents = itertools.cycle([*documents()])

    def receipt(self):
        document, now = next(self.documents), int(time.time())
        return str(uuid.uuid4()), now, now, document, hashlib.sha256(document.encode()).hexdigest()

    def insert(self):
        self.connection.execute(INSERT, self.receipt())

    def insert_many(self):
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.executemany(INSERT, [self.receipt() for _ in range(MANY)])

    def close(self):
        self.connection.close()


def rows(folder, scale):
    del folder  # the server has its own
    if servers.programs() is None:
        raise LeftOutError(f"PostgreSQL: {servers.reason()}")
    with servers.Server(on_disk=True, **MEMORY) as server:
        yield from side_by_side(server, scale)
        few, many = filled(server, "few", flat.SMALL), filled(server, "many", scale.many)
        yield from flat.compared(f"{scale.many:,} synced", many, few, scale)
        yield from under_a_snapshot(server, scale)


def side_by_side(server, scale):
    ours = Buffer(server, "side_by_side")
    floor = Floor(ours.path)
    peers = {peer.name: peer(plain(database(server, peer.name.lower()))) for peer in PEERS}
    with ThreadPoolExecutor(MANY) as pool, ThreadPoolExecutor(1) as one:
        taken = interleaved(
            {
                "insert": block(ours.insert, 20),
                "floor": block(floor.insert, 20),
                **{name: block(peer.insert, 20) for name, peer in peers.items()},
                "batch": block(ours.insert_many, 1, receipts=MANY),
                "floor's batch": block(floor.insert_many, 1, receipts=MANY),
                "threads": at_once(pool, 16, ours.insert, 10),
                "thread": at_once(one, 1, ours.insert, 20),
            },
            scale.rounds,
        )
    for side in (ours, floor, *peers.values()):
        side.close()
    found = {name: figures(blocks) for name, blocks in taken.items()}
    yield Row("insert_receipt: plain INSERT", "µs", found["insert"], found["floor"], 2.5)
    yield Row(f"insert_receipts({MANY}): executemany", "µs", found["batch"], found["floor's batch"], 2.5)
    threads, thread = rate(found["threads"]), rate(found["thread"])
    yield Row("insert_receipt, 16 threads: one thread", "receipts/s", threads, thread, 3, at_least=True)
    for name in peers:
        yield Row(f"insert_receipt: {name}", "µs", found["insert"], found[name])


def filled(server, name, synced):
    """The URL of a buffer with so many synced receipts."""
    print(f"    making {synced:,} synced receipts", file=sys.stderr, flush=True)
    buffer = Buffer(server, name)
    server.execute(FILL.replace(":synced", str(synced)), database=name)
    for _ in range(flat.SMALL_BACKLOG // BATCH):
        buffer.insert_batch()
    buffer.close()
    server.execute("VACUUM ANALYZE", database=name)
    server.execute("CHECKPOINT")
    return buffer.path


def under_a_snapshot(server, scale):
    sides = {name: Buffer(server, name) for name in ("held", "fresh")}
    held = sides["held"]
    for buffer in sides.values():
        buffer.insert_batch()
    with psycopg.connect(plain(held.path)) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT COUNT(*) FROM receipts")
        until = time.monotonic() + scale.snapshot
        while time.monotonic() < until:
            held.insert()
        claim = f"claim_pending({BATCH})"
        budgets = {"insert_receipt": 1.3, claim: 1.5, "get_buffer_status": None}
        yield from compared_with_fresh(sides, scale, f"a snapshot of {scale.snapshot:g} s", budgets)
        delivered = len(held.undelivered) - BATCH
        with psycopg.connect(plain(held.path)) as another:
            another.execute(DELIVER, [delivered])
            another.execute(RECORD)
        for _ in range(delivered):
            held.undelivered.popleft()
        budgets = dict.fromkeys(budgets)
        yield from compared_with_fresh(sides, scale, f"{delivered:,} delivered under it", budgets)
    for buffer in sides.values():
        buffer.close()


def compared_with_fresh(sides, scale, when, budgets):
    blocks = {}
    for name, buffer in sides.items():
        blocks["insert_receipt", name] = block(buffer.insert, 20)
        blocks[f"claim_pending({BATCH})", name] = block(buffer.claim, 1, after=buffer.deliver_claimed)
        blocks["get_buffer_status", name] = block(buffer.status, 20)
    taken = interleaved(blocks, scale.rounds)
    for what, budget in budgets.items():
        yield Row(f"{when}: {what}", "µs", figures(taken[what, "held"]), figures(taken[what, "fresh"]), budget)


def database(server, name):
    """The URL of a new database."""
    server.execute(f"CREATE DATABASE {name}")
    return server.url(database=name)


def plain(url):
    """The URL as the driver alone takes it."""
    return url.replace("+psycopg", "")
