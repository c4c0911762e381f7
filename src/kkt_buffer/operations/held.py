"""
Held receipts: stored before they are printed, and not delivered until their document is complete.

`held_at` is set by the insert alone. A print is a fact: it is recorded for a dead-lettered receipt too, which goes on
waiting for an operator, with its complete document.
"""

from collections.abc import Mapping

from sqlalchemy import bindparam, null, select, text, update

from kkt_buffer import arguments
from kkt_buffer.documents import digest_of, is_intact, merged
from kkt_buffer.errors import (
    BufferDamagedError,
    InvalidDocumentError,
    InvalidTransitionError,
    ReceiptNotFoundError,
)
from kkt_buffer.models import HELD_ONLY, OPEN_ONLY, Receipt, ReceiptStatus, Resolution
from kkt_buffer.operations.receipts import close_dead_letter, dlq, move_to_dlq, receipts
from kkt_buffer.transaction import Transaction

# Served by idx_receipts_held.
HELD = (
    select(Receipt)
    .where(text(f"{HELD_ONLY} AND status = 'pending'"))
    .order_by(Receipt.hlc_local_time, Receipt.hlc_logical_counter)
    .limit(bindparam("limit"))
)
HELD_OF_POS = HELD.where(Receipt.pos_id == bindparam("pos"))
STATE = (
    select(receipts.c.status, receipts.c.held_at, receipts.c.fiscal_doc, receipts.c.digest)
    .where(receipts.c.id == bindparam("receipt_id"))
    .with_for_update()
)
COMPLETE = (
    update(receipts)
    .where(text("id = :receipt_id"))
    .values(
        fiscal_doc=bindparam("document"),
        digest=bindparam("present"),
        inserted_digest=bindparam("inserted"),
        held_at=null(),
        changed_at=bindparam("now"),
    )
)
# An operator sees the complete document. The copies in closed dead letters stay: they are history.
COMPLETE_DEAD_LETTER = (
    update(dlq)
    .where(text(f"original_receipt_id = :receipt_id AND {OPEN_ONLY}"))
    .values(fiscal_doc=bindparam("document"))
)


def list_held(tx: Transaction, limit: int, pos_id: str | None) -> list[Receipt]:
    """The held receipts in HLC order; of one till if `pos_id` is given."""
    return tx.load(HELD, limit=limit) if pos_id is None else tx.load(HELD_OF_POS, limit=limit, pos=pos_id)


def complete(tx: Transaction, receipt_id: str, fields: Mapping[str, str]) -> bool:
    """Merge fields into the document of a held receipt and release it; False if there is no such receipt."""
    tx.changed(receipt_id)
    found = tx.connection.execute(STATE, {"receipt_id": receipt_id}).one_or_none()
    if found is None:
        return False
    status, held_at, stored, digest = found
    if not is_intact(stored, digest):
        # A new digest would hide the damage.
        raise BufferDamagedError.found(tx.backend, f"the document of receipt {receipt_id} differs from its digest")
    document = _merged(receipt_id, stored, fields)
    if held_at is None:
        if document == stored:
            return True
        raise InvalidTransitionError(
            receipt_id,
            status,
            "completed",
            "Its document is final: only a receipt that was stored with hold=True takes fields, once.",
        )
    letter = {"receipt_id": receipt_id, "document": document}
    if status is ReceiptStatus.FAILED and not tx.connection.execute(COMPLETE_DEAD_LETTER, letter).rowcount:
        raise InvalidTransitionError(
            receipt_id,
            "discarded",
            "completed",
            "It will not be delivered. If it was printed after all, store the printed document with a new id.",
        )
    completed = {**letter, "present": digest_of(document), "inserted": digest_of(stored), "now": tx.now}
    tx.connection.execute(COMPLETE, completed)
    return True


def _merged(receipt_id: str, stored: str, fields: Mapping[str, str]) -> str:
    try:
        document = merged(arguments.document(stored), fields)
    except (ValueError, RecursionError) as error:  # another program stored it
        raise InvalidDocumentError(receipt_id, str(error)) from error
    return arguments.document(document)


def discard(tx: Transaction, receipt_id: str, actor: str, reason: str) -> None:
    """Dead-letter a held receipt and resolve the dead letter."""
    found = tx.connection.execute(STATE, {"receipt_id": receipt_id}).one_or_none()
    if found is None:
        raise ReceiptNotFoundError(receipt_id)
    if found.held_at is not None:
        move_to_dlq(tx, receipt_id, reason)  # unless it is dead-lettered already
        if close_dead_letter(tx, receipt_id, actor, reason, Resolution.RESOLVED):
            return
    raise InvalidTransitionError(
        receipt_id, found.status, "discarded", "Only a held receipt, which was not printed, can be discarded, once."
    )
