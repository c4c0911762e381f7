"""
Leases: a worker takes receipts for a limited time, and says what became of each.

What is promised: two workers never hold the same receipt at the same moment by the clock of this machine, a worker that
died leaves nothing stuck, and a late worker cannot undo what happened since. What is not: that a receipt is sent only
once. Between a send and its record a worker can die or its lease run out, and then the receipt is sent again; an
operator knows it by its fiscal number.
"""

import uuid
from typing import cast

from sqlalchemy import Connection, Table, bindparam, literal_column, select, text, update

from kkt_buffer import arguments
from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.errors import LeaseLostError, ReceiptNotFoundError
from kkt_buffer.models import PENDING_ONLY, SYNCING_ONLY, Receipt, ReceiptStatus
from kkt_buffer.operations.receipts import NO_LEASE, Receipts, status_of

_receipts = cast("Table", Receipt.__table__)

# A lease is over when it has expired, and when it was taken in the future: then the clock was set back, and nobody
# knows how long it would last. By a minute it may be: a clock that is corrected a little must not take a fresh lease
# away from its worker.
_free = {"status": literal_column("'pending'"), **NO_LEASE}
RECOVER = (
    update(_receipts)
    .where(text(SYNCING_ONLY + " AND (lease_expires_at <= :now OR lease_taken_at > :now + 60)"))
    .values(_free)
)

# By idx_receipts_status or idx_receipts_pos_id. An attempt that lies further ahead than any backoff was put there by a
# clock that was ahead.
_due = (
    select(_receipts.c.id)
    .where(text(PENDING_ONLY + " AND COALESCE(next_attempt_at NOT BETWEEN :now + 1 AND :horizon, TRUE)"))
    .order_by(_receipts.c.hlc_local_time, _receipts.c.hlc_logical_counter)
    .limit(bindparam("limit"))
)
_taken = update(_receipts).values(
    status=literal_column("'syncing'"),
    lease_token=bindparam("token"),
    lease_taken_at=bindparam("now"),
    lease_expires_at=bindparam("expires"),
)
TAKE = _taken.where(_receipts.c.id.in_(_due))
TAKE_OF_POS = _taken.where(_receipts.c.id.in_(_due.where(text("pos_id = :pos"))))

# By idx_receipts_lease.
TAKEN = select(Receipt).where(text(SYNCING_ONLY + " AND lease_token = :token"))

_held = text("id = :receipt_id AND lease_token = :token AND " + SYNCING_ONLY)
RENEW = update(_receipts).where(_held).values(lease_taken_at=bindparam("now"), lease_expires_at=bindparam("expires"))
RELEASE = update(_receipts).where(_held).values(_free)
FAIL_ATTEMPT = (
    update(_receipts)
    .where(_held)
    .values(
        **_free,
        retry_count=_receipts.c.retry_count + 1,
        last_error=bindparam("error"),
        changed_at=bindparam("now"),
    )
    .returning(_receipts.c.retry_count)
)
POSTPONE = update(_receipts).where(text("id = :receipt_id")).values(next_attempt_at=bindparam("due"))


class Leases(Receipts):
    """The operations of a worker."""

    def claim_pending(
        self, limit: int = 50, *, pos_id: str | None = None, lease_seconds: int | None = None
    ) -> list[Receipt]:
        """
        Lease the receipts that are due, at most `limit`, in HLC order; of one till if `pos_id` is given.

        Due is what is pending and not in its backoff, and what a worker had whose lease is over: expired, or taken in
        what is now the future because the clock was set back. All get one fresh `lease_token`, valid for
        `lease_seconds` (default: the setting of that name). A worker that has less than that to do is safe from
        others; one that needs longer calls `renew_lease`.
        """
        limit = arguments.whole_number("limit", limit, 1)
        parameters: dict[str, object] = {"limit": limit}
        if pos_id is not None:
            parameters["pos"] = arguments.name("pos_id", pos_id)
        token = str(uuid.uuid4())
        with self._writing() as session:
            now = self._seconds()  # not earlier: others may have claimed while we waited for the write lock
            numbers = self._numbers("lease_seconds", "retry_backoff_max")
            lasts = numbers["lease_seconds"] if lease_seconds is None else _lease(lease_seconds)
            connection = session.connection()
            connection.execute(RECOVER, {"now": now})
            taken = connection.execute(
                TAKE if pos_id is None else TAKE_OF_POS,
                {
                    **parameters,
                    "now": now,
                    "horizon": now + numbers["retry_backoff_max"],
                    "token": token,
                    "expires": now + lasts,
                },
            )
            found: list[Receipt] = self._load(TAKEN, token=token) if taken.rowcount else []
            return sorted(found, key=lambda receipt: (receipt.hlc_local_time, receipt.hlc_logical_counter))

    def renew_lease(self, receipt_id: str | uuid.UUID, lease_token: str, *, lease_seconds: int | None = None) -> int:
        """
        Hold the receipt for another `lease_seconds` from now; returns when that is over (Unix seconds).

        Raises `LeaseLostError` if the token is not the present one, `ReceiptNotFoundError`.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        token = arguments.name("lease_token", lease_token)
        with self._writing() as session:
            now = self._seconds()
            lasts = self._numbers("lease_seconds")["lease_seconds"] if lease_seconds is None else _lease(lease_seconds)
            held = {"receipt_id": receipt_id, "token": token, "now": now, "expires": now + lasts}
            connection = session.connection()
            if not connection.execute(RENEW, held).rowcount:
                raise _lost(connection, receipt_id)
        return now + lasts

    def release(self, receipt_id: str | uuid.UUID, lease_token: str) -> None:
        """
        Hand a leased receipt back unharmed: due at once, no attempt counted.

        Raises `LeaseLostError` if the token is not the present one, `ReceiptNotFoundError`.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        held = {"receipt_id": receipt_id, "token": arguments.name("lease_token", lease_token)}
        with self._writing() as session:
            connection = session.connection()
            if not connection.execute(RELEASE, held).rowcount:
                raise _lost(connection, receipt_id)

    def record_failure(self, receipt_id: str | uuid.UUID, error: str, lease_token: str) -> ReceiptStatus:
        """
        Count a failed attempt: the receipt waits for its backoff, or is dead-lettered at `max_retry_attempts`.

        The backoff doubles with each attempt from `retry_backoff_initial` to `retry_backoff_max` seconds; of that, a
        random part of up to a half is taken off, so that tills do not come back in step. `error` is kept, cut to a
        sane length. Returns the status that the receipt has now, pending or failed.

        Raises `LeaseLostError` if the token is not the present one (nothing is counted then), `ReceiptNotFoundError`.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        error = arguments.note("error", error)
        token = arguments.name("lease_token", lease_token)
        now = self._seconds()
        with self._writing() as session:
            connection = session.connection()
            attempt = {"receipt_id": receipt_id, "token": token, "error": error, "now": now}
            count = connection.execute(FAIL_ATTEMPT, attempt).scalar_one_or_none()
            if count is None:
                raise _lost(connection, receipt_id)
            numbers = self._numbers("max_retry_attempts", "retry_backoff_initial", "retry_backoff_max")
            if count >= numbers["max_retry_attempts"]:
                self.move_to_dlq(receipt_id, f"gave up after {count} attempts: {error}")
                return ReceiptStatus.FAILED
            # Capped before it is raised to a power that no clock can hold.
            doubled = numbers["retry_backoff_initial"] << min(count - 1, 32)
            backoff = min(doubled, numbers["retry_backoff_max"])
            due = now + round(backoff * (1 - self._jitter() / 2))
            connection.execute(POSTPONE, {"receipt_id": receipt_id, "due": due})
            return ReceiptStatus.PENDING

    def recover_expired_leases(self) -> int:
        """
        Make pending what was leased by workers that are gone; returns how many.

        `claim_pending` does the same first of all, so nothing waits for this; it is for whoever wants to see them now.
        """
        with self._writing() as session:
            return session.connection().execute(RECOVER, {"now": self._seconds()}).rowcount


def _lease(seconds: int) -> int:
    rule = CONFIG_RULES["lease_seconds"]
    number = rule.parse(seconds)
    if number is None:
        raise ValueError(f"lease_seconds: expected {rule.expected}, got {seconds!r}")
    return number


def _lost(connection: Connection, receipt_id: str) -> LeaseLostError | ReceiptNotFoundError:
    status = status_of(connection, receipt_id)
    return ReceiptNotFoundError(receipt_id) if status is None else LeaseLostError(receipt_id, status)
