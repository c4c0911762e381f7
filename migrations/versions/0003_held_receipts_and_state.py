"""
Add held receipts and digests, keep the state of the buffer in one row, and make the indexes smaller.

Danger: the downgrade refuses while a receipt is held, because the older release would deliver it. It forgets the
digests, and the greatest timestamp if its receipt was pruned: then a clock that was set back could break the order.
"""

import hashlib
from typing import TYPE_CHECKING, cast

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

if TYPE_CHECKING:
    import sqlite3

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

VIEW = """\
CREATE VIEW v_buffer_status AS
SELECT
    pending + syncing + synced + failed AS total_receipts,
    pending, syncing, synced, failed, dlq_size, capacity,
    ROUND(100.0 * (pending + syncing) / MAX(capacity, 1), 2) AS percent_full
FROM (
    SELECT
        pending, syncing, synced, failed, open_dead_letters AS dlq_size,
        COALESCE((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), 200) AS capacity
    FROM buffer_state
)"""

# The trg_state_* triggers replace the trg_count_* triggers of buffer_counts.
TRIGGERS = (
    """\
CREATE TRIGGER trg_receipt_completed AFTER UPDATE OF held_at ON receipts
WHEN OLD.held_at IS NOT NULL AND NEW.held_at IS NULL AND NEW.status <> 'synced'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_completed', NEW.id, COALESCE(NEW.changed_at, unixepoch()),
            CASE WHEN NEW.digest IS NOT NULL THEN json_object('digest', NEW.digest) END);
END""",
    """\
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
    """\
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
    """\
CREATE TRIGGER trg_state_receipt_removed AFTER DELETE ON receipts
BEGIN
    UPDATE buffer_state SET
        pending = pending - (OLD.status = 'pending'),
        syncing = syncing - (OLD.status = 'syncing'),
        synced = synced - (OLD.status = 'synced'),
        failed = failed - (OLD.status = 'failed');
END""",
    """\
CREATE TRIGGER trg_state_dead_letter_added AFTER INSERT ON dlq
WHEN NEW.resolved_at IS NULL
BEGIN
    UPDATE buffer_state SET open_dead_letters = open_dead_letters + 1;
END""",
    """\
CREATE TRIGGER trg_state_dead_letter_moved AFTER UPDATE OF resolved_at ON dlq
WHEN (NEW.resolved_at IS NULL) <> (OLD.resolved_at IS NULL)
BEGIN
    UPDATE buffer_state SET
        open_dead_letters = open_dead_letters + CASE WHEN NEW.resolved_at IS NULL THEN 1 ELSE -1 END;
END""",
    """\
CREATE TRIGGER trg_state_dead_letter_removed AFTER DELETE ON dlq
WHEN OLD.resolved_at IS NULL
BEGIN
    UPDATE buffer_state SET open_dead_letters = open_dead_letters - 1;
END""",
    """\
CREATE TRIGGER trg_guard_capacity BEFORE INSERT ON receipts
WHEN NEW.status IN ('pending', 'syncing')
    AND ((SELECT pending + syncing FROM buffer_state) < COALESCE(
        (SELECT CAST(value AS INTEGER) FROM config WHERE key = 'buffer_capacity'), 200))
    IS NOT TRUE
BEGIN
    SELECT CASE WHEN EXISTS (SELECT 1 FROM buffer_state) THEN RAISE(ABORT, 'Buffer full')
        ELSE RAISE(ABORT, 'buffer_state has no row') END;
END""",
    """\
CREATE TRIGGER trg_guard_state BEFORE DELETE ON buffer_state
BEGIN
    SELECT RAISE(ABORT, 'the row of buffer_state cannot be deleted');
END""",
    """\
CREATE TRIGGER trg_guard_acknowledged BEFORE UPDATE OF
    id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest, inserted_digest ON receipts
WHEN NEW.id IS NOT OLD.id OR NEW.pos_id IS NOT OLD.pos_id OR NEW.created_at IS NOT OLD.created_at
    OR NEW.hlc_local_time IS NOT OLD.hlc_local_time OR NEW.hlc_logical_counter IS NOT OLD.hlc_logical_counter
    OR (OLD.held_at IS NULL AND (NEW.fiscal_doc IS NOT OLD.fiscal_doc OR NEW.digest IS NOT OLD.digest
        OR NEW.inserted_digest IS NOT OLD.inserted_digest))
BEGIN
    SELECT RAISE(ABORT, 'an acknowledged receipt does not change');
END""",
    """\
CREATE TRIGGER trg_guard_held BEFORE UPDATE OF held_at ON receipts
WHEN NEW.held_at IS NOT NULL AND NEW.held_at IS NOT OLD.held_at
BEGIN
    SELECT RAISE(ABORT, 'held_at is set when a receipt is stored, never later');
END""",
)

OLD_VIEW = """\
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
)"""

OLD_TRIGGERS = (
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
)

# typeof(): another program may have stored text in a number column.
STATE = """\
INSERT INTO buffer_state
SELECT
    1,
    (SELECT COUNT(*) FROM receipts WHERE status = 'pending'),
    (SELECT COUNT(*) FROM receipts WHERE status = 'syncing'),
    (SELECT COUNT(*) FROM receipts WHERE status = 'synced'),
    (SELECT COUNT(*) FROM receipts WHERE status = 'failed'),
    (SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL),
    COALESCE(MAX(hlc_local_time), 0),
    COALESCE(MAX(hlc_logical_counter), -1),
    (SELECT MAX(synced_at) FROM receipts WHERE status = 'synced' AND typeof(synced_at) = 'integer')
FROM (
    SELECT hlc_local_time, hlc_logical_counter FROM receipts
    WHERE typeof(hlc_local_time) = 'integer' AND typeof(hlc_logical_counter) = 'integer'
    ORDER BY hlc_local_time DESC, hlc_logical_counter DESC LIMIT 1)"""

COUNTS = """\
INSERT INTO buffer_counts
SELECT 'pending', pending FROM buffer_state
UNION ALL SELECT 'syncing', syncing FROM buffer_state
UNION ALL SELECT 'synced', synced FROM buffer_state
UNION ALL SELECT 'failed', failed FROM buffer_state
UNION ALL SELECT 'open_dead_letters', open_dead_letters FROM buffer_state"""

# Revision 0001 writes all default settings within a second. If lease_seconds has the same time as another default
# (or one second later), it was not changed since. In an adopted file `version` is older, but retry_backoff_max is not.
UNTOUCHED = """\
key = 'lease_seconds' AND EXISTS (
    SELECT 1 FROM config AS beside
    WHERE (beside.key = 'version' OR (beside.key = 'retry_backoff_max' AND beside.value = '300'))
        AND config.updated_at - beside.updated_at BETWEEN 0 AND 1)"""

HLC = ["hlc_local_time", "hlc_logical_counter"]
INDEXES = (
    ("idx_receipts_status", [*HLC, "next_attempt_at"], "status = 'pending' AND held_at IS NULL"),
    ("idx_receipts_pos_id", ["pos_id", *HLC, "next_attempt_at"], "status = 'pending' AND held_at IS NULL"),
    ("idx_receipts_hlc", HLC, "status IN ('syncing', 'failed')"),
    ("idx_receipts_held", HLC, "held_at IS NOT NULL"),
)
OLD_ORDER = ["COALESCE(hlc_server_time, hlc_local_time)", "hlc_logical_counter", "next_attempt_at"]
OLD_INDEXES = (
    ("idx_receipts_status", OLD_ORDER, "status = 'pending'"),
    ("idx_receipts_pos_id", ["pos_id", *OLD_ORDER], "status = 'pending'"),
    ("idx_receipts_hlc", HLC, None),
    ("idx_receipts_undelivered", ["created_at"], "status <> 'synced'"),
)


def drop_triggers(statements: tuple[str, ...]) -> None:
    """Drop the triggers that these statements create."""
    for statement in statements:
        op.execute(f"DROP TRIGGER {statement.split(maxsplit=3)[2]}")


def create_indexes(indexes: tuple[tuple[str, list[str], str | None], ...]) -> None:
    """Create indexes on receipts."""
    for name, columns, where in indexes:
        op.create_index(
            name,
            "receipts",
            [sa.text(column) if "(" in column else column for column in columns],
            sqlite_where=None if where is None else sa.text(where),
        )


def record_digests() -> None:
    """
    Compute the digest of each document that is not synced; the synced ones may be too many.

    CAST AS BLOB: the driver refuses to pass invalid UTF-8 to Python as text.
    """
    driver = cast("sqlite3.Connection", op.get_bind().connection.dbapi_connection)
    driver.create_function("digest_of_document", 1, lambda raw: hashlib.sha256(raw).hexdigest())
    op.execute("UPDATE receipts SET digest = digest_of_document(CAST(fiscal_doc AS BLOB)) WHERE status <> 'synced'")
    driver.create_function("digest_of_document", 1, None)


def upgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        return  # no server ever had this schema: 0004 makes the whole of it there
    op.execute("DROP VIEW v_buffer_status")
    drop_triggers(OLD_TRIGGERS)
    op.drop_table("buffer_counts")
    op.create_table(
        "buffer_state",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("pending", sa.Integer(), nullable=False),
        sa.Column("syncing", sa.Integer(), nullable=False),
        sa.Column("synced", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("open_dead_letters", sa.Integer(), nullable=False),
        sa.Column("hlc_local_time", sa.Integer(), nullable=False),
        sa.Column("hlc_logical_counter", sa.Integer(), nullable=False),
        sa.Column("last_synced_at", sa.Integer(), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_buffer_state_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_buffer_state")),
        sqlite_strict=True,
    )
    op.execute(STATE)  # while the old indexes exist, which make it fast
    # The CHECK is added with its column, so that the table need not be rebuilt.
    op.execute(
        "ALTER TABLE receipts ADD COLUMN held_at INTEGER CONSTRAINT ck_receipts_held"
        " CHECK (held_at IS NULL OR status IN ('pending', 'failed'))"
    )
    op.add_column("receipts", sa.Column("digest", sa.Text(), nullable=True))
    op.add_column("receipts", sa.Column("inserted_digest", sa.Text(), nullable=True))
    record_digests()
    for name, _, _ in OLD_INDEXES:
        op.drop_index(name, "receipts")
    create_indexes(INDEXES)
    # updated_at stays unchanged: the downgrade recognises the default by it.
    op.execute(f"UPDATE config SET value = '60' WHERE value = '300' AND {UNTOUCHED}")
    op.execute(VIEW)
    for statement in TRIGGERS:
        op.execute(statement)


def downgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        return  # no server ever had this schema: 0004 makes the whole of it there
    # A discarded receipt still has its held_at, and no open dead letter: no release delivers it.
    held = op.get_bind().scalar(
        sa.text(
            "SELECT COUNT(*) FROM receipts WHERE held_at IS NOT NULL AND (status = 'pending'"
            " OR EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id AND resolved_at IS NULL))"
        )
    )
    if held:
        raise CommandError(
            f"refusing to forget that {held} receipts are held: the older release would deliver them before they are "
            "printed. Nothing was changed. Complete or discard them first, or keep this release."
        )
    op.execute("DROP VIEW v_buffer_status")
    drop_triggers(TRIGGERS)
    op.create_table(
        "buffer_counts",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_buffer_counts")),
    )
    op.execute(COUNTS)
    op.drop_table("buffer_state")
    for name, _, _ in INDEXES:
        op.drop_index(name, "receipts")
    # The CHECK of held_at is dropped with its column.
    for column in ("inserted_digest", "digest", "held_at"):
        op.execute(f"ALTER TABLE receipts DROP COLUMN {column}")
    create_indexes(OLD_INDEXES)
    op.execute(f"UPDATE config SET value = '300' WHERE value = '60' AND {UNTOUCHED}")
    op.execute(OLD_VIEW)
    for statement in OLD_TRIGGERS:
        op.execute(statement)
