"""Receipts: store them, read them, and change their status."""

import uuid
from collections.abc import Sequence
from typing import cast

from sqlalchemy import Table, bindparam, insert, literal_column, null, select, text, update

from kkt_buffer.arguments import NewReceipt
from kkt_buffer.backend import RefusedError
from kkt_buffer.errors import (
    BufferDamagedError,
    BufferFullError,
    DuplicateReceiptError,
    InvalidTransitionError,
    ReceiptNotFoundError,
)
from kkt_buffer.models import (
    OPEN_ONLY,
    PENDING_ONLY,
    TRANSITIONS,
    DeadLetter,
    Receipt,
    ReceiptStatus,
    Resolution,
    buffer_state,
)
from kkt_buffer.transaction import NotTogetherError, Transaction

receipts = cast("Table", Receipt.__table__)
dlq = cast("Table", DeadLetter.__table__)

# Terms that must match the condition of a partial index are literals, never bound parameters.

# Served by idx_receipts_status.
PENDING = (
    select(Receipt)
    .where(text(PENDING_ONLY))
    .order_by(Receipt.hlc_local_time, Receipt.hlc_logical_counter)
    .limit(bindparam("limit"))
)
RECEIPT = select(Receipt).where(Receipt.id == bindparam("receipt_id"))
KNOWN = select(receipts.c.pos_id, receipts.c.fiscal_doc, receipts.c.inserted_digest).where(
    receipts.c.id == bindparam("receipt_id")
)
# FOR UPDATE, which SQLite does not need: what is decided by this status is still true when it is written. The lock also
# makes the commit wait for the replicas, so that a decision which was made already is confirmed too.
STATUS_OF = select(receipts.c.status).where(receipts.c.id == bindparam("receipt_id")).with_for_update()
UNDELIVERED = select(buffer_state.c.pending + buffer_state.c.syncing)

# Values that clear the lease columns, and all columns of a delivery in progress.
NO_LEASE = {"lease_token": null(), "lease_taken_at": null(), "lease_expires_at": null()}
CLEARED = {**NO_LEASE, "next_attempt_at": null()}

_DELIVERED = """\
UPDATE receipts SET
    status = 'synced', synced_at = :now, changed_at = :now, hlc_server_time = :server_time, held_at = NULL,
    lease_token = NULL, lease_taken_at = NULL, lease_expires_at = NULL, next_attempt_at = NULL
WHERE id = :receipt_id AND"""
MARK_SYNCED = f"{_DELIVERED} status IN ('pending', 'syncing')"
MARK_FAILED_SYNCED = f"{_DELIVERED} status = 'failed'"

COUNT_ATTEMPT = (
    update(receipts)
    .where(text("id = :receipt_id"))
    .values(retry_count=receipts.c.retry_count + 1, last_error=bindparam("error"), changed_at=bindparam("now"))
    .returning(receipts.c.retry_count)
)

# Inserted before the status changes: a trigger refuses a failed receipt without an open dead letter.
DEAD_LETTER = insert(dlq).from_select(
    ["id", "original_receipt_id", "failed_at", "reason", "fiscal_doc", "retry_attempts", "last_error"],
    select(
        bindparam("letter_id"),
        receipts.c.id,
        bindparam("now"),
        bindparam("why"),
        receipts.c.fiscal_doc,
        receipts.c.retry_count,
        receipts.c.last_error,
    ).where(text("id = :receipt_id")),
)
FAIL = (
    update(receipts)
    .where(text("id = :receipt_id"))
    .values(status=literal_column("'failed'"), changed_at=bindparam("now"), **CLEARED)
)
CLOSE_DEAD_LETTER = (
    update(dlq)
    .where(text(f"original_receipt_id = :receipt_id AND {OPEN_ONLY}"))
    .values(
        resolved_at=bindparam("now"),
        resolved_by=bindparam("actor"),
        resolution_reason=bindparam("why"),
        resolution=bindparam("how"),
    )
)
LEASED = update(receipts).values(
    status=literal_column("'syncing'"),
    lease_token=bindparam("token"),
    lease_taken_at=bindparam("now"),
    lease_expires_at=bindparam("expires"),
)
LEASE = LEASED.where(text("id = :receipt_id AND held_at IS NULL"))
GIVE_UP_LEASE = update(receipts).where(text("id = :receipt_id")).values(status=literal_column("'pending'"), **NO_LEASE)


def list_pending(tx: Transaction, limit: int) -> list[Receipt]:
    """The receipts that wait for delivery, in HLC order, without the held ones."""
    return tx.load(PENDING, limit=limit)


def get_receipt(tx: Transaction, receipt_id: str) -> Receipt | None:
    """A receipt by its id."""
    found: list[Receipt] = tx.load(RECEIPT, receipt_id=receipt_id)
    return found[0] if found else None


def again(receipt: NewReceipt) -> NewReceipt:
    """The same insert, to be repeated because the outcome of the first try is unknown."""
    return receipt._replace(exist_ok=True)


def insert_one(tx: Transaction, receipt: NewReceipt) -> str:
    """Store a receipt; returns its id, also for an identical repeated insert if `exist_ok`."""
    while True:
        try:
            _add(tx, [receipt])
        except RefusedError as refused:
            try:
                if _is_replay(tx, receipt):
                    tx.backend.confirm(tx.connection)
                    return receipt.id
            except DuplicateReceiptError:
                tx.backend.confirm(tx.connection)  # it says that the receipt is stored
                raise
            tx.forget_settings()  # the server has read the capacity just now
            refuse_if_full(tx, 1)
            if refused.error is not None:  # pragma: no branch (else room was made just now: again)
                raise tx.explain(refused.error) from refused.error
        else:
            return receipt.id


def insert_together(tx: Transaction, many: list[NewReceipt]) -> list[str]:
    """Store receipts with one statement. Raises `NotTogetherError` if one of them is refused."""
    try:
        _add(tx, many)
    except RefusedError as refused:
        raise NotTogetherError from refused
    return [receipt.id for receipt in many]


def insert_unknown(tx: Transaction, many: list[NewReceipt]) -> list[str]:
    """Store the receipts that are not replays. Raises for the first one that may not be stored."""
    tx.backend.lock(tx.connection)
    try:
        new = _new_only(tx, many)
    except DuplicateReceiptError:
        tx.backend.confirm(tx.connection)
        raise
    if len(new) < len(many):
        tx.backend.confirm(tx.connection)
    refuse_if_full(tx, len(new))
    if new:
        try:
            _add(tx, new)
        except RefusedError as refused:
            if refused.error is not None:
                raise tx.explain(refused.error) from refused.error
            tx.forget_settings()  # the capacity was lowered meanwhile
            refuse_if_full(tx, len(new))
            raise  # pragma: no cover (room was made just now)
    return [receipt.id for receipt in many]


def _add(tx: Transaction, many: Sequence[NewReceipt]) -> None:
    tx.changed(*(receipt.id for receipt in many))
    tx.backend.insert(tx.connection, many, tx.given_now)


def _is_replay(tx: Transaction, receipt: NewReceipt) -> bool:
    """Whether this is an allowed repeated insert. Raises `DuplicateReceiptError` if the id is known and it is not."""
    stored = tx.connection.execute(KNOWN, {"receipt_id": receipt.id}).one_or_none()
    if stored is None:
        return False
    pos_id, fiscal_doc, inserted_digest = stored
    error = DuplicateReceiptError(
        receipt.id,
        same_pos_id=pos_id == receipt.pos_id,
        # The document of a completed receipt differs from the inserted one: compare with the inserted digest.
        same_document=fiscal_doc == receipt.fiscal_doc
        if inserted_digest is None
        else inserted_digest == receipt.digest,
    )
    if not (receipt.exist_ok and error.identical):
        raise error
    return True


def _new_only(tx: Transaction, many: list[NewReceipt]) -> list[NewReceipt]:
    """The receipts that are not in the buffer yet, each once."""
    new: dict[str, NewReceipt] = {}
    for receipt in many:
        earlier = new.get(receipt.id)
        if earlier is not None:
            error = DuplicateReceiptError(
                receipt.id,
                same_pos_id=earlier.pos_id == receipt.pos_id,
                same_document=earlier.fiscal_doc == receipt.fiscal_doc,
            )
            if not (receipt.exist_ok and error.identical):
                raise error
        elif not _is_replay(tx, receipt):
            new[receipt.id] = receipt
    return list(new.values())


def refuse_if_full(tx: Transaction, wanted: int) -> None:
    """Raise `BufferFullError` unless `wanted` more receipts fit."""
    undelivered = tx.connection.scalar(UNDELIVERED) or 0
    capacity = tx.number("buffer_capacity")
    if wanted and undelivered + wanted > capacity:
        raise BufferFullError(undelivered, capacity, wanted)


def status_of(tx: Transaction, receipt_id: str) -> ReceiptStatus | None:
    """The status of a receipt; None if there is no such receipt."""
    return tx.connection.scalar(STATUS_OF, {"receipt_id": receipt_id})


def mark_synced(tx: Transaction, delivery: tuple[str, int]) -> bool:
    """Record that the OFD has accepted the receipt; False if there is no such receipt."""
    receipt_id, server_time = delivery
    tx.changed(receipt_id)
    parameters = {"receipt_id": receipt_id, "server_time": server_time, "now": tx.now}
    for _ in range(2):  # twice: an operator may requeue it between the two statements
        if tx.run(MARK_SYNCED, parameters).rowcount:
            return True
        status = status_of(tx, receipt_id)
        if status is None or status is ReceiptStatus.SYNCED:
            return status is not None
        if status is ReceiptStatus.FAILED:
            close_dead_letter(tx, receipt_id, "delivery", "the receipt was delivered", Resolution.DELIVERED)
            if tx.run(MARK_FAILED_SYNCED, parameters).rowcount:
                return True
    raise BufferDamagedError(
        f"{tx.backend}: receipt {receipt_id} is {status} and cannot be marked as synced: a trigger that is not ours "
        "undoes it. Nothing was changed. Remove that trigger, and try again."
    )


def mark_synced_together(tx: Transaction, deliveries: list[tuple[str, int]]) -> list[bool]:
    """Record deliveries with one statement. Raises `NotTogetherError` if a receipt is neither pending nor leased."""
    tx.changed(*(receipt_id for receipt_id, _ in deliveries))
    rows = [{"receipt_id": receipt_id, "server_time": time, "now": tx.now} for receipt_id, time in deliveries]
    if tx.run(MARK_SYNCED, rows).rowcount != len(rows):
        raise NotTogetherError
    return [True] * len(rows)


def increment_retry_count(tx: Transaction, receipt_id: str, error: str) -> int:
    """Count a failed attempt; returns the new count."""
    tx.changed(receipt_id)
    attempt = {"receipt_id": receipt_id, "error": error, "now": tx.now}
    count: int | None = tx.connection.execute(COUNT_ATTEMPT, attempt).scalar_one_or_none()
    if count is None:
        raise ReceiptNotFoundError(receipt_id)
    return count


def move_to_dlq(tx: Transaction, receipt_id: str, reason: str) -> bool:
    """Dead-letter a receipt; False if there is no such receipt. Idempotent."""
    tx.changed(receipt_id)
    status = status_of(tx, receipt_id)
    if status is ReceiptStatus.SYNCED:
        raise InvalidTransitionError(receipt_id, status, ReceiptStatus.FAILED)
    if status in {ReceiptStatus.PENDING, ReceiptStatus.SYNCING}:
        letter = {"receipt_id": receipt_id, "letter_id": str(uuid.uuid4()), "now": tx.now, "why": reason}
        tx.connection.execute(DEAD_LETTER, letter)
        tx.connection.execute(FAIL, {"receipt_id": receipt_id, "now": tx.now})
    return status is not None


def close_dead_letter(tx: Transaction, receipt_id: str, actor: str, reason: str, resolution: Resolution) -> bool:
    """Close the open dead letter of a receipt; False if it has none."""
    tx.changed(receipt_id)
    closing = {
        "receipt_id": receipt_id,
        "now": tx.now,
        "actor": actor,
        "why": reason,
        "how": str(resolution),
    }
    return bool(tx.connection.execute(CLOSE_DEAD_LETTER, closing).rowcount)


def update_status(tx: Transaction, receipt_id: str, wanted: ReceiptStatus) -> bool:
    """Move a receipt to another status; False if there is no such receipt."""
    tx.changed(receipt_id)
    found = status_of(tx, receipt_id)
    if found is None or found is wanted:
        return found is not None
    if wanted not in TRANSITIONS[found]:
        raise InvalidTransitionError(receipt_id, found, wanted)
    if wanted is ReceiptStatus.SYNCED:
        return mark_synced(tx, (receipt_id, tx.now))
    if wanted is ReceiptStatus.FAILED:
        return move_to_dlq(tx, receipt_id, "status set to failed")
    if wanted is ReceiptStatus.PENDING:
        tx.connection.execute(GIVE_UP_LEASE, {"receipt_id": receipt_id})
    else:
        lease = {"token": str(uuid.uuid4()), "now": tx.now, "expires": tx.now + tx.number("lease_seconds")}
        if not tx.connection.execute(LEASE, {"receipt_id": receipt_id, **lease}).rowcount:
            raise InvalidTransitionError(
                receipt_id,
                "held",
                wanted,
                "It was not printed yet: complete it with update_receipt_fiscal_doc, or close it with discard_held.",
            )
    return True
