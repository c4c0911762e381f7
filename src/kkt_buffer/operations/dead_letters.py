"""
Dead letters: an operator lists, requeues and resolves them.

Actor and reason are recorded each time. A receipt with an open dead letter counts as undelivered for the 30-day rule; a
requeued receipt keeps its place in the order and its deadline.
"""

from sqlalchemy import bindparam, literal_column, null, select, text, update

from kkt_buffer.errors import InvalidTransitionError, ReceiptNotFoundError
from kkt_buffer.models import OPEN_ONLY, DeadLetter, ReceiptStatus, Resolution
from kkt_buffer.operations.receipts import UNDELIVERED, close_dead_letter, receipts, refuse_if_full, status_of
from kkt_buffer.transaction import Transaction

# Those of one second in the order of their receipts.
ALL = (
    select(DeadLetter)
    .join(receipts, receipts.c.id == DeadLetter.original_receipt_id, isouter=True)
    .order_by(
        DeadLetter.failed_at,
        receipts.c.hlc_local_time,
        receipts.c.hlc_logical_counter,
        DeadLetter.resolved_at.is_(None),  # the later one of a receipt is the one that is open
        DeadLetter.resolved_at,
    )
    .limit(bindparam("limit"))
)
OPEN = ALL.where(text(OPEN_ONLY))
ANY_OPEN = select(text(f"EXISTS (SELECT 1 FROM dlq WHERE {OPEN_ONLY})"))
# Served by idx_receipts_hlc.
OPEN_IN_ORDER = (
    select(receipts.c.id)
    .where(text(f"status = 'failed' AND id IN (SELECT original_receipt_id FROM dlq WHERE {OPEN_ONLY})"))
    .order_by(receipts.c.hlc_local_time, receipts.c.hlc_logical_counter)
    .limit(bindparam("limit"))
)
REQUEUE = (
    update(receipts)
    .where(text("id = :receipt_id AND status = 'failed'"))
    .values(status=literal_column("'pending'"), retry_count=0, next_attempt_at=null(), changed_at=bindparam("now"))
)


def list_dead_letters(tx: Transaction, limit: int, *, open_only: bool) -> list[DeadLetter]:
    """The dead letters, oldest first."""
    return tx.load(OPEN if open_only else ALL, limit=limit)


def requeue(tx: Transaction, receipt_id: str, actor: str, reason: str) -> None:
    """Close the dead letter of a receipt and make the receipt pending again."""
    tx.backend.lock(tx.connection)  # before the capacity is read
    status_of(tx, receipt_id)  # locks the receipt before its dead letter, as a delivery does
    _close(tx, receipt_id, actor, reason, Resolution.REQUEUED)
    refuse_if_full(tx, 1)
    tx.connection.execute(REQUEUE, {"receipt_id": receipt_id, "now": tx.now})


def requeue_all(tx: Transaction, actor: str, reason: str) -> int:
    """Requeue as many as fit; returns how many."""
    if not tx.connection.scalar(ANY_OPEN):
        return 0
    tx.backend.lock(tx.connection)
    refuse_if_full(tx, 1)
    room = tx.number("buffer_capacity") - (tx.connection.scalar(UNDELIVERED) or 0)
    receipt_ids = tx.connection.scalars(OPEN_IN_ORDER, {"limit": room}).all()
    for receipt_id in receipt_ids:
        requeue(tx, receipt_id, actor, reason)
    return len(receipt_ids)


def resolve(tx: Transaction, receipt_id: str, actor: str, reason: str) -> None:
    """Close a dead letter without sending the receipt."""
    _close(tx, receipt_id, actor, reason, Resolution.RESOLVED)


def _close(tx: Transaction, receipt_id: str, actor: str, reason: str, resolution: Resolution) -> None:
    if not close_dead_letter(tx, receipt_id, actor, reason, resolution):
        status = status_of(tx, receipt_id)
        if status is None:
            raise ReceiptNotFoundError(receipt_id)
        if status == ReceiptStatus.FAILED:
            raise InvalidTransitionError(
                receipt_id, status, resolution, "Its dead letter is closed already, and that is final."
            )
        raise InvalidTransitionError(receipt_id, status, resolution)
