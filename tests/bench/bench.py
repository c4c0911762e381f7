"""
How fast the buffer is beside its floor: plain `sqlite3` that does the same, in the same run, on the same disk.

The floor has a file with the same schema and PRAGMAs (both taken from the package, synchronous=FULL included) and runs
the statements that each operation needs, without checking arguments and without guarding the connection; its insert
looks at the capacity in a statement of its own, which ours leaves to the trigger. Both sides get the same documents of
about 2 KB, the same number of times, so the two files grow alike.

One round is a block of operations of ours and a block of the floor's, for each row of the table in turn; which comes
first alternates. A round's figure is its mean per operation, so that it bears its share of the WAL's checkpoints (one
in some 15 commits). The table has the median of the rounds and the 99th percentile of the single operations; the ratio
is that of the medians. No time makes this fail: what is over its budget is marked.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections import deque
from pathlib import Path

import sqlalchemy

from kkt_buffer import ReceiptRepository, create_buffer_engine, upgrade
from kkt_buffer.demo import sample_receipts
from kkt_buffer.engine import COMMON, DURABLE, WAL

BATCH = 50  # receipts in one insert_receipts, and in one get_pending_receipts
WARM_UP = 3  # rounds that are not counted
DOCUMENT_BYTES = 2048

CAPACITY_LEFT = """\
SELECT (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity')
     - (SELECT SUM(value) FROM buffer_counts WHERE name IN ('pending', 'syncing'))"""
LAST_HLC = """SELECT hlc_local_time, hlc_logical_counter FROM receipts ORDER BY 1 DESC, 2 DESC LIMIT 1"""
COLUMNS = "id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc"
ADD = f"INSERT INTO receipts ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
PENDING = f"""\
SELECT {COLUMNS}, hlc_server_time, status, retry_count, last_error, synced_at, changed_at
FROM receipts WHERE status = 'pending'
ORDER BY COALESCE(hlc_server_time, hlc_local_time), hlc_logical_counter LIMIT ?"""
STATUS = """\
SELECT v_buffer_status.*, (SELECT value FROM config WHERE key = 'ofd_deadline_days'), (
    SELECT created_at FROM receipts WHERE status <> 'synced' AND (status <> 'failed' OR EXISTS (
        SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id AND resolved_at IS NULL))
    ORDER BY created_at LIMIT 1)
FROM v_buffer_status"""
MARK_SYNCED = """\
UPDATE receipts SET status = 'synced', synced_at = ?, changed_at = ?, hlc_server_time = ?
WHERE id = ? AND status IN ('pending', 'syncing')"""


class Ours:
    """The operations as a service calls them."""

    def __init__(self, path):
        self.engine = create_buffer_engine(path)
        upgrade(self.engine)
        self.repository = ReceiptRepository(self.engine)
        self.repository.set_config("buffer_capacity", 1_000_000)
        self.receipts = itertools.cycle({"pos_id": "till-1", "fiscal_doc": text} for text in documents())
        self.undelivered = deque()

    def insert(self):
        self.undelivered.append(self.repository.insert_receipt(next(self.receipts)))

    def insert_batch(self):
        self.undelivered += self.repository.insert_receipts(itertools.islice(self.receipts, BATCH))

    def pending(self):
        return [receipt.document for receipt in self.repository.get_pending_receipts(BATCH)]

    def status(self):
        return self.repository.get_buffer_status().total_receipts

    def mark_synced(self):
        self.repository.mark_synced(self.undelivered.popleft(), int(time.time()))


class Floor:
    """The same with nothing but the driver."""

    def __init__(self, path):
        engine = Ours(path).engine  # makes the file and its schema
        engine.dispose()
        self.connection = engine.dialect.dbapi.connect(path, isolation_level=None)
        for pragma in (WAL, *DURABLE, *COMMON):
            self.connection.execute(f"PRAGMA {pragma.name} = {pragma.value}").fetchone()
        self.documents = itertools.cycle(documents())
        self.undelivered = deque()

    def insert(self):
        execute = self.connection.execute
        receipt_id = str(uuid.uuid4())
        execute("BEGIN IMMEDIATE")
        assert execute(CAPACITY_LEFT).fetchone()[0] > 0
        now = int(time.time())
        last = execute(LAST_HLC).fetchone()
        hlc = (last[0], last[1] + 1) if last and now <= last[0] else (now, 0)
        execute(ADD, (receipt_id, "till-1", now, *hlc, next(self.documents)))
        execute("COMMIT")
        self.undelivered.append(receipt_id)

    def pending(self):
        return [json.loads(row[5]) for row in self.connection.execute(PENDING, (BATCH,)).fetchall()]

    def status(self):
        return self.connection.execute(STATUS).fetchone()[0]

    def mark_synced(self):
        now = int(time.time())
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.execute(MARK_SYNCED, (now, now, now, self.undelivered.popleft()))
        self.connection.execute("COMMIT")


def documents():
    """Receipts in the JSON form that operators exchange, with as many items as make about 2 KB."""
    receipts = list(sample_receipts(200))
    items = itertools.cycle([item for receipt in receipts for item in receipt["items"]])
    for receipt in receipts:
        receipt["items"] = []
        while len(text := json.dumps(receipt, ensure_ascii=False, separators=(",", ":")).encode()) < DOCUMENT_BYTES:
            receipt["items"].append(next(items))
        yield text.decode()


def block(operation, calls, receipts=1):
    """Microseconds that each of these calls took, per receipt."""
    gc.collect()  # each block pays for its own garbage only
    taken = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        operation()
        taken.append((time.perf_counter_ns() - start) / 1000 / receipts)
    return taken


def measure(folder, rounds):
    ours, floor = Ours(folder / "ours.db"), Floor(folder / "floor.db")
    # What, a block of ours, a block of the floor's, how many times the floor ours may take.
    rows = [
        ("insert_receipt", (ours.insert, 20), (floor.insert, 20), 2.2),
        (f"insert_receipts({BATCH}), each", (ours.insert_batch, 2, BATCH), (floor.insert, 2 * BATCH), 0.35),
        (f"get_pending_receipts({BATCH})", (ours.pending, 10), (floor.pending, 10), 1.8),
        ("get_buffer_status", (ours.status, 20), (floor.status, 20), None),
        ("mark_synced", (ours.mark_synced, 20), (floor.mark_synced, 20), None),
    ]
    taken = {side: [] for _, *sides, _ in rows for side in sides}
    gc.freeze()  # what setting up has left is nobody's garbage
    for number in range(WARM_UP + rounds):
        for _, *sides, _ in rows:
            for side in sides if number % 2 else reversed(sides):
                taken[side].append(block(*side))
    assert (ours.status(), ours.pending()) == (floor.status(), floor.pending()), "they have not done the same"
    floor.connection.close()
    ours.engine.dispose()
    return [figures(what, taken[mine][WARM_UP:], taken[its][WARM_UP:], budget) for what, mine, its, budget in rows]


def figures(what, ours, floor, budget):
    row = {"what": what, "budget": budget}
    for name, blocks in (("ours", ours), ("floor", floor)):
        row[f"{name}_median"] = statistics.median(map(statistics.fmean, blocks))
        row[f"{name}_p99"] = statistics.quantiles(itertools.chain(*blocks), n=100, method="inclusive")[98]
    return row | {"ratio": row["ours_median"] / row["floor_median"]}


def table(rows):
    yield f"{'median, p99, µs':26}{'ours':>9}{'p99':>8}{'floor':>9}{'p99':>8}{'ratio':>8}{'budget':>8}"
    form = "{what:26}{ours_median:9.0f}{ours_p99:8.0f}{floor_median:9.0f}{floor_p99:8.0f}{ratio:8.2f}"
    for row in rows:
        over = "  <- over budget" if row["budget"] and row["ratio"] > row["budget"] else ""
        yield form.format(**row) + f"{row['budget'] or '-':>8}{over}"


def machine(folder):
    driver = create_buffer_engine(":memory:").dialect.dbapi
    line = f"{os.cpu_count()} CPUs, Python {platform.python_version()}"
    line += f", SQLite {driver.sqlite_version}, SQLAlchemy {sqlalchemy.__version__}"
    with contextlib.suppress(OSError):  # only Linux has this file
        mounts = [mount.split()[1:3] for mount in Path("/proc/mounts").read_text().splitlines()]
        line += ", " + max((len(point), kind) for point, kind in mounts if folder.is_relative_to(point))[1]
    return line


def main():
    parser = argparse.ArgumentParser(description="Speed of the buffer, side by side with plain sqlite3.")
    parser.add_argument("--rounds", type=int, default=60, help="paired rounds (default: %(default)s)")
    parser.add_argument("--dir", default=".", help="a folder on the disk to measure, not on tmpfs (default: this one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too, in microseconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as name:
        folder = Path(name).resolve()
        rows = measure(folder, options.rounds)
        line = f"{options.rounds} rounds; {machine(folder)}"
    print(*table(rows), line, sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": line, "rows": rows}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
