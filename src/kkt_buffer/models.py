"""
The tables, the allowed values of their columns, and the allowed transitions between statuses.

`metadata` contains every table of a buffer. Triggers and the status view are in the `schema` module of each engine;
`migrations` creates all of them.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kkt_buffer.columns import ONLY_ON, JsonText, Key, TransactionId, WholeNumber, partial_index
from kkt_buffer.documents import is_intact
from kkt_buffer.errors import BufferDamagedError, InvalidDocumentError


class ReceiptStatus(StrEnum):
    """The delivery state of a receipt. *Syncing* means leased by a worker, *failed* means dead-lettered."""

    PENDING = "pending"
    SYNCING = "syncing"
    SYNCED = "synced"
    FAILED = "failed"


TRANSITIONS: Mapping[ReceiptStatus, frozenset[ReceiptStatus]] = {
    ReceiptStatus.PENDING: frozenset({ReceiptStatus.SYNCING, ReceiptStatus.SYNCED, ReceiptStatus.FAILED}),
    ReceiptStatus.SYNCING: frozenset({ReceiptStatus.PENDING, ReceiptStatus.SYNCED, ReceiptStatus.FAILED}),
    # A delivery is recorded even for a dead-lettered receipt. Only an operator's requeue makes it pending again.
    ReceiptStatus.FAILED: frozenset({ReceiptStatus.SYNCED}),
    ReceiptStatus.SYNCED: frozenset(),
}


class Resolution(StrEnum):
    """How a dead letter was closed. Null if another program closed it; that counts as resolved."""

    DELIVERED = "delivered"
    REQUEUED = "requeued"
    RESOLVED = "resolved"


FACT_PREFIX = "receipt_"  # of the types that only triggers write


class EventType(StrEnum):
    """
    The types of the rows in `buffer_events` that this package writes. Those that begin with `receipt_` are facts. Only
    triggers write them, except `receipt_repaired`: the migration that adopts a file of the `sqlite3` version writes it.
    A service may add types of its own.
    """

    RECEIPT_ADDED = "receipt_added"
    RECEIPT_COMPLETED = "receipt_completed"
    RECEIPT_ATTEMPT_FAILED = "receipt_attempt_failed"
    RECEIPT_SYNCED = "receipt_synced"
    RECEIPT_FAILED = "receipt_failed"
    RECEIPT_REQUEUED = "receipt_requeued"
    RECEIPT_RESOLVED = "receipt_resolved"
    RECEIPT_REPAIRED = "receipt_repaired"
    CIRCUIT_OPENED = "circuit_opened"
    CIRCUIT_CLOSED = "circuit_closed"
    SYNC_STARTED = "sync_started"
    SYNC_COMPLETED = "sync_completed"
    SYNC_FAILED = "sync_failed"
    MAINTENANCE_STARTED = "maintenance_started"
    MAINTENANCE_COMPLETED = "maintenance_completed"


class StatusText(TypeDecorator[ReceiptStatus]):
    """A `ReceiptStatus` stored as TEXT."""

    impl = Text
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> ReceiptStatus | None:
        """Decode, for SQLAlchemy."""
        del dialect
        try:
            return None if value is None else ReceiptStatus(value)
        except ValueError as error:
            raise BufferDamagedError.found("the buffer", f"a receipt has the status {value!r}") from error


class Base(DeclarativeBase):
    """The base of the models. Every constraint gets a name, so that a migration can refer to it."""

    metadata = MetaData(
        naming_convention={
            "ix": "idx_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads a plain dict)
        str: Text,
        int: WholeNumber,
        ReceiptStatus: StatusText,
    }


metadata = Base.metadata

# The conditions of the partial indexes below. SQLite uses such an index only for a query that repeats its condition
# literally, so a query takes these texts from here.
PENDING_ONLY = "status = 'pending' AND held_at IS NULL"
UNDELIVERED_REST = "status IN ('syncing', 'failed')"
HELD_ONLY = "held_at IS NOT NULL"
SYNCING_ONLY = "status = 'syncing'"
SYNCED_ONLY = "status = 'synced'"
OPEN_ONLY = "resolved_at IS NULL"
COMMON_EVENTS = (EventType.RECEIPT_ADDED, EventType.RECEIPT_SYNCED)  # every delivered receipt has one of each
RARE_EVENTS = f"event_type NOT IN ({', '.join(repr(str(kind)) for kind in COMMON_EVENTS)})"


class Receipt(Base):
    """A fiscal receipt and the state of its delivery. Times are Unix seconds."""

    __tablename__ = "receipts"

    id: Mapped[str] = mapped_column(Key, primary_key=True)
    pos_id: Mapped[str]
    created_at: Mapped[int]
    hlc_local_time: Mapped[int]
    hlc_logical_counter: Mapped[int]
    hlc_server_time: Mapped[int | None]
    fiscal_doc: Mapped[str]
    status: Mapped[ReceiptStatus] = mapped_column(server_default=text("'pending'"))
    retry_count: Mapped[int] = mapped_column(server_default=text("0"))
    last_error: Mapped[str | None]
    synced_at: Mapped[int | None]
    changed_at: Mapped[int | None]
    next_attempt_at: Mapped[int | None]
    lease_token: Mapped[str | None]
    lease_taken_at: Mapped[int | None]
    lease_expires_at: Mapped[int | None]
    held_at: Mapped[int | None]
    digest: Mapped[str | None]
    inserted_digest: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(f"status IN ({', '.join(repr(str(status)) for status in ReceiptStatus)})", name="status"),
        CheckConstraint("retry_count >= 0", name="retry_count"),
        CheckConstraint("hlc_logical_counter >= 0", name="hlc_logical_counter"),
        CheckConstraint(
            "(status = 'synced') = (synced_at IS NOT NULL) AND (status = 'synced') = (hlc_server_time IS NOT NULL)",
            name="synced",
        ),
        CheckConstraint(
            "(status = 'syncing') = (lease_token IS NOT NULL) AND (lease_token IS NULL) = (lease_taken_at IS NULL)"
            " AND (lease_token IS NULL) = (lease_expires_at IS NULL)",
            name="lease",
        ),
        CheckConstraint("held_at IS NULL OR status IN ('pending', 'failed')", name="held"),
        # All indexes are partial: synced receipts, which may be a million, are in none but the last. HLC order needs no
        # hlc_server_time: only a synced receipt has one.
        # The receipts that are due, in HLC order.
        partial_index(
            "idx_receipts_status", "hlc_local_time", "hlc_logical_counter", "next_attempt_at", where=PENDING_ONLY
        ),
        # The receipts of one till that are due, in HLC order.
        partial_index(
            "idx_receipts_pos_id",
            "pos_id",
            "hlc_local_time",
            "hlc_logical_counter",
            "next_attempt_at",
            where=PENDING_ONLY,
        ),
        # The oldest undelivered receipt, together with idx_receipts_status and idx_receipts_held.
        partial_index("idx_receipts_hlc", "hlc_local_time", "hlc_logical_counter", where=UNDELIVERED_REST),
        # The held receipts: not printed yet.
        partial_index("idx_receipts_held", "hlc_local_time", "hlc_logical_counter", where=HELD_ONLY),
        # The leases. There are never more of them than the capacity.
        partial_index("idx_receipts_lease", "lease_token", "lease_expires_at", "lease_taken_at", where=SYNCING_ONLY),
        # The receipts that may be pruned.
        partial_index("idx_receipts_synced", "synced_at", where=SYNCED_ONLY),
    )

    def __repr__(self) -> str:
        return f"<Receipt {self.id} of {self.pos_id}: {self.status}>"

    @property
    def document(self) -> Any:  # noqa: ANN401 (a JSON document has no narrower type)
        """The decoded fiscal document. Raises `InvalidDocumentError` if the stored text is not JSON."""
        try:
            return json.loads(self.fiscal_doc)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidDocumentError(self.id, str(error)) from error

    @property
    def is_intact(self) -> bool:
        """
        Whether the document still has the digest that was stored with it.

        Also true if `digest` is None: another program inserted the receipt, or it was synced before digests were
        introduced.
        """
        return is_intact(self.fiscal_doc, self.digest)

    def to_dict(self) -> dict[str, Any]:
        """The receipt as plain values, with the document decoded, ready for `json.dumps`."""
        return {
            "id": self.id,
            "pos_id": self.pos_id,
            "created_at": self.created_at,
            "hlc_local_time": self.hlc_local_time,
            "hlc_logical_counter": self.hlc_logical_counter,
            "hlc_server_time": self.hlc_server_time,
            "fiscal_doc": self.document,
            "status": str(self.status),
            "retry_count": self.retry_count,
            "last_error": self.last_error,
            "synced_at": self.synced_at,
        }


class DeadLetter(Base):
    """A receipt that will not be sent again by itself; *open* while `resolved_at` is null. Times are Unix seconds."""

    __tablename__ = "dlq"

    id: Mapped[str] = mapped_column(Key, primary_key=True)
    original_receipt_id: Mapped[str] = mapped_column(Key, ForeignKey("receipts.id"))
    failed_at: Mapped[int]
    reason: Mapped[str]
    fiscal_doc: Mapped[str]
    retry_attempts: Mapped[int]
    last_error: Mapped[str | None]
    resolved_at: Mapped[int | None]
    resolved_by: Mapped[str | None]
    resolution_reason: Mapped[str | None]
    resolution: Mapped[str | None]

    __table_args__ = (
        CheckConstraint("(resolved_at IS NULL) = (resolved_by IS NULL)", name="resolved"),
        Index("idx_dlq_original_receipt", "original_receipt_id"),
        # At most one open dead letter per receipt.
        partial_index("idx_dlq_open", "original_receipt_id", where=OPEN_ONLY, unique=True),
    )

    def __repr__(self) -> str:
        return f"<DeadLetter of {self.original_receipt_id}: {self.resolution or self.resolved_by or 'open'}>"


class BufferEvent(Base):
    """An event. Append-only: the database refuses to change it, and to delete it before its retention is over."""

    __tablename__ = "buffer_events"

    # No CHECK on event_type: each new type would need a rebuild of a table that may have a million rows.
    id: Mapped[int] = mapped_column(primary_key=True)
    event_type: Mapped[str]
    receipt_id: Mapped[str | None]
    timestamp: Mapped[int]
    details: Mapped[Any] = mapped_column("metadata", JsonText, nullable=True)

    __table_args__ = (
        partial_index("idx_events_receipt_id", "receipt_id", where="receipt_id IS NOT NULL"),
        # The common types need no index: their newest rows are always near the end of the table.
        # `more`: the newest one of a type. On SQLite every index ends with the id.
        partial_index("idx_events_type", "event_type", where=RARE_EVENTS, more=("id",)),
        {"sqlite_autoincrement": True},
    )

    def __repr__(self) -> str:
        return f"<BufferEvent {self.id}: {self.event_type} of {self.receipt_id} at {self.timestamp}>"


class ConfigEntry(Base):
    """One setting of the buffer, as text; read it through `ReceiptRepository.get_config`."""

    __tablename__ = "config"

    key: Mapped[str] = mapped_column(Key, primary_key=True)
    value: Mapped[str]
    updated_at: Mapped[int]


# The state of the buffer in one row, maintained by triggers, so that reading it takes constant time. On PostgreSQL this
# is a view of buffer_changes: a row that every transaction updates would slow all of them down under a long snapshot.
buffer_state = Table(
    "buffer_state",
    metadata,
    Column("id", WholeNumber, primary_key=True),
    *(Column(status.value, WholeNumber, nullable=False) for status in ReceiptStatus),  # the number of receipts in it
    Column("open_dead_letters", WholeNumber, nullable=False),
    # The greatest HLC pair ever inserted; 0 and -1 before the first receipt.
    Column("hlc_local_time", WholeNumber, nullable=False),
    Column("hlc_logical_counter", WholeNumber, nullable=False),
    Column("last_synced_at", WholeNumber, nullable=True),
    CheckConstraint("id = 1", name="one_row"),
    sqlite_strict=True,
    info={ONLY_ON: "sqlite"},
)

# PostgreSQL: what each transaction has changed in the state. Now and then all rows are folded into one.
buffer_changes = Table(
    "buffer_changes",
    metadata,
    Column("transaction_id", TransactionId, nullable=False, server_default=text("pg_current_xact_id()")),
    # In a folded row: the rows that are not in it have at least this transaction_id; and its own xmin, which is another
    # one where a dump was restored.
    Column("folded_below", TransactionId, nullable=True),
    Column("folded_by", Text, nullable=True),
    *(Column(status.value, BigInteger, nullable=False, server_default=text("0")) for status in ReceiptStatus),
    Column("open_dead_letters", BigInteger, nullable=False, server_default=text("0")),
    Column("hlc_local_time", BigInteger, nullable=True),
    Column("hlc_logical_counter", BigInteger, nullable=True),
    Column("last_synced_at", BigInteger, nullable=True),
    Index("idx_changes_transaction_id", "transaction_id"),
    partial_index("idx_changes_folded", "folded_below", where="folded_below IS NOT NULL"),
    info={ONLY_ON: "postgresql"},
)

# Alembic creates and writes it. It is declared here so that the autogenerate of a host application does not drop it.
VERSION_TABLE = "kkt_buffer_version"
Table(
    VERSION_TABLE,
    metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
)
