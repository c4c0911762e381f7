"""Files as the hand-written `sqlite3` module left them in the field, with the damage that was found there."""

import importlib
import importlib.util
import json
import random
import uuid
from contextlib import closing

from builders import NOON

from kkt_buffer import check, create_buffer_engine, upgrade

# The SQLite library that the package uses: a second one in this process would cancel its locks.
driver = importlib.import_module("pysqlite3" if importlib.util.find_spec("pysqlite3") else "sqlite3")

DDL = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS receipts (
    id TEXT PRIMARY KEY,
    pos_id TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    hlc_local_time INTEGER NOT NULL,
    hlc_logical_counter INTEGER NOT NULL CHECK (hlc_logical_counter >= 0),
    hlc_server_time INTEGER,
    fiscal_doc TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'syncing', 'synced', 'failed')),
    retry_count INTEGER DEFAULT 0 CHECK (retry_count >= 0),
    last_error TEXT,
    synced_at INTEGER
);
CREATE INDEX IF NOT EXISTS idx_receipts_status ON receipts (status);
CREATE INDEX IF NOT EXISTS idx_receipts_created_at ON receipts (created_at);
CREATE INDEX IF NOT EXISTS idx_receipts_hlc ON receipts (hlc_server_time, hlc_local_time, hlc_logical_counter);
CREATE INDEX IF NOT EXISTS idx_receipts_pos_id ON receipts (pos_id);
CREATE INDEX IF NOT EXISTS idx_receipts_retry ON receipts (retry_count, status);
CREATE TABLE IF NOT EXISTS dlq (
    id TEXT PRIMARY KEY,
    original_receipt_id TEXT NOT NULL,
    failed_at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    fiscal_doc TEXT NOT NULL,
    retry_attempts INTEGER NOT NULL,
    last_error TEXT,
    resolved_at INTEGER,
    resolved_by TEXT,
    FOREIGN KEY (original_receipt_id) REFERENCES receipts (id)
);
CREATE INDEX IF NOT EXISTS idx_dlq_failed_at ON dlq (failed_at);
CREATE INDEX IF NOT EXISTS idx_dlq_resolved_at ON dlq (resolved_at);
CREATE INDEX IF NOT EXISTS idx_dlq_original_receipt ON dlq (original_receipt_id);
CREATE TABLE IF NOT EXISTS buffer_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_type TEXT NOT NULL CHECK (event_type IN ('receipt_added', 'receipt_synced', 'receipt_failed',
        'circuit_opened', 'circuit_closed', 'sync_started', 'sync_completed', 'sync_failed')),
    receipt_id TEXT,
    timestamp INTEGER NOT NULL,
    metadata TEXT
);
CREATE INDEX IF NOT EXISTS idx_events_timestamp ON buffer_events (timestamp);
CREATE INDEX IF NOT EXISTS idx_events_type ON buffer_events (event_type);
CREATE INDEX IF NOT EXISTS idx_events_receipt_id ON buffer_events (receipt_id);
CREATE TABLE IF NOT EXISTS config (key TEXT PRIMARY KEY, value TEXT NOT NULL, updated_at INTEGER NOT NULL);
INSERT OR IGNORE INTO config VALUES ('version', '1.0.0', 1700000000), ('buffer_capacity', '200', 1700000000),
    ('circuit_breaker_threshold', '5', 1700000000), ('circuit_breaker_timeout', '60', 1700000000),
    ('max_retry_attempts', '20', 1700000000);
CREATE VIEW IF NOT EXISTS v_buffer_status AS
SELECT
    (SELECT COUNT(*) FROM receipts) AS total_receipts,
    (SELECT COUNT(*) FROM receipts WHERE status = 'pending') AS pending,
    (SELECT COUNT(*) FROM receipts WHERE status = 'syncing') AS syncing,
    (SELECT COUNT(*) FROM receipts WHERE status = 'synced') AS synced,
    (SELECT COUNT(*) FROM receipts WHERE status = 'failed') AS failed,
    (SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL) AS dlq_size,
    (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity') AS capacity,
    ROUND(100.0 * (SELECT COUNT(*) FROM receipts WHERE status = 'pending')
        / (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), 2) AS percent_full;
CREATE VIEW IF NOT EXISTS v_recent_events AS
SELECT id, event_type, receipt_id, datetime(timestamp, 'unixepoch') AS event_time, metadata
FROM buffer_events ORDER BY timestamp DESC, id DESC LIMIT 100;
CREATE TRIGGER IF NOT EXISTS trg_receipt_added AFTER INSERT ON receipts
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_added', NEW.id, NEW.created_at, json_object('pos_id', NEW.pos_id));
END;
CREATE TRIGGER IF NOT EXISTS trg_receipt_synced AFTER UPDATE ON receipts
WHEN NEW.status = 'synced' AND OLD.status <> 'synced'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_synced', NEW.id, NEW.synced_at, json_object('server_time', NEW.hlc_server_time));
END;
"""

# What stands beside them in the field, and what one shop has added.
NEIGHBOURS = """
CREATE TABLE pos_sessions (pos_id TEXT PRIMARY KEY, opened_at INTEGER NOT NULL);
CREATE TABLE cash_transactions (
    id INTEGER PRIMARY KEY,
    receipt_id TEXT REFERENCES receipts (id) ON DELETE CASCADE,
    pos_id TEXT REFERENCES pos_sessions (pos_id),
    amount INTEGER NOT NULL
);
CREATE INDEX idx_cash_receipt ON cash_transactions (receipt_id);
CREATE TABLE loyalty (receipt_id TEXT, points INTEGER);
CREATE VIEW v_turnover AS
    SELECT r.pos_id, SUM(c.amount) AS amount FROM receipts r JOIN cash_transactions c ON c.receipt_id = r.id GROUP BY 1;
CREATE TRIGGER shop_points AFTER INSERT ON receipts
BEGIN
    INSERT INTO loyalty VALUES (NEW.id, 10);
END;
"""

RECEIPT = """
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, hlc_server_time, fiscal_doc, status,
    retry_count, last_error, synced_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
LETTER = "INSERT INTO dlq VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
DOCUMENT = json.dumps(
    {"user": 'ООО "Ромашка"', "totalSum": 6490, "items": [{"name": "Молоко 3,2 %", "sum": 3245}] * 12},
    ensure_ascii=False,
)


def statements():
    """The schema, statement by statement, but for the journal mode."""
    found, so_far = [], ""
    for line in DDL.replace("PRAGMA journal_mode = WAL;", "").splitlines(keepends=True):
        so_far += line
        if driver.complete_statement(so_far):
            found.append(so_far)
            so_far = ""
    return found


def make(path, rows=0, *, neighbours=True):
    """Make such a file with this many receipts, most of them delivered, and some of everything."""
    chance = random.Random(rows)
    with closing(driver.connect(path)) as db:
        db.executescript(DDL + (NEIGHBOURS if neighbours else ""))
        db.execute("INSERT INTO config VALUES ('shop', 'Ромашка', ?)", (NOON,))
        for number in range(rows):
            receipt_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
            status = chance.choices(("synced", "pending", "syncing", "failed"), (80, 10, 3, 7))[0]
            moment = NOON + number // 3
            synced = (moment + 9, moment + 8) if status == "synced" else (None, None)
            tries = chance.choice((0, 0, 0, 1, 20, None))
            row = (receipt_id, f"till-{number % 3}", moment, moment, number % 3, synced[1], DOCUMENT, status, tries)
            db.execute(RECEIPT, (*row, "no answer" if tries else None, synced[0]))
            if status == "failed" and chance.random() < 0.9:
                for which in range(chance.choice((1, 1, 1, 2))):
                    letter_id = f"letter {which} of {receipt_id}"
                    db.execute(LETTER, (letter_id, receipt_id, moment, "rejected", DOCUMENT, 20, None, None, None))
            if neighbours:
                db.execute("INSERT OR IGNORE INTO pos_sessions VALUES (?, ?)", (f"till-{number % 3}", NOON))
                db.execute(
                    "INSERT INTO cash_transactions (receipt_id, pos_id, amount) VALUES (?, ?, 6490)",
                    (receipt_id, f"till-{number % 3}"),
                )
        db.commit()
    return path


def rows(path, table):
    """The rows of a table by their first column, as SQLite has them."""
    with closing(driver.connect(path)) as db:
        db.row_factory = driver.Row
        return {row[0]: dict(row) for row in db.execute(f"SELECT * FROM {table}")}


def run(path, *statements):
    """Change a file of the predecessor by hand."""
    with closing(driver.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(*((statement,) if isinstance(statement, str) else statement))


def adopt(path):
    engine = create_buffer_engine(path)
    try:
        upgrade(engine)
        check(engine)
    finally:
        engine.dispose()


def repairs(path, receipt_id):
    """What the events say was found in a receipt, and what it became."""
    events = [
        row
        for row in rows(path, "buffer_events").values()
        if row["event_type"] == "receipt_repaired" and row["receipt_id"] == receipt_id
    ]
    return [(details["found"], details["became"]) for details in (json.loads(row["metadata"]) for row in events)]


FIELDS = {
    "id": "r",
    "pos_id": "till-1",
    "created_at": NOON,
    "hlc_local_time": NOON,
    "hlc_logical_counter": 0,
    "hlc_server_time": None,
    "fiscal_doc": DOCUMENT,
    "status": "pending",
    "retry_count": 0,
    "last_error": None,
    "synced_at": None,
}


def receipt(**fields):
    return RECEIPT, list((FIELDS | fields).values())


def letter(receipt_id="r", *, failed_at=NOON, resolved_at=None, resolved_by=None, letter_id=None):
    name = letter_id or f"letter {failed_at}"
    row = (name, receipt_id, failed_at, "rejected", DOCUMENT, 20, "no", resolved_at, resolved_by)
    return LETTER, row
