"""
The two sides: the buffer as a service calls it, and its floor, which does the same with nothing but the driver.

The floor's file has the same schema and PRAGMAs, both taken over from ours (synchronous=FULL included). It runs the
statements that each operation needs, in as many transactions, without checking arguments and without guarding the
connection. Its insert looks at the capacity in a statement of its own, beside the trigger that both sides have.
"""

import itertools
import json
import logging
import sys
import threading
import time
import uuid
from collections import deque
from pathlib import Path

from sqlalchemy import text

from kkt_buffer import Outcome, ReceiptRepository, create_buffer_engine, deliver_pending, upgrade

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script, to which pytest gives no path
from samples import sample_receipts

logging.getLogger("kkt_buffer").setLevel(logging.ERROR)  # what SQLite it is, the last line of the table says

BATCH = 50  # receipts in one insert_receipts, get_pending_receipts and claim_pending
DOCUMENT_BYTES = 2048
CAPACITY = 1_000_000

# What the floor takes over of our connections' settings.
PRAGMAS = ("journal_mode", "synchronous", "foreign_keys", "wal_autocheckpoint", "journal_size_limit", "cache_size")
PRAGMAS += ("secure_delete", "busy_timeout", "fullfsync", "checkpoint_fullfsync")

CAPACITY_LEFT = """\
SELECT (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity')
     - (SELECT pending + syncing FROM buffer_state)"""
LAST_HLC = "SELECT hlc_local_time, hlc_logical_counter FROM buffer_state"
ADD = """\
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)
VALUES (?, ?, ?, ?, ?, ?)"""
COLUMNS = """\
id, pos_id, created_at, hlc_local_time, hlc_logical_counter, hlc_server_time, fiscal_doc, status, retry_count,
last_error, synced_at, changed_at, next_attempt_at, lease_token, lease_taken_at, lease_expires_at"""
IN_ORDER = "ORDER BY hlc_local_time, hlc_logical_counter"
PENDING = f"SELECT {COLUMNS} FROM receipts WHERE status = 'pending' AND held_at IS NULL {IN_ORDER} LIMIT ?"
PENDING_IDS = f"SELECT id FROM receipts WHERE status = 'pending' AND held_at IS NULL {IN_ORDER}"
STATUS = """\
SELECT v_buffer_status.*, (SELECT value FROM config WHERE key = 'ofd_deadline_days'), (
    SELECT created_at FROM receipts WHERE status <> 'synced' AND (status <> 'failed' OR EXISTS (
        SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id AND resolved_at IS NULL))
    ORDER BY created_at LIMIT 1)
FROM v_buffer_status"""
MARK_SYNCED = """\
UPDATE receipts SET status = 'synced', synced_at = :now, changed_at = :now, hlc_server_time = :now,
    next_attempt_at = NULL, lease_token = NULL, lease_taken_at = NULL, lease_expires_at = NULL
WHERE id = :id AND status IN ('pending', 'syncing')"""
SETTINGS = "SELECT key, value FROM config"
RECOVER = """\
UPDATE receipts SET status = 'pending', lease_token = NULL, lease_taken_at = NULL, lease_expires_at = NULL
WHERE status = 'syncing' AND (lease_expires_at <= :now OR lease_taken_at > :now + 60)"""
TAKE = f"""\
UPDATE receipts SET status = 'syncing', lease_token = :token, lease_taken_at = :now, lease_expires_at = :expires
WHERE id IN (
    SELECT id FROM receipts
    WHERE status = 'pending' AND held_at IS NULL AND COALESCE(next_attempt_at NOT BETWEEN :now + 1 AND :horizon, TRUE)
    {IN_ORDER} LIMIT :limit)"""
TAKEN = f"SELECT {COLUMNS} FROM receipts WHERE status = 'syncing' AND lease_token = ? {IN_ORDER}"


class Ours:
    """The operations as a service calls them, on a file that is made where it is not there."""

    def __init__(self, path, capacity=CAPACITY):
        self.path = path
        self.engine = create_buffer_engine(path)
        upgrade(self.engine)
        self.repository = ReceiptRepository(self.engine)
        self.repository.set_config("buffer_capacity", capacity)
        self.receipts = itertools.cycle([{"pos_id": "till-1", "fiscal_doc": document} for document in documents()])
        self.undelivered = deque()

    def take_up(self):
        """Go on with what is pending in the file."""
        with self.engine.execution_options(kkt_buffer_read_only=True).connect() as connection:
            self.undelivered.extend(connection.scalars(text(PENDING_IDS)))

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

    def claim_and_ack(self):
        for receipt in self.repository.claim_pending(BATCH):
            assert receipt.id == self.undelivered[0]
            self.mark_synced()

    def deliver(self):
        report = deliver_pending(self.repository, lambda _: int(time.time()), BATCH)
        assert report.count(Outcome.SYNCED) == len(report.outcomes) == BATCH
        self.undelivered.clear()

    def close(self):
        self.engine.dispose()


class Floor:
    """The same with nothing but the driver; each thread has a connection of its own."""

    def __init__(self, path):
        ours = Ours(path)  # makes the file and its schema
        with ours.engine.connect() as connection:
            self.settings = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in PRAGMAS}
        ours.close()
        self.path, self.driver = path, ours.engine.dialect.dbapi
        self.of_thread, self.connections = threading.local(), []
        self.documents = itertools.cycle([*documents()])
        self.undelivered = deque()

    @property
    def connection(self):
        try:
            return self.of_thread.connection
        except AttributeError:
            connection = self.driver.connect(self.path, isolation_level=None, check_same_thread=False)
            for name, value in self.settings.items():
                connection.execute(f"PRAGMA {name} = {value}").fetchone()
                assert connection.execute(f"PRAGMA {name}").fetchone()[0] == value
            self.connections.append(connection)
            self.of_thread.connection = connection
            return connection

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
        return [json.loads(row[6]) for row in self.connection.execute(PENDING, (BATCH,)).fetchall()]

    def status(self):
        return self.connection.execute(STATUS).fetchone()[0]

    def mark_synced(self):
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        execute(MARK_SYNCED, {"now": int(time.time()), "id": self.undelivered.popleft()})
        execute("COMMIT")

    def claim_and_ack(self):
        execute = self.connection.execute
        token = str(uuid.uuid4())
        execute("BEGIN IMMEDIATE")
        settings = dict(execute(SETTINGS).fetchall())
        now = int(time.time())
        lease = {"now": now, "token": token, "expires": now + int(settings["lease_seconds"]), "limit": BATCH}
        execute(RECOVER, {"now": now})
        execute(TAKE, {**lease, "horizon": now + int(settings["retry_backoff_max"])})
        rows = execute(TAKEN, (token,)).fetchall()
        execute("COMMIT")
        for row in rows:
            assert row[0] == self.undelivered[0]
            self.mark_synced()

    def close(self):
        for connection in self.connections:
            connection.close()


def documents():
    """Receipts in the JSON form that OFDs exchange, with as many items as make about 2 KB."""
    receipts = list(sample_receipts(200))
    items = itertools.cycle([item for receipt in receipts for item in receipt["items"]])
    for receipt in receipts:
        receipt["items"] = []
        while len(document := json.dumps(receipt, ensure_ascii=False, separators=(",", ":")).encode()) < DOCUMENT_BYTES:
            receipt["items"].append(next(items))
        yield document.decode()
