"""
Leases: a worker claims receipts for a limited time and records the outcome of each.

Guaranteed: two workers never hold the same receipt at the same time by the clock of this machine or of the server; a
worker that died leaves no receipt stuck; a late worker cannot undo later changes. Not guaranteed: that a receipt is
sent only once. If a worker dies or its lease expires between a send and its record, the receipt is sent again; the OFD
recognises it by its fiscal number.
"""

from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Integer, bindparam, func, literal_column, select, text, update

from kkt_buffer.errors import LeaseLostError, ReceiptNotFoundError
from kkt_buffer.models import PENDING_ONLY, SYNCING_ONLY, Receipt, ReceiptStatus
from kkt_buffer.operations.receipts import LEASED, NO_LEASE, move_to_dlq, receipts, status_of
from kkt_buffer.transaction import Transaction

# A lease is over when it has expired, or when it was taken in the future: then the clock was set back, and the lease
# could last far too long. One minute is tolerated: a small clock correction must not end a new lease.
_unleased = {"status": literal_column("'pending'"), **NO_LEASE}
_over = (
    select(receipts.c.id)
    .where(text(SYNCING_ONLY + " AND (lease_expires_at <= :now OR lease_taken_at > :now + 60)"))
    .with_for_update(skip_locked=True)  # SQLite has one writer, and no such words
)
RECOVER = update(receipts).where(receipts.c.id.in_(_over)).values(_unleased)

# Served by idx_receipts_lease.
_leases = text(SYNCING_ONLY + " AND lease_token = :token")
CLAIMED = select(Receipt).where(_leases)
# If a claim is repeated, its first try may have been committed.
_claimed_before = select(func.count()).select_from(receipts.alias()).where(_leases).scalar_subquery()

# Served by idx_receipts_status or idx_receipts_pos_id. A next attempt that is later than any backoff was computed with
# a wrong clock, so it counts as due.
_due = (
    select(receipts.c.id)
    .where(text(PENDING_ONLY + " AND COALESCE(next_attempt_at NOT BETWEEN :now + 1 AND :horizon, TRUE)"))
    .limit(bindparam("limit", type_=Integer) - _claimed_before)
    .with_for_update(skip_locked=True)
)
# The same conditions as in CLAIM and RECOVER.
NEXT_DUE = f"""\
SELECT MIN(due_at) FROM (
    SELECT CASE WHEN next_attempt_at BETWEEN :now + 1 AND :horizon THEN next_attempt_at ELSE :now END AS due_at
    FROM receipts WHERE {PENDING_ONLY}
    UNION ALL
    SELECT CASE WHEN lease_taken_at > :now + 60 THEN :now ELSE lease_expires_at END
    FROM receipts WHERE {SYNCING_ONLY}
) AS waiting"""

_in_order = (receipts.c.hlc_local_time, receipts.c.hlc_logical_counter)
# Those never tried, then those that have been due for the longest time. It sorts, but no more rows than the capacity.
_retries_last = (func.coalesce(receipts.c.next_attempt_at, 0), *_in_order)
CLAIM = {
    # Through a CTE: PostgreSQL might run a subquery several times, and lock more receipts each time.
    (of_one_pos, retries_last): LEASED.where(receipts.c.id.in_(select(due.order_by(*order).cte("due").c.id)))
    for of_one_pos, due in ((False, _due), (True, _due.where(text("pos_id = :pos"))))
    for retries_last, order in ((False, _in_order), (True, _retries_last))
}

_renewed = update(receipts).values(lease_taken_at=bindparam("now"), lease_expires_at=bindparam("expires"))
RENEW_ALL = _renewed.where(_leases).returning(receipts.c.id)
_lease = text("id = :receipt_id AND lease_token = :token AND " + SYNCING_ONLY)
RENEW = _renewed.where(_lease)
RELEASE = update(receipts).where(_lease).values(_unleased)
FAIL_ATTEMPT = (
    update(receipts)
    .where(_lease)
    .values(
        **_unleased,
        retry_count=receipts.c.retry_count + 1,
        last_error=bindparam("error"),
        changed_at=bindparam("now"),
    )
    .returning(receipts.c.retry_count)
)
POSTPONE = update(receipts).where(text("id = :receipt_id")).values(next_attempt_at=bindparam("due"))


class Failure(NamedTuple):
    """A failed attempt, as a worker reports it. `jitter` returns a number from 0 to 1, to spread retries."""

    receipt_id: str
    token: str
    error: str
    jitter: Callable[[], float]


class Claim(NamedTuple):
    """What a worker asks for. `token` is new; a claim with an unknown outcome is repeated with the same one."""

    limit: int
    pos_id: str | None
    lease_seconds: int | None
    retries_last: bool
    token: str


def claim(tx: Transaction, wanted: Claim) -> list[Receipt]:
    """Lease the receipts that are due, in HLC order or in the order of their last attempts."""
    recover(tx)
    seconds = tx.number("lease_seconds") if wanted.lease_seconds is None else wanted.lease_seconds
    parameters = {
        "limit": wanted.limit,
        "now": tx.now,
        "horizon": tx.now + tx.number("retry_backoff_max"),
        "token": wanted.token,
        "expires": tx.now + seconds,
    }
    if wanted.pos_id is not None:
        parameters["pos"] = wanted.pos_id
    claimed = tx.connection.execute(CLAIM[wanted.pos_id is not None, wanted.retries_last], parameters)
    found: list[Receipt] = tx.load(CLAIMED, token=wanted.token)
    if found and not claimed.rowcount:  # only on PostgreSQL: the first try was committed
        tx.backend.confirm(tx.connection)
    tx.changed(*(receipt.id for receipt in found))

    def place(receipt: Receipt) -> tuple[int, int, int]:
        last = receipt.next_attempt_at if wanted.retries_last else None
        return last or 0, receipt.hlc_local_time, receipt.hlc_logical_counter

    return sorted(found, key=place)


def seconds_until_due(tx: Transaction) -> int | None:
    """The seconds until `claim` finds a receipt: 0 if it finds one now; None if none is waiting."""
    due_at: int | None = tx.run(
        NEXT_DUE, {"now": tx.now, "horizon": tx.now + tx.number("retry_backoff_max")}
    ).scalar_one()
    return None if due_at is None else max(due_at - tx.now, 0)


def recover(tx: Transaction) -> int:
    """Make receipts with expired leases pending; returns how many."""
    return tx.connection.execute(RECOVER, {"now": tx.now}).rowcount


def renew(tx: Transaction, receipt_id: str, token: str, lease_seconds: int | None) -> int:
    """Extend a lease; returns its new expiry."""
    tx.changed(receipt_id)
    expires = tx.now + (tx.number("lease_seconds") if lease_seconds is None else lease_seconds)
    lease = {"receipt_id": receipt_id, "token": token, "now": tx.now, "expires": expires}
    if not tx.connection.execute(RENEW, lease).rowcount:
        raise _lease_lost(tx, receipt_id)
    return expires


def renew_all(tx: Transaction, token: str, lease_seconds: int | None) -> list[str]:
    """Extend all leases with this token; returns the ids of their receipts."""
    expires = tx.now + (tx.number("lease_seconds") if lease_seconds is None else lease_seconds)
    return list(tx.connection.scalars(RENEW_ALL, {"token": token, "now": tx.now, "expires": expires}))


def release(tx: Transaction, receipt_id: str, token: str, wait: int | None, jitter: Callable[[], float]) -> None:
    """Hand a leased receipt back without counting an attempt."""
    tx.changed(receipt_id)
    if not tx.connection.execute(RELEASE, {"receipt_id": receipt_id, "token": token}).rowcount:
        raise _lease_lost(tx, receipt_id)
    if wait is not None:
        _postpone(tx, receipt_id, min(wait, tx.number("retry_backoff_max")), jitter)


def record_failure(tx: Transaction, failure: Failure) -> ReceiptStatus:
    """Count a failed attempt: back off, or dead-letter at the limit."""
    receipt_id, token, error, jitter = failure
    tx.changed(receipt_id)
    attempt = {"receipt_id": receipt_id, "token": token, "error": error, "now": tx.now}
    count = tx.connection.execute(FAIL_ATTEMPT, attempt).scalar_one_or_none()
    if count is None:
        raise _lease_lost(tx, receipt_id)
    if count >= tx.number("max_retry_attempts"):
        move_to_dlq(tx, receipt_id, f"gave up after {count} attempts: {error}")
        return ReceiptStatus.FAILED
    # The exponent is capped: 2**count would exceed what an INTEGER column holds.
    doubled = tx.number("retry_backoff_initial") << min(count - 1, 32)
    _postpone(tx, receipt_id, min(doubled, tx.number("retry_backoff_max")), jitter)
    return ReceiptStatus.PENDING


def _postpone(tx: Transaction, receipt_id: str, seconds: int, jitter: Callable[[], float]) -> None:
    due = tx.now + round(seconds * (1 - jitter() / 2))
    tx.connection.execute(POSTPONE, {"receipt_id": receipt_id, "due": due})


def _lease_lost(tx: Transaction, receipt_id: str) -> LeaseLostError | ReceiptNotFoundError:
    status = status_of(tx, receipt_id)
    return ReceiptNotFoundError(receipt_id) if status is None else LeaseLostError(receipt_id, status)
