"""
Create the receipt buffer, or adopt the one of the sqlite3 version.

Danger: the downgrade drops every table of the buffer. It refuses while there are receipts, dead letters, events or
changed settings. It does not restore the tables of the sqlite3 version: use the backup made at the adoption.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError, load_python_file

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

VIEWS = (
    """\
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
)

TRIGGERS = (
    """\
CREATE TRIGGER trg_receipt_added AFTER INSERT ON receipts
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_added', NEW.id, NEW.created_at, json_object('pos_id', NEW.pos_id));
END""",
    """\
CREATE TRIGGER trg_receipt_attempt_failed AFTER UPDATE OF retry_count ON receipts
WHEN NEW.retry_count > OLD.retry_count
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_attempt_failed', NEW.id, COALESCE(NEW.changed_at, unixepoch()),
            json_object('retry_count', NEW.retry_count, 'error', NEW.last_error));
END""",
    """\
CREATE TRIGGER trg_receipt_synced AFTER UPDATE OF status ON receipts
WHEN NEW.status = 'synced' AND OLD.status <> 'synced'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_synced', NEW.id, NEW.synced_at,
            json_object('server_time', NEW.hlc_server_time, 'retry_count', NEW.retry_count));
END""",
    """\
CREATE TRIGGER trg_receipt_failed AFTER INSERT ON dlq
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_failed', NEW.original_receipt_id, NEW.failed_at,
            json_object('reason', NEW.reason, 'retry_attempts', NEW.retry_attempts));
END""",
    """\
CREATE TRIGGER trg_count_receipt_added AFTER INSERT ON receipts
BEGIN
    UPDATE buffer_counts SET value = value + 1 WHERE name = NEW.status;
END""",
    """\
CREATE TRIGGER trg_count_receipt_moved AFTER UPDATE OF status ON receipts
WHEN NEW.status <> OLD.status
BEGIN
    UPDATE buffer_counts SET value = value - 1 WHERE name = OLD.status;
    UPDATE buffer_counts SET value = value + 1 WHERE name = NEW.status;
END""",
    """\
CREATE TRIGGER trg_count_receipt_removed AFTER DELETE ON receipts
BEGIN
    UPDATE buffer_counts SET value = value - 1 WHERE name = OLD.status;
END""",
    """\
CREATE TRIGGER trg_count_dead_letter_added AFTER INSERT ON dlq
WHEN NEW.resolved_at IS NULL
BEGIN
    UPDATE buffer_counts SET value = value + 1 WHERE name = 'open_dead_letters';
END""",
    """\
CREATE TRIGGER trg_count_dead_letter_moved AFTER UPDATE OF resolved_at ON dlq
WHEN (NEW.resolved_at IS NULL) <> (OLD.resolved_at IS NULL)
BEGIN
    UPDATE buffer_counts SET value = value + CASE WHEN NEW.resolved_at IS NULL THEN 1 ELSE -1 END
    WHERE name = 'open_dead_letters';
END""",
    """\
CREATE TRIGGER trg_count_dead_letter_removed AFTER DELETE ON dlq
WHEN OLD.resolved_at IS NULL
BEGIN
    UPDATE buffer_counts SET value = value - 1 WHERE name = 'open_dead_letters';
END""",
    """\
CREATE TRIGGER trg_guard_capacity BEFORE INSERT ON receipts
WHEN NEW.status IN ('pending', 'syncing')
    AND (SELECT SUM(value) FROM buffer_counts WHERE name IN ('pending', 'syncing'))
        >= COALESCE((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), 200)
BEGIN
    SELECT RAISE(ABORT, 'Buffer full');
END""",
    """\
CREATE TRIGGER trg_guard_undelivered BEFORE DELETE ON receipts
WHEN OLD.status IN ('pending', 'syncing')
BEGIN
    SELECT RAISE(ABORT, 'an undelivered receipt cannot be deleted');
END""",
    """\
CREATE TRIGGER trg_guard_dead_letter BEFORE INSERT ON dlq
WHEN NEW.resolved_at IS NULL
    AND EXISTS (SELECT 1 FROM receipts WHERE id = NEW.original_receipt_id AND status IN ('synced', 'failed'))
BEGIN
    SELECT RAISE(ABORT, 'a synced or failed receipt cannot be dead-lettered');
END""",
    """\
CREATE TRIGGER trg_guard_failed BEFORE UPDATE OF status ON receipts
WHEN NEW.status = 'failed' AND OLD.status <> 'failed'
    AND NOT EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = NEW.id AND resolved_at IS NULL)
BEGIN
    SELECT RAISE(ABORT, 'a receipt fails through its dead letter: insert that first');
END""",
    """\
CREATE TRIGGER trg_guard_not_failed BEFORE UPDATE OF status ON receipts
WHEN NEW.status <> 'failed' AND OLD.status = 'failed'
    AND EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = NEW.id AND resolved_at IS NULL)
BEGIN
    SELECT RAISE(ABORT, 'a failed receipt has an open dead letter: resolve that first');
END""",
    """\
CREATE TRIGGER trg_guard_event_changed BEFORE UPDATE ON buffer_events
BEGIN
    SELECT RAISE(ABORT, 'buffer_events is append-only');
END""",
    """\
CREATE TRIGGER trg_guard_event_removed BEFORE DELETE ON buffer_events
WHEN OLD.timestamp > unixepoch() - 86400 * COALESCE(
    (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'retention_events_days'), 90)
BEGIN
    SELECT RAISE(ABORT, 'an event cannot be deleted before retention_events_days have passed');
END""",
)

CONFIG = {
    "version": "1.0.0",
    "buffer_capacity": "200",
    "circuit_breaker_threshold": "5",
    "circuit_breaker_timeout": "60",
    "max_retry_attempts": "20",
    "retry_backoff_initial": "5",
    "retry_backoff_max": "300",
    "lease_seconds": "300",
    "retention_synced_days": "7",
    "retention_dlq_days": "90",
    "retention_events_days": "90",
    "ofd_deadline_days": "30",
}

COUNTS = {
    "pending": "SELECT COUNT(*) FROM receipts WHERE status = 'pending'",
    "syncing": "SELECT COUNT(*) FROM receipts WHERE status = 'syncing'",
    "synced": "SELECT COUNT(*) FROM receipts WHERE status = 'synced'",
    "failed": "SELECT COUNT(*) FROM receipts WHERE status = 'failed'",
    "open_dead_letters": "SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL",
}

HLC_ORDER = "COALESCE(hlc_server_time, hlc_local_time)"


def upgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        return  # no server ever had this schema: 0004 makes the whole of it there
    adoption = load_python_file(Path(__file__).parents[1], "adoption.py")
    predecessor = adoption.Predecessor(op.get_bind())
    predecessor.set_aside()
    op.create_table(
        "receipts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("pos_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Integer(), nullable=False),
        sa.Column("hlc_local_time", sa.Integer(), nullable=False),
        sa.Column("hlc_logical_counter", sa.Integer(), nullable=False),
        sa.Column("hlc_server_time", sa.Integer(), nullable=True),
        sa.Column("fiscal_doc", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("retry_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("synced_at", sa.Integer(), nullable=True),
        sa.Column("changed_at", sa.Integer(), nullable=True),
        sa.CheckConstraint("status IN ('pending', 'syncing', 'synced', 'failed')", name=op.f("ck_receipts_status")),
        sa.CheckConstraint("retry_count >= 0", name=op.f("ck_receipts_retry_count")),
        sa.CheckConstraint("hlc_logical_counter >= 0", name=op.f("ck_receipts_hlc_logical_counter")),
        sa.CheckConstraint(
            "(status = 'synced') = (synced_at IS NOT NULL) AND (status = 'synced') = (hlc_server_time IS NOT NULL)",
            name=op.f("ck_receipts_synced"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_receipts")),
    )
    op.create_index(
        "idx_receipts_status",
        "receipts",
        [sa.text(HLC_ORDER), "hlc_logical_counter"],
        sqlite_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "idx_receipts_pos_id",
        "receipts",
        ["pos_id", sa.text(HLC_ORDER), "hlc_logical_counter"],
        sqlite_where=sa.text("status = 'pending'"),
    )
    op.create_index("idx_receipts_hlc", "receipts", ["hlc_local_time", "hlc_logical_counter"])
    op.create_index("idx_receipts_undelivered", "receipts", ["created_at"], sqlite_where=sa.text("status <> 'synced'"))
    op.create_table(
        "dlq",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("original_receipt_id", sa.Text(), nullable=False),
        sa.Column("failed_at", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("fiscal_doc", sa.Text(), nullable=False),
        sa.Column("retry_attempts", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("resolved_at", sa.Integer(), nullable=True),
        sa.Column("resolved_by", sa.Text(), nullable=True),
        sa.Column("resolution_reason", sa.Text(), nullable=True),
        sa.CheckConstraint("(resolved_at IS NULL) = (resolved_by IS NULL)", name=op.f("ck_dlq_resolved")),
        sa.ForeignKeyConstraint(
            ["original_receipt_id"], ["receipts.id"], name=op.f("fk_dlq_original_receipt_id_receipts")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dlq")),
    )
    op.create_index("idx_dlq_original_receipt", "dlq", ["original_receipt_id"])
    op.create_index(
        "idx_dlq_open", "dlq", ["original_receipt_id"], unique=True, sqlite_where=sa.text("resolved_at IS NULL")
    )
    op.create_table(
        "buffer_events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("receipt_id", sa.Text(), nullable=True),
        sa.Column("timestamp", sa.Integer(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_buffer_events")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "idx_events_receipt_id", "buffer_events", ["receipt_id"], sqlite_where=sa.text("receipt_id IS NOT NULL")
    )
    op.create_index(
        "idx_events_type",
        "buffer_events",
        ["event_type"],
        sqlite_where=sa.text("event_type NOT IN ('receipt_added', 'receipt_synced')"),
    )
    config = op.create_table(
        "config",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_config")),
    )
    counts = op.create_table(
        "buffer_counts",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_buffer_counts")),
    )
    predecessor.adopt()
    now = sa.text("unixepoch()")
    for key, value in CONFIG.items():
        op.execute(sa.insert(config).prefix_with("OR IGNORE").values(key=key, value=value, updated_at=now))
    for name, count in COUNTS.items():
        op.execute(sa.insert(counts).values(name=name, value=sa.text(f"({count})")))
    for statement in VIEWS + TRIGGERS:
        op.execute(statement)
    predecessor.put_back()


def downgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        return  # no server ever had this schema: 0004 makes the whole of it there
    for table, what in (("receipts", "receipts"), ("dlq", "dead letters"), ("buffer_events", "events")):
        held = op.get_bind().scalar(sa.text(f"SELECT COUNT(*) FROM {table}"))
        if held:
            raise CommandError(
                f"refusing to drop the buffer: it holds {held} {what}. Nothing was changed. "
                "Deliver and prune them, or keep a backup and delete the file yourself."
            )
    stored = op.get_bind().execute(sa.text("SELECT key, value FROM config WHERE key <> 'release' ORDER BY key"))
    own = [row.key for row in stored if CONFIG.get(row.key) != row.value]
    if own:
        raise CommandError(
            f"refusing to drop the buffer: it has changed settings ({', '.join(own)}). Nothing was changed. "
            "Keep a backup and delete the file yourself."
        )
    op.execute("DROP VIEW v_buffer_status")
    for table in ("buffer_counts", "config", "buffer_events", "dlq", "receipts"):
        op.drop_table(table)
