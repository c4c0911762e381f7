"""Events: written by callers and read. Triggers write the events about receipts."""

from typing import Any, cast

from sqlalchemy import Table, insert, select, text

from kkt_buffer.models import COMMON_EVENTS, RARE_EVENTS, BufferEvent
from kkt_buffer.transaction import Transaction


def log_event(tx: Transaction, event_type: str, receipt_id: str | None, details: dict[str, Any] | None) -> int:
    """Record an event; returns its number."""
    row = {"event_type": event_type, "receipt_id": receipt_id, "timestamp": tx.now, "metadata": details}
    key = tx.connection.execute(insert(cast("Table", BufferEvent.__table__)), row).inserted_primary_key
    number: int = cast("Any", key)[0]
    return number


def get_events(tx: Transaction, limit: int, event_type: str | None, receipt_id: str | None) -> list[BufferEvent]:
    """The last events, newest first; only those of one type or one receipt if given."""
    statement = select(BufferEvent).order_by(BufferEvent.id.desc()).limit(limit)
    if receipt_id is not None:
        statement = statement.where(BufferEvent.receipt_id.is_not(None), BufferEvent.receipt_id == receipt_id)
    if event_type is not None:
        statement = statement.where(BufferEvent.event_type == event_type)
        if event_type not in COMMON_EVENTS:
            statement = statement.where(text(RARE_EVENTS))
    return tx.load(statement)
