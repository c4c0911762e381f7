"""
The two sides: the buffer as a service calls it, and its floor, which does the same with nothing but the driver.

The floor's file has the same schema and PRAGMAs (synchronous=FULL included), and it runs the same statements in as many
transactions; all of that is taken over from ours. It checks no arguments and does not guard the connection.
"""

import hashlib
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
from sqlalchemy.dialects import sqlite

from kkt_buffer import Outcome, ReceiptRepository, create_buffer_engine, deliver_pending, upgrade
from kkt_buffer.operations import leases, receipts
from kkt_buffer.operations.receipts import MARK_SYNCED
from kkt_buffer.operations.status import _status
from kkt_buffer.sqlite.database import INSERT, Database

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script, to which pytest gives no path
from samples import sample_receipts

logging.getLogger("kkt_buffer").setLevel(logging.ERROR)  # what SQLite it is, the last line of the table says

BATCH = 50  # receipts in one insert_receipts, get_pending_receipts and claim_pending
DOCUMENT_BYTES = 2048
CAPACITY = 1_000_000

# What the floor takes over of our connections' settings.
PRAGMAS = ("journal_mode", "synchronous", "foreign_keys", "wal_autocheckpoint", "journal_size_limit", "cache_size")
PRAGMAS += ("secure_delete", "busy_timeout", "fullfsync", "checkpoint_fullfsync")

NAMED = sqlite.dialect(paramstyle="named")
PENDING, RECOVER, CLAIM, CLAIMED = (
    str(statement.compile(dialect=NAMED))
    for statement in (receipts.PENDING, leases.RECOVER, leases.CLAIM[False, False], leases.CLAIMED)
)
_, STATUS = _status(Database.json_array)
SETTINGS = "SELECT key, value FROM config"
PENDING_IDS = "SELECT id FROM receipts WHERE status = 'pending' ORDER BY hlc_local_time, hlc_logical_counter"
NO_OFFSET = {"param_1": 0}  # SQLAlchemy gives each LIMIT an OFFSET


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
        document = next(self.documents)
        receipt = {"id": str(uuid.uuid4()), "pos_id": "till-1", "fiscal_doc": document, "held_at": None}
        receipt["digest"] = hashlib.sha256(document.encode()).hexdigest()
        execute("BEGIN IMMEDIATE")
        receipt["now"] = int(time.time())
        execute(INSERT, receipt)
        execute("COMMIT")
        self.undelivered.append(receipt["id"])

    def pending(self):
        rows = self.connection.execute(PENDING, {"limit": BATCH, **NO_OFFSET}).fetchall()
        return [json.loads(row[6]) for row in rows]

    def status(self):
        return json.loads(self.connection.execute(STATUS, {"now": int(time.time())}).fetchone()[0])[0]

    def mark_synced(self):
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        now = int(time.time())
        execute(MARK_SYNCED, {"now": now, "server_time": now, "receipt_id": self.undelivered.popleft()})
        execute("COMMIT")

    def claim_and_ack(self):
        execute = self.connection.execute
        token = str(uuid.uuid4())
        execute("BEGIN IMMEDIATE")
        settings = dict(execute(SETTINGS).fetchall())
        now = int(time.time())
        lease = {"now": now, "token": token, "expires": now + int(settings["lease_seconds"]), "limit": BATCH}
        execute(RECOVER, lease)
        execute(CLAIM, {**lease, **NO_OFFSET, "horizon": now + int(settings["retry_backoff_max"])})
        rows = execute(CLAIMED, lease).fetchall()
        execute("COMMIT")
        for row in sorted(rows, key=lambda row: row[3:5]):
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
