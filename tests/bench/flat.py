"""
What the operations cost in a big file beside a small one: nothing may grow with what has been.

Three pairs of files, which differ in one thing each: how many synced receipts there are (each with its event of having
been added), how many receipts are pending, how many events of receipts long gone. In the files with the full backlog
one place is free: an insert takes it, and a mark_synced off the clock makes room for the next one; so it goes in all
the files. The capacity is the same in all of them. What a file begins with is written by plain `sqlite3`, with the
triggers in place and without any sync; the documents of the synced receipts have some 100 bytes only, so that they are
quickly made, those of the pending ones 2 KB. What the rounds add, a few thousand receipts, is the same on both sides.
"""

import json
import os
import sqlite3
import sys
import time
import uuid
from itertools import cycle

from figures import Row, block, figures, interleaved
from ours_and_floor import BATCH, Ours, documents

TITLE, REFERENCE = "a big file beside a small one", "small file"

DAY = 86_400
SMALL = 1000
SMALL_BACKLOG = 2 * BATCH

RECEIPT = """\
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, status, hlc_server_time,
    synced_at)
VALUES (?, 'till-1', ?, ?, ?, ?, ?, ?, ?)"""
EVENT = "INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata) VALUES (?, ?, ?, ?)"

CLAIM = f"claim and ack of {BATCH}"
OPERATIONS = {
    "insert_receipt": lambda file: block(file.insert, 20, after=file.mark_synced),
    f"get_pending_receipts({BATCH})": lambda file: block(file.pending, 10),
    "get_buffer_status": lambda file: block(file.status, 20),
    "mark_synced": lambda file: block(file.mark_synced, 20, after=file.insert),
    CLAIM: lambda file: block(file.claim_and_ack, 1, after=file.insert_batch),
}


def rows(folder, scale):
    big, small = many_synced(folder, scale), a_file(folder / "few-synced.db", scale, synced=SMALL)
    yield from compared(f"{scale.many:,} synced", big, small, scale)
    big, small = a_file(folder / "full.db", scale, pending=scale.backlog - 1), a_file(folder / "empty.db", scale)
    yield from compared(f"{scale.backlog:,} pending", big, small, scale)
    big, small = (a_file(folder / f"{n}-events.db", scale, events=n) for n in (scale.many, SMALL))
    yield from compared(f"{scale.many:,} events", big, small, scale)


def compared(what, big, small, scale):
    sides = {"big": Ours(big, scale.backlog), "small": Ours(small, scale.backlog)}
    for file in sides.values():
        file.take_up()
    blocks = {}
    for operation, make in OPERATIONS.items():
        blocks |= {(operation, side): make(file) for side, file in sides.items()}
    taken = interleaved(blocks, scale.rounds)
    for file in sides.values():
        file.close()
    for operation in OPERATIONS:
        budget = 1.3 if operation == CLAIM else 1.15
        mine, its = figures(taken[operation, "big"]), figures(taken[operation, "small"])
        yield Row(f"{what}: {operation}", "µs", mine, its, budget)


def many_synced(folder, scale):
    """The file with as many synced receipts as there may be; made where it is not there."""
    path = folder / "many-synced.db"
    return path if path.exists() else a_file(path, scale, synced=scale.many)


def a_file(path, scale, *, synced=0, pending=SMALL_BACKLOG, events=0):
    """A buffer that has seen something, on disk and closed."""
    Ours(path, scale.backlog).close()
    print(f"    making {path.name}", file=sys.stderr, flush=True)
    now = int(time.time())
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in "journal_mode = DELETE", "journal_mode = OFF", "synchronous = OFF", "cache_size = -1000000":
        connection.execute(f"PRAGMA {pragma}").fetchone()
    connection.execute("BEGIN")
    connection.executemany(RECEIPT, synced_receipts(synced, now - 30 * DAY))
    connection.executemany(RECEIPT, pending_receipts(pending, now - DAY))
    connection.executemany(EVENT, old_events(events, now - 30 * DAY))
    connection.execute("COMMIT")
    connection.close()
    os.sync()  # or the kernel writes all this while we measure
    return path


def synced_receipts(count, since):
    """Receipts of twenty days, the last ones delivered ten days ago: older than their retention."""
    for number in range(count):
        moment = since + number * 20 * DAY // count
        document = json.dumps({"code": 3, "fiscalDocumentNumber": number, "totalSum": 6490, "user": "ООО Ромашка"})
        yield str(uuid.uuid4()), moment, moment, number, document, "synced", moment + 60, moment + 60


def pending_receipts(count, moment):
    for number, document in zip(range(count), cycle(list(documents()))):
        yield str(uuid.uuid4()), moment, moment, number, document, "pending", None, None


def old_events(count, since):
    """Most are of receipts, as in life; some tell of the runs of delivery."""
    kinds = cycle(["receipt_added", "receipt_synced"] * 4 + ["sync_started", "sync_completed"])
    for number, kind in zip(range(count), kinds, strict=False):
        receipt_id = str(uuid.uuid4()) if kind.startswith("receipt_") else None
        yield kind, receipt_id, since + number * 20 * DAY // count, "{}"
