"""
The triggers and the status view of SQLite, as plain SQL, because models cannot declare them.

One trigger per fact writes it to `buffer_events`, whichever program changed the row, with the time stored in the row.
`trg_state_*` maintain `buffer_state`. `trg_guard_*` refuse changes that would break an invariant. The migrations have
their own copies of these texts; a test compares the two.
"""

from collections.abc import Mapping

from sqlalchemy import Connection, text
from sqlalchemy.schema import CreateIndex, CreateTable

from kkt_buffer.backend import Objects
from kkt_buffer.columns import ONLY_ON
from kkt_buffer.config import CONFIG_RULES, MOVED_AT
from kkt_buffer.models import metadata

# Used if the setting is not stored.
_CAPACITY = CONFIG_RULES["buffer_capacity"].default
_RETENTION = CONFIG_RULES["retention_events_days"].default

SQLITE_VIEWS: Mapping[str, str] = {
    "v_buffer_status": f"""\
CREATE VIEW v_buffer_status AS
SELECT
    pending + syncing + synced + failed AS total_receipts,
    pending, syncing, synced, failed, dlq_size, capacity,
    ROUND(100.0 * (pending + syncing) / MAX(capacity, 1), 2) AS percent_full
FROM (
    SELECT
        pending, syncing, synced, failed, open_dead_letters AS dlq_size,
        COALESCE((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), {_CAPACITY}) AS capacity
    FROM buffer_state
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
    "trg_receipt_completed": """\
CREATE TRIGGER trg_receipt_completed AFTER UPDATE OF held_at ON receipts
WHEN OLD.held_at IS NOT NULL AND NEW.held_at IS NULL AND NEW.status <> 'synced'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_completed', NEW.id, COALESCE(NEW.changed_at, unixepoch()),
            CASE WHEN NEW.digest IS NOT NULL THEN json_object('digest', NEW.digest) END);
END""",
    # The state.
    "trg_state_receipt_added": """\
CREATE TRIGGER trg_state_receipt_added AFTER INSERT ON receipts
BEGIN
    UPDATE buffer_state SET
        pending = pending + (NEW.status = 'pending'),
        syncing = syncing + (NEW.status = 'syncing'),
        synced = synced + (NEW.status = 'synced'),
        failed = failed + (NEW.status = 'failed'),
        hlc_local_time = MAX(hlc_local_time, NEW.hlc_local_time),
        hlc_logical_counter = CASE
            WHEN (NEW.hlc_local_time, NEW.hlc_logical_counter) > (hlc_local_time, hlc_logical_counter)
            THEN NEW.hlc_logical_counter ELSE hlc_logical_counter END,
        last_synced_at = CASE
            WHEN NEW.status = 'synced' THEN MAX(COALESCE(last_synced_at, NEW.synced_at), NEW.synced_at)
            ELSE last_synced_at END;
END""",
    "trg_state_receipt_moved": """\
CREATE TRIGGER trg_state_receipt_moved AFTER UPDATE OF status ON receipts
WHEN NEW.status <> OLD.status
BEGIN
    UPDATE buffer_state SET
        pending = pending + (NEW.status = 'pending') - (OLD.status = 'pending'),
        syncing = syncing + (NEW.status = 'syncing') - (OLD.status = 'syncing'),
        synced = synced + (NEW.status = 'synced') - (OLD.status = 'synced'),
        failed = failed + (NEW.status = 'failed') - (OLD.status = 'failed'),
        last_synced_at = CASE
            WHEN NEW.status = 'synced' THEN MAX(COALESCE(last_synced_at, NEW.synced_at), NEW.synced_at)
            ELSE last_synced_at END;
END""",
    "trg_state_receipt_removed": """\
CREATE TRIGGER trg_state_receipt_removed AFTER DELETE ON receipts
BEGIN
    UPDATE buffer_state SET
        pending = pending - (OLD.status = 'pending'),
        syncing = syncing - (OLD.status = 'syncing'),
        synced = synced - (OLD.status = 'synced'),
        failed = failed - (OLD.status = 'failed');
END""",
    "trg_state_dead_letter_added": """\
CREATE TRIGGER trg_state_dead_letter_added AFTER INSERT ON dlq
WHEN NEW.resolved_at IS NULL
BEGIN
    UPDATE buffer_state SET open_dead_letters = open_dead_letters + 1;
END""",
    "trg_state_dead_letter_moved": """\
CREATE TRIGGER trg_state_dead_letter_moved AFTER UPDATE OF resolved_at ON dlq
WHEN (NEW.resolved_at IS NULL) <> (OLD.resolved_at IS NULL)
BEGIN
    UPDATE buffer_state SET
        open_dead_letters = open_dead_letters + CASE WHEN NEW.resolved_at IS NULL THEN 1 ELSE -1 END;
END""",
    "trg_state_dead_letter_removed": """\
CREATE TRIGGER trg_state_dead_letter_removed AFTER DELETE ON dlq
WHEN OLD.resolved_at IS NULL
BEGIN
    UPDATE buffer_state SET open_dead_letters = open_dead_letters - 1;
END""",
    # Guards. Without the row of buffer_state the comparison is NULL; the insert must be refused then too.
    "trg_guard_capacity": f"""\
CREATE TRIGGER trg_guard_capacity BEFORE INSERT ON receipts
WHEN NEW.status IN ('pending', 'syncing')
    AND ((SELECT pending + syncing FROM buffer_state) < COALESCE(
        (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), {_CAPACITY}))
    IS NOT TRUE
BEGIN
    SELECT CASE WHEN EXISTS (SELECT 1 FROM buffer_state) THEN RAISE(ABORT, 'Buffer full')
        ELSE RAISE(ABORT, 'buffer_state has no row') END;
END""",
    "trg_guard_state": """\
CREATE TRIGGER trg_guard_state BEFORE DELETE ON buffer_state
BEGIN
    SELECT RAISE(ABORT, 'the row of buffer_state cannot be deleted');
END""",
    "trg_guard_acknowledged": """\
CREATE TRIGGER trg_guard_acknowledged BEFORE UPDATE OF
    id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest, inserted_digest ON receipts
WHEN NEW.id IS NOT OLD.id OR NEW.pos_id IS NOT OLD.pos_id OR NEW.created_at IS NOT OLD.created_at
    OR NEW.hlc_local_time IS NOT OLD.hlc_local_time OR NEW.hlc_logical_counter IS NOT OLD.hlc_logical_counter
    OR (OLD.held_at IS NULL AND (NEW.fiscal_doc IS NOT OLD.fiscal_doc OR NEW.digest IS NOT OLD.digest
        OR NEW.inserted_digest IS NOT OLD.inserted_digest))
BEGIN
    SELECT RAISE(ABORT, 'an acknowledged receipt does not change');
END""",
    "trg_guard_held": """\
CREATE TRIGGER trg_guard_held BEFORE UPDATE OF held_at ON receipts
WHEN NEW.held_at IS NOT NULL AND NEW.held_at IS NOT OLD.held_at
BEGIN
    SELECT RAISE(ABORT, 'held_at is set when a receipt is stored, never later');
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
    "trg_guard_event_removed": f"""\
CREATE TRIGGER trg_guard_event_removed BEFORE DELETE ON buffer_events
WHEN OLD.timestamp > unixepoch() - 86400 * COALESCE(
    (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'retention_events_days'), {_RETENTION})
BEGIN
    SELECT RAISE(ABORT, 'an event cannot be deleted before retention_events_days have passed');
END""",
}


# What the triggers of a moved buffer say: this, and the name of the target.
MOVED = "this buffer was moved to "


def moved_triggers(target: str) -> Mapping[str, str]:
    """
    The triggers that refuse every change of a buffer that was moved, by whichever program.

    The release of the schema is still recorded: a later release upgrades the file too, to read it. So is the end of
    the move.
    """
    message = f"{MOVED}{target}".replace("'", "''")
    row = {"INSERT": "NEW", "UPDATE": "NEW", "DELETE": "OLD"}
    still_recorded = f"('release', '{MOVED_AT}')"
    return {
        (name := f"trg_moved_{table}_{verb.lower()}"): f"""\
CREATE TRIGGER {name} BEFORE {verb} ON {table}{f" WHEN {row[verb]}.key NOT IN {still_recorded}" * (table == "config")}
BEGIN
    SELECT RAISE(ABORT, '{message}');
END"""
        for table in ("receipts", "dlq", "buffer_events", "config")
        for verb in row
    }


def objects(connection: Connection) -> tuple[Objects, Objects]:
    """The objects of the schema, expected and found, as the SQL text that SQLite keeps."""
    expected = {("view", name): sql for name, sql in SQLITE_VIEWS.items()}
    expected |= {("trigger", name): sql for name, sql in SQLITE_TRIGGERS.items()}
    for table in metadata.tables.values():
        if table.info.get(ONLY_ON, "sqlite") == "sqlite":
            expected["table", table.name] = str(CreateTable(table).compile(connection)).strip()
            for index in table.indexes:
                expected["index", str(index.name)] = str(CreateIndex(index).compile(connection)).strip()
    rows = connection.execute(text("SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
    found = {
        (kind, name): sql
        for kind, name, table, sql in rows
        if (kind, name) in expected or (kind == "index" and ("table", table) in expected)
    }
    return expected, found
