"""
Add leases, backoff, and the resolution of a dead letter.

Danger: receipts that were `syncing` before leases existed become pending, and may be sent a second time. The downgrade
does the same with leased receipts, and forgets their next attempt times. It refuses if a dead letter was requeued or
resolved, because the older schema cannot store the difference.
"""

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TRIGGERS = (
    """\
CREATE TRIGGER trg_receipt_requeued AFTER UPDATE OF resolved_at ON dlq
WHEN OLD.resolved_at IS NULL AND NEW.resolved_at IS NOT NULL AND NEW.resolution = 'requeued'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_requeued', NEW.original_receipt_id, NEW.resolved_at,
            json_object('actor', NEW.resolved_by, 'reason', NEW.resolution_reason));
END""",
    """\
CREATE TRIGGER trg_receipt_resolved AFTER UPDATE OF resolved_at ON dlq
WHEN OLD.resolved_at IS NULL AND NEW.resolved_at IS NOT NULL
    AND COALESCE(NEW.resolution, 'resolved') = 'resolved'
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    VALUES ('receipt_resolved', NEW.original_receipt_id, NEW.resolved_at,
            json_object('actor', NEW.resolved_by, 'reason', NEW.resolution_reason));
END""",
)

HLC_ORDER = "COALESCE(hlc_server_time, hlc_local_time)"
LEASE = (
    "(status = 'syncing') = (lease_token IS NOT NULL) AND (lease_token IS NULL) = (lease_taken_at IS NULL)"
    " AND (lease_token IS NULL) = (lease_expires_at IS NULL)"
)


def index_pending(*more: str) -> None:
    """Create the two indexes on pending receipts again, with `more` columns at the end."""
    for name, first in (("idx_receipts_status", []), ("idx_receipts_pos_id", ["pos_id"])):
        op.drop_index(name, "receipts")
        op.create_index(
            name,
            "receipts",
            [*first, sa.text(HLC_ORDER), "hlc_logical_counter", *more],
            sqlite_where=sa.text("status = 'pending'"),
        )


def upgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        return  # no server ever had this schema: 0004 makes the whole of it there
    op.execute("UPDATE receipts SET status = 'pending' WHERE status = 'syncing'")
    op.add_column("receipts", sa.Column("next_attempt_at", sa.Integer(), nullable=True))
    op.add_column("receipts", sa.Column("lease_token", sa.Text(), nullable=True))
    op.add_column("receipts", sa.Column("lease_taken_at", sa.Integer(), nullable=True))
    # The CHECK is added with the last lease column, so that the table need not be rebuilt.
    op.execute(f"ALTER TABLE receipts ADD COLUMN lease_expires_at INTEGER CONSTRAINT ck_receipts_lease CHECK ({LEASE})")
    op.add_column("dlq", sa.Column("resolution", sa.Text(), nullable=True))
    # Null stays for dead letters that another program closed; it counts as resolved.
    op.execute("UPDATE dlq SET resolution = 'delivered' WHERE resolved_by = 'delivery'")
    index_pending("next_attempt_at")
    op.create_index(
        "idx_receipts_lease",
        "receipts",
        ["lease_token", "lease_expires_at", "lease_taken_at"],
        sqlite_where=sa.text("status = 'syncing'"),
    )
    op.create_index("idx_receipts_synced", "receipts", ["synced_at"], sqlite_where=sa.text("status = 'synced'"))
    for statement in TRIGGERS:
        op.execute(statement)


def downgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        return  # no server ever had this schema: 0004 makes the whole of it there
    closed = op.get_bind().scalar(sa.text("SELECT COUNT(*) FROM dlq WHERE resolution IN ('requeued', 'resolved')"))
    if closed:
        raise CommandError(
            f"refusing to forget the resolution of {closed} dead letters that an operator requeued or resolved. "
            "Nothing was changed. Prune them when their retention is over, or keep this release."
        )
    for name in ("trg_receipt_requeued", "trg_receipt_resolved"):
        op.execute(f"DROP TRIGGER {name}")
    for name in ("idx_receipts_lease", "idx_receipts_synced"):
        op.drop_index(name, "receipts")
    index_pending()
    op.execute(
        "UPDATE receipts SET status = 'pending', lease_token = NULL, lease_taken_at = NULL, lease_expires_at = NULL"
        " WHERE status = 'syncing'"
    )
    # The CHECK belongs to the column lease_expires_at, so drop that one first.
    for column in ("lease_expires_at", "lease_taken_at", "lease_token", "next_attempt_at"):
        op.execute(f"ALTER TABLE receipts DROP COLUMN {column}")
    op.execute("ALTER TABLE dlq DROP COLUMN resolution")
