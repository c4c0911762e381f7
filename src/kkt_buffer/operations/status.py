"""The state of the buffer: counts, fill level, deadlines."""

import json
from dataclasses import dataclass
from functools import cache

from sqlalchemy import bindparam, select, text

from kkt_buffer.config import MOVED_AT, MOVED_TO, number_of
from kkt_buffer.errors import BufferDamagedError
from kkt_buffer.models import HELD_ONLY, OPEN_ONLY, PENDING_ONLY, RARE_EVENTS, SYNCING_ONLY, UNDELIVERED_REST, Receipt
from kkt_buffer.transaction import Transaction

SECONDS_PER_DAY = 86_400


def _first_in_order(where: str, limit: str) -> str:
    return (
        f"SELECT * FROM (SELECT id, created_at, hlc_local_time, hlc_logical_counter FROM receipts WHERE {where}"
        f" ORDER BY hlc_local_time, hlc_logical_counter LIMIT {limit}) AS part"
    )


def _undelivered(where: str, limit: str) -> str:
    """
    The undelivered receipts, read from the three indexes that are in HLC order.

    A failed receipt counts while its dead letter is open.
    """
    is_open = f"EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id AND {OPEN_ONLY})"
    return " UNION ALL ".join(
        (
            _first_in_order(f"{PENDING_ONLY}{where}", limit),
            _first_in_order(f"{HELD_ONLY} AND status = 'pending'{where}", limit),
            _first_in_order(f"{UNDELIVERED_REST} AND (status = 'syncing' OR {is_open}){where}", limit),
        )
    )


def _last_event(event_type: str) -> str:
    return f"SELECT MAX(id) FROM buffer_events WHERE event_type = '{event_type}' AND {RARE_EVENTS}"


_figures = {
    "held": f"SELECT COUNT(*) FROM receipts WHERE {HELD_ONLY} AND status = 'pending'",
    "expired_leases": f"SELECT COUNT(*) FROM receipts WHERE {SYNCING_ONLY} AND lease_expires_at <= :now",
    "oldest_undelivered_at": (
        f"SELECT created_at FROM ({_undelivered('', '1')}) AS oldest"
        " ORDER BY hlc_local_time, hlc_logical_counter LIMIT 1"
    ),
    "last_outage_at": f"SELECT timestamp FROM buffer_events WHERE id = ({_last_event('sync_failed')})",
    "circuit_opened_at": (
        f"SELECT timestamp FROM buffer_events WHERE id = ({_last_event('circuit_opened')})"
        f" AND id > COALESCE(({_last_event('circuit_closed')}), 0)"
    ),
    "capacity_setting": "SELECT value FROM config WHERE key = 'buffer_capacity'",
    "deadline_days": "SELECT value FROM config WHERE key = 'ofd_deadline_days'",
    "last_synced_at": "SELECT last_synced_at FROM buffer_state",
}


_VIEW = ("total_receipts", "pending", "syncing", "synced", "failed", "dlq_size", "capacity", "percent_full")


@cache
def _status(json_array: str) -> tuple[tuple[str, ...], str]:
    """
    The names of the figures, and the query that returns them as one JSON array.

    SQLAlchemy builds the description of the result columns on each call; for sixteen columns that costs more than the
    query itself.
    """
    values = ", ".join((*_VIEW, *(f"({query})" for query in _figures.values())))
    return (*_VIEW, *_figures), f"SELECT {json_array.format(values)} FROM v_buffer_status"


MOVED = text(
    f"SELECT value, EXISTS (SELECT 1 FROM config WHERE key = '{MOVED_AT}') FROM config WHERE key = '{MOVED_TO}'"
)
DUE = (
    select(Receipt)
    .where(text(f"id IN (SELECT id FROM ({_undelivered(' AND created_at < :created', ':limit')}) AS due)"))
    .order_by(Receipt.created_at, Receipt.hlc_local_time, Receipt.hlc_logical_counter)
    .limit(bindparam("limit"))
)


@dataclass(frozen=True, slots=True)
class BufferStatus:
    """
    The state of the buffer. Times are Unix seconds.

    `dlq_size` counts open dead letters; `percent_full` is undelivered / capacity × 100; `held` counts the pending
    receipts that are not printed yet. `oldest_undelivered_at` is the creation time of the oldest receipt that the OFD
    does not have, open dead letters included; `deadline_at` is its deadline (54-ФЗ: 30 calendar days,
    `ofd_deadline_days`); both are None if there is no such receipt. `last_synced_at` is the time of the last delivery,
    also if that receipt was pruned; `last_outage_at` is the time of the last logged delivery run with an outage;
    `circuit_opened_at` is the time at which the circuit breaker was opened, None while it is closed.
    `expired_leases` counts leases that expired without an outcome.
    """

    total_receipts: int
    pending: int
    syncing: int
    synced: int
    failed: int
    dlq_size: int
    capacity: int
    percent_full: float
    held: int
    expired_leases: int
    oldest_undelivered_at: int | None
    deadline_at: int | None
    last_synced_at: int | None
    last_outage_at: int | None
    circuit_opened_at: int | None

    @property
    def undelivered(self) -> int:
        """The receipts that count for the capacity: pending (held ones too) and syncing."""
        return self.pending + self.syncing


def get_buffer_status(tx: Transaction) -> BufferStatus:
    """Read the state of the buffer with one statement."""
    names, query = _status(tx.backend.json_array)
    figures = tx.run(query, {"now": tx.now}).scalar()
    if figures is None:
        raise BufferDamagedError.found(tx.backend, "the row of counts is missing")
    found = dict(zip(names, json.loads(figures), strict=True))
    number_of("buffer_capacity", found.pop("capacity_setting"))
    days = number_of("ofd_deadline_days", found.pop("deadline_days"))
    oldest = found["oldest_undelivered_at"]
    if not isinstance(oldest, int | None):
        raise BufferDamagedError.found(tx.backend, f"the oldest receipt was made at {oldest!r}")
    return BufferStatus(**found, deadline_at=None if oldest is None else oldest + days * SECONDS_PER_DAY)


def why_refused(tx: Transaction) -> str | None:
    """Why the buffer takes no receipts at all, in words; None if it takes them."""
    moved = tx.connection.execute(MOVED).one_or_none()
    if moved is None:
        return tx.backend.why_refused(tx.connection)
    target, is_complete = moved
    if is_complete:
        return f"it was moved to {target}, and is only a copy"
    return f"a move to {target} has begun, and is not complete: keep this file, and run the move again"


def get_receipts_due(tx: Transaction, before: int, limit: int) -> list[Receipt]:
    """The receipts with a deadline before `before`, most urgent first."""
    created = before - tx.number("ofd_deadline_days") * SECONDS_PER_DAY
    return tx.load(DUE, created=created, limit=limit)
