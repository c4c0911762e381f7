"""
The tables as declarative models, the values their columns may hold, and which status may follow which.

Triggers, views and counters are in `schema`; how the tables come to be is in `migrations`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kkt_buffer.errors import BufferDamagedError, InvalidDocumentError


class ReceiptStatus(StrEnum):
    """What is known of a receipt's delivery. *Syncing* is leased by a worker, *failed* is dead-lettered."""

    PENDING = "pending"
    SYNCING = "syncing"
    SYNCED = "synced"
    FAILED = "failed"


TRANSITIONS: Mapping[ReceiptStatus, frozenset[ReceiptStatus]] = {
    ReceiptStatus.PENDING: frozenset({ReceiptStatus.SYNCING, ReceiptStatus.SYNCED, ReceiptStatus.FAILED}),
    ReceiptStatus.SYNCING: frozenset({ReceiptStatus.PENDING, ReceiptStatus.SYNCED, ReceiptStatus.FAILED}),
    # A delivery is a fact, also for a receipt that was given up; the way back to pending is an operator's requeue.
    ReceiptStatus.FAILED: frozenset({ReceiptStatus.SYNCED}),
    ReceiptStatus.SYNCED: frozenset(),
}


class Resolution(StrEnum):
    """How a dead letter was closed. Null on one that another program closed: that counts as resolved."""

    DELIVERED = "delivered"
    REQUEUED = "requeued"
    RESOLVED = "resolved"


class EventType(StrEnum):
    """
    What `buffer_events` records. Those that begin with `receipt_` are facts, written by triggers alone; but the repairs
    by the migration that takes over a file of the `sqlite3` version.
    """

    RECEIPT_ADDED = "receipt_added"
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

    @property
    def is_fact(self) -> bool:
        """Whether only a trigger may write it."""
        return self.startswith("receipt_")


@dataclass(frozen=True, slots=True)
class ConfigRule:
    """Default and bounds of one whole-number config key."""

    default: int
    minimum: int
    maximum: int = 1_000_000_000

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        return f"a whole number from {self.minimum} to {self.maximum}"

    def parse(self, value: object) -> int | None:
        """The number that `value` (an int, or its decimal text) stands for; None if it is no such number."""
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(self.maximum)):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and self.minimum <= value <= self.maximum:
            return value
        return None


CONFIG_RULES: Mapping[str, ConfigRule] = {
    "buffer_capacity": ConfigRule(200, 1),  # undelivered receipts
    "circuit_breaker_threshold": ConfigRule(5, 1),  # failures in a row
    "circuit_breaker_timeout": ConfigRule(60, 1),  # seconds
    "max_retry_attempts": ConfigRule(20, 1),
    "retry_backoff_initial": ConfigRule(5, 0),  # seconds
    "retry_backoff_max": ConfigRule(300, 0),  # seconds
    "lease_seconds": ConfigRule(300, 1),
    "retention_synced_days": ConfigRule(7, 0, 36_500),
    "retention_dlq_days": ConfigRule(90, 0, 36_500),
    "retention_events_days": ConfigRule(90, 0, 36_500),
    "ofd_deadline_days": ConfigRule(30, 1, 36_500),  # 54-ФЗ: after 30 calendar days the till is blocked
}


class JsonText(TypeDecorator[Any]):
    """JSON kept as TEXT: Cyrillic stays Cyrillic. What another program wrote and is not JSON is read as its text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:
        """Encode, for SQLAlchemy."""
        del dialect
        return None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> object:
        """Decode, for SQLAlchemy."""
        del dialect
        try:
            return None if value is None else json.loads(value)
        except (ValueError, TypeError):
            return value


class StatusText(TypeDecorator[ReceiptStatus]):
    """A `ReceiptStatus` kept as TEXT."""

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
    """The tables of the buffer; every constraint has a name, so that a migration can speak of it."""

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
        int: Integer,
        ReceiptStatus: StatusText,
    }


# Terms of the indexes below, which a query must repeat to the letter to be served by them.
HLC_ORDER = "COALESCE(hlc_server_time, hlc_local_time)"  # the operator's time where it is known, else ours
PENDING_ONLY = "status = 'pending'"
SYNCING_ONLY = "status = 'syncing'"
SYNCED_ONLY = "status = 'synced'"
UNDELIVERED = "status <> 'synced'"
COMMON_EVENTS = (EventType.RECEIPT_ADDED, EventType.RECEIPT_SYNCED)  # every receipt leaves one of each
RARE_EVENTS = f"event_type NOT IN ({', '.join(repr(str(kind)) for kind in COMMON_EVENTS)})"


class Receipt(Base):
    """A fiscal receipt and what is known of its delivery. Times are Unix seconds."""

    __tablename__ = "receipts"

    id: Mapped[str] = mapped_column(primary_key=True)
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
        # What is due, in order. Partial, so that a million synced receipts cost it nothing; a full index on status
        # would be preferred by the planner, which then sorts.
        Index(
            "idx_receipts_status",
            text(HLC_ORDER),
            "hlc_logical_counter",
            "next_attempt_at",
            sqlite_where=text(PENDING_ONLY),
        ),
        Index(
            "idx_receipts_pos_id",
            "pos_id",
            text(HLC_ORDER),
            "hlc_logical_counter",
            "next_attempt_at",
            sqlite_where=text(PENDING_ONLY),
        ),
        # Who holds what, and until when; there are never more leases than the capacity.
        Index(
            "idx_receipts_lease",
            "lease_token",
            "lease_expires_at",
            "lease_taken_at",
            sqlite_where=text(SYNCING_ONLY),
        ),
        # What may be pruned.
        Index("idx_receipts_synced", "synced_at", sqlite_where=text(SYNCED_ONLY)),
        # The last timestamp, from which the next one is made.
        Index("idx_receipts_hlc", "hlc_local_time", "hlc_logical_counter"),
        # The oldest receipt that the operator does not have.
        Index("idx_receipts_undelivered", "created_at", sqlite_where=text(UNDELIVERED)),
    )

    def __repr__(self) -> str:
        return f"<Receipt {self.id} of {self.pos_id}: {self.status}>"

    @property
    def document(self) -> Any:  # noqa: ANN401 (a JSON document has no narrower type)
        """The fiscal document, decoded. Raises `InvalidDocumentError` if the stored text is not JSON."""
        try:
            return json.loads(self.fiscal_doc)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidDocumentError(self.id, str(error)) from error

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
    """A receipt that was given up; *open* while `resolved_at` is null. Times are Unix seconds."""

    __tablename__ = "dlq"

    id: Mapped[str] = mapped_column(primary_key=True)
    original_receipt_id: Mapped[str] = mapped_column(ForeignKey("receipts.id"))
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
        Index("idx_dlq_open", "original_receipt_id", unique=True, sqlite_where=text("resolved_at IS NULL")),
    )

    def __repr__(self) -> str:
        return f"<DeadLetter of {self.original_receipt_id}: {self.resolution or self.resolved_by or 'open'}>"


class BufferEvent(Base):
    """Something that happened. Append-only: the database refuses to change it, or to delete it while it is young."""

    __tablename__ = "buffer_events"

    # No CHECK on event_type: a new type would mean a rebuild of a table that may hold a million rows.
    id: Mapped[int] = mapped_column(primary_key=True)
    event_type: Mapped[str]
    receipt_id: Mapped[str | None]
    timestamp: Mapped[int]
    details: Mapped[Any] = mapped_column("metadata", JsonText, nullable=True)

    __table_args__ = (
        Index("idx_events_receipt_id", "receipt_id", sqlite_where=text("receipt_id IS NOT NULL")),
        # The common ones are found from the newest end at once.
        Index("idx_events_type", "event_type", sqlite_where=text(RARE_EVENTS)),
        {"sqlite_autoincrement": True},
    )

    def __repr__(self) -> str:
        return f"<BufferEvent {self.id}: {self.event_type} of {self.receipt_id} at {self.timestamp}>"


class ConfigEntry(Base):
    """One setting of the buffer, as text; read it through `ReceiptRepository.get_config`."""

    __tablename__ = "config"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
    updated_at: Mapped[int]
