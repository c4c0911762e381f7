"""
Dead letters: what an operator does with receipts that were given up.

Who and why are recorded with each. Dead letters count as undelivered for the 30-day rule until they are resolved;
a requeued receipt keeps its place in the order and its deadline.
"""

import uuid
from typing import cast

from sqlalchemy import Connection, Table, bindparam, literal_column, null, select, text, update

from kkt_buffer import arguments
from kkt_buffer.direct import Driver
from kkt_buffer.errors import InvalidTransitionError, ReceiptNotFoundError
from kkt_buffer.models import DeadLetter, Receipt, Resolution
from kkt_buffer.operations.receipts import CLOSE_DEAD_LETTER, Receipts, refuse_if_full, status_of

_receipts = cast("Table", Receipt.__table__)

OPEN = text("resolved_at IS NULL")
OPEN_IN_ORDER = (
    select(_receipts.c.id)
    .where(text("status = 'failed' AND id IN (SELECT original_receipt_id FROM dlq WHERE resolved_at IS NULL)"))
    .order_by(_receipts.c.hlc_local_time, _receipts.c.hlc_logical_counter)
    .limit(bindparam("limit"))
)
REVIVE = (
    update(_receipts)
    .where(text("id = :receipt_id AND status = 'failed'"))
    .values(status=literal_column("'pending'"), retry_count=0, next_attempt_at=null(), changed_at=bindparam("now"))
)


class DeadLetters(Receipts):
    """The operations of an operator."""

    def list_dead_letters(self, open_only: bool = True, *, limit: int = 100) -> list[DeadLetter]:  # noqa: FBT001, FBT002 (the design's signature)
        """The dead letters, oldest first, at most `limit`: those that wait for an operator, or all."""
        statement = (
            select(DeadLetter)
            .order_by(DeadLetter.failed_at, text("dlq.rowid"))
            .limit(arguments.whole_number("limit", limit, 1))
        )
        return self._load(statement.where(OPEN) if open_only else statement)

    def requeue(self, receipt_id: str | uuid.UUID, *, actor: str, reason: str) -> None:
        """
        Send a dead-lettered receipt once more: pending again, with a fresh budget of attempts, its place and deadline.

        `actor` is who decided it, `reason` why; both are recorded. Raises `BufferFullError` when there is no room (it
        counts as undelivered again), `InvalidTransitionError` when the receipt has no open dead letter,
        `ReceiptNotFoundError`.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        who, why = arguments.note("actor", actor), arguments.note("reason", reason)
        with self._writing() as session:
            connection = session.connection()
            self._close(connection, receipt_id, who, why, Resolution.REQUEUED)
            refuse_if_full(Driver.of(session), 1)
            connection.execute(REVIVE, {"receipt_id": receipt_id, "now": self._seconds()})

    def requeue_all(self, *, actor: str, reason: str) -> int:
        """
        Requeue the open dead letters in HLC order, as many as there is room for; returns how many.

        Raises `BufferFullError` if there are some, and room for none.
        """
        who, why = arguments.note("actor", actor), arguments.note("reason", reason)
        with self._writing() as session:
            connection = session.connection()
            status = self.get_buffer_status()
            if not status.dlq_size:
                return 0
            refuse_if_full(Driver.of(session), 1)
            room = status.capacity - status.pending - status.syncing
            receipt_ids = connection.scalars(OPEN_IN_ORDER, {"limit": room}).all()
            for receipt_id in receipt_ids:
                self._close(connection, receipt_id, who, why, Resolution.REQUEUED)
                connection.execute(REVIVE, {"receipt_id": receipt_id, "now": self._seconds()})
            return len(receipt_ids)

    def resolve(self, receipt_id: str | uuid.UUID, *, actor: str, reason: str) -> None:
        """
        Close a dead letter without sending the receipt. Final: it stays failed, and is out of the 30-day rule.

        `actor` is who decided it, `reason` why; both are recorded. Raises `InvalidTransitionError` when the receipt has
        no open dead letter, `ReceiptNotFoundError`.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        who, why = arguments.note("actor", actor), arguments.note("reason", reason)
        with self._writing() as session:
            self._close(session.connection(), receipt_id, who, why, Resolution.RESOLVED)

    def _close(self, connection: Connection, receipt_id: str, who: str, why: str, how: Resolution) -> None:
        closing = {"receipt_id": receipt_id, "now": self._seconds(), "who": who, "why": why, "how": how}
        if not connection.execute(CLOSE_DEAD_LETTER, closing).rowcount:
            status = status_of(connection, receipt_id)
            if status is None:
                raise ReceiptNotFoundError(receipt_id)
            raise InvalidTransitionError(receipt_id, status, how)
