"""
What the models cannot say: counters, triggers and the status view, as plain SQL per engine.

Each fact about a receipt is written to `buffer_events` by one trigger, whoever changed the row, with the time that
the row carries. Guards refuse what would break an invariant. This is what the migrations must arrive at; they hold
their own copies, and a test compares the two.
"""

from collections.abc import Mapping

from sqlalchemy import Column, Float, Integer, Table, Text, column, table

from kkt_buffer.models import Base

# One row per status, and one for open dead letters, so that a count costs the same with a million receipts.
buffer_counts = Table(
    "buffer_counts",
    Base.metadata,
    Column("name", Text, primary_key=True),
    Column("value", Integer, nullable=False),
)

# A lightweight table: a view registered in Base.metadata would be taken for a table by autogenerate.
buffer_status = table(
    "v_buffer_status",
    column("total_receipts", Integer),
    column("pending", Integer),
    column("syncing", Integer),
    column("synced", Integer),
    column("failed", Integer),
    column("dlq_size", Integer),
    column("capacity", Integer),
    column("percent_full", Float),
)

# What RAISE says when a receipt is one too many; the repository knows the refusal by it.
BUFFER_FULL = "Buffer full"

SQLITE_VIEWS: Mapping[str, str] = {
    "v_buffer_status": """\
CREATE VIEW v_buffer_status AS
SELECT
    pending + syncing + synced + failed AS total_receipts,
    pending, syncing, synced, failed, dlq_size, capacity,
    ROUND(100.0 * (pending + syncing) / MAX(capacity, 1), 2) AS percent_full
FROM (
    SELECT
        COALESCE(MAX(CASE name WHEN 'pending' THEN value END), 0) AS pending,
        COALESCE(MAX(CASE name WHEN 'syncing' THEN value END), 0) AS syncing,
        COALESCE(MAX(CASE name WHEN 'synced' THEN value END), 0) AS synced,
        COALESCE(MAX(CASE name WHEN 'failed' THEN value END), 0) AS failed,
        COALESCE(MAX(CASE name WHEN 'open_dead_letters' THEN value END), 0) AS dlq_size,
        COALESCE((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), 200) AS capacity
    FROM buffer_counts
)""",
}

SQLITE_TRIGGERS: Mapping[str, str] = {
    # Facts.
    "trg_receipt_added": """\
CREATE TRIGGER trg_receipt_added AFTER INSERT ON receipts
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_added', NEW.id, NEW.created_at, json_object('pos_id', NEW.pos_id));
END""",
    "trg_receipt_attempt_failed": """\
CREATE TRIGGER trg_receipt_attempt_failed AFTER UPDATE OF retry_count ON receipts
WHEN NEW.retry_count > OLD.retry_count
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_attempt_failed', NEW.id, COALESCE(NEW.changed_at, unixepoch()),
            json_object('retry_count', NEW.retry_count, 'error', NEW.last_error));
END""",
    "trg_receipt_synced": """\
CREATE TRIGGER trg_receipt_synced AFTER UPDATE OF status ON receipts
WHEN NEW.status = 'synced' AND OLD.status <> 'synced'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_synced', NEW.id, NEW.synced_at,
            json_object('server_time', NEW.hlc_server_time, 'retry_count', NEW.retry_count));
END""",
    "trg_receipt_failed": """\
CREATE TRIGGER trg_receipt_failed AFTER INSERT ON dlq
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_failed', NEW.original_receipt_id, NEW.failed_at,
            json_object('reason', NEW.reason, 'retry_attempts', NEW.retry_attempts));
END""",
    "trg_receipt_requeued": """\
CREATE TRIGGER trg_receipt_requeued AFTER UPDATE OF resolved_at ON dlq
WHEN OLD.resolved_at IS NULL AND NEW.resolved_at IS NOT NULL AND NEW.resolution = 'requeued'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_requeued', NEW.original_receipt_id, NEW.resolved_at,
            json_object('actor', NEW.resolved_by, 'reason', NEW.resolution_reason));
END""",
    "trg_receipt_resolved": """\
CREATE TRIGGER trg_receipt_resolved AFTER UPDATE OF resolved_at ON dlq
WHEN OLD.resolved_at IS NULL AND NEW.resolved_at IS NOT NULL
    AND COALESCE(NEW.resolution, 'resolved') = 'resolved'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_resolved', NEW.original_receipt_id, NEW.resolved_at,
            json_object('actor', NEW.resolved_by, 'reason', NEW.resolution_reason));
END""",
    # Counts.
    "trg_count_receipt_added": """\
CREATE TRIGGER trg_count_receipt_added AFTER INSERT ON receipts
BEGIN
    UPDATE buffer_counts SET value = value + 1 WHERE name = NEW.status;
END""",
    "trg_count_receipt_moved": """\
CREATE TRIGGER trg_count_receipt_moved AFTER UPDATE OF status ON receipts
WHEN NEW.status <> OLD.status
BEGIN
    UPDATE buffer_counts SET value = value - 1 WHERE name = OLD.status;
    UPDATE buffer_counts SET value = value + 1 WHERE name = NEW.status;
END""",
    "trg_count_receipt_removed": """\
CREATE TRIGGER trg_count_receipt_removed AFTER DELETE ON receipts
BEGIN
    UPDATE buffer_counts SET value = value - 1 WHERE name = OLD.status;
END""",
    "trg_count_dead_letter_added": """\
CREATE TRIGGER trg_count_dead_letter_added AFTER INSERT ON dlq
WHEN NEW.resolved_at IS NULL
BEGIN
    UPDATE buffer_counts SET value = value + 1 WHERE name = 'open_dead_letters';
END""",
    "trg_count_dead_letter_moved": """\
CREATE TRIGGER trg_count_dead_letter_moved AFTER UPDATE OF resolved_at ON dlq
WHEN (NEW.resolved_at IS NULL) <> (OLD.resolved_at IS NULL)
BEGIN
    UPDATE buffer_counts SET value = value + CASE WHEN NEW.resolved_at IS NULL THEN 1 ELSE -1 END
    WHERE name = 'open_dead_letters';
END""",
    "trg_count_dead_letter_removed": """\
CREATE TRIGGER trg_count_dead_letter_removed AFTER DELETE ON dlq
WHEN OLD.resolved_at IS NULL
BEGIN
    UPDATE buffer_counts SET value = value - 1 WHERE name = 'open_dead_letters';
END""",
    # Guards.
    "trg_guard_capacity": """\
CREATE TRIGGER trg_guard_capacity BEFORE INSERT ON receipts
WHEN NEW.status IN ('pending', 'syncing')
    AND (SELECT SUM(value) FROM buffer_counts WHERE name IN ('pending', 'syncing'))
        >= COALESCE((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), 200)
BEGIN
    SELECT RAISE(ABORT, 'Buffer full');
END""",
    "trg_guard_undelivered": """\
CREATE TRIGGER trg_guard_undelivered BEFORE DELETE ON receipts
WHEN OLD.status IN ('pending', 'syncing')
BEGIN
    SELECT RAISE(ABORT, 'an undelivered receipt cannot be deleted');
END""",
    "trg_guard_dead_letter": """\
CREATE TRIGGER trg_guard_dead_letter BEFORE INSERT ON dlq
WHEN NEW.resolved_at IS NULL
    AND EXISTS (SELECT 1 FROM receipts WHERE id = NEW.original_receipt_id AND status IN ('synced', 'failed'))
BEGIN
    SELECT RAISE(ABORT, 'a synced or failed receipt cannot be dead-lettered');
END""",
    "trg_guard_failed": """\
CREATE TRIGGER trg_guard_failed BEFORE UPDATE OF status ON receipts
WHEN NEW.status = 'failed' AND OLD.status <> 'failed'
    AND NOT EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = NEW.id AND resolved_at IS NULL)
BEGIN
    SELECT RAISE(ABORT, 'a receipt fails through its dead letter: insert that first');
END""",
    "trg_guard_not_failed": """\
CREATE TRIGGER trg_guard_not_failed BEFORE UPDATE OF status ON receipts
WHEN NEW.status <> 'failed' AND OLD.status = 'failed'
    AND EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = NEW.id AND resolved_at IS NULL)
BEGIN
    SELECT RAISE(ABORT, 'a failed receipt has an open dead letter: resolve that first');
END""",
    "trg_guard_event_changed": """\
CREATE TRIGGER trg_guard_event_changed BEFORE UPDATE ON buffer_events
BEGIN
    SELECT RAISE(ABORT, 'buffer_events is append-only');
END""",
    "trg_guard_event_removed": """\
CREATE TRIGGER trg_guard_event_removed BEFORE DELETE ON buffer_events
WHEN OLD.timestamp > unixepoch() - 86400 * COALESCE(
    (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'retention_events_days'), 90)
BEGIN
    SELECT RAISE(ABORT, 'an event cannot be deleted before retention_events_days have passed');
END""",
}
