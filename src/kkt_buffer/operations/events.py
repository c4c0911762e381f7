"""Events: what happened, newest first. Those about receipts are written by triggers."""

import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, text

from kkt_buffer import arguments
from kkt_buffer.models import COMMON_EVENTS, RARE_EVENTS, BufferEvent, EventType
from kkt_buffer.transaction import Transactions


class Events(Transactions):
    """The operations on events."""

    def log_event(
        self,
        event_type: str,
        *,
        receipt_id: str | uuid.UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """
        Record an event of the caller's own (a circuit breaker's, a sync run's) and return its number.

        Raises `ValueError` for an unknown type, and for those that begin with `receipt_`: triggers write these.
        """
        if not isinstance(event_type, str) or event_type not in set(EventType) or EventType(event_type).is_fact:
            own = ", ".join(kind for kind in EventType if not kind.is_fact)
            raise ValueError(f"event_type: expected one of {own}, got {event_type!r}")
        event = BufferEvent(
            event_type=event_type,
            receipt_id=None if receipt_id is None else arguments.lookup_id(receipt_id),
            timestamp=self._seconds(),
            details=arguments.details(metadata),
        )
        with self._writing() as session:
            session.add(event)
            session.flush()
            return event.id

    def get_events(
        self, limit: int = 100, *, event_type: str | None = None, receipt_id: str | uuid.UUID | None = None
    ) -> list[BufferEvent]:
        """The last events, newest first, at most `limit`; of one type or one receipt if that is given."""
        limit = arguments.whole_number("limit", limit, 1)
        statement = select(BufferEvent).order_by(BufferEvent.id.desc()).limit(limit)
        if receipt_id is not None:
            statement = statement.where(
                BufferEvent.receipt_id.is_not(None), BufferEvent.receipt_id == arguments.lookup_id(receipt_id)
            )
        if event_type is not None:
            if not isinstance(event_type, str) or event_type not in set(EventType):
                raise ValueError(f"event_type: expected one of {', '.join(EventType)}, got {event_type!r}")
            statement = statement.where(BufferEvent.event_type == event_type)
            if event_type not in COMMON_EVENTS:
                statement = statement.where(text(RARE_EVENTS))
        return self._load(statement)
