"""The events: those of the caller's own, and those that the triggers write."""

import logging
import time
import uuid

import pytest
from builders import NOON, STATUSES, a_foreign_receipt, a_receipt, story
from sqlalchemy import text

from kkt_buffer import EventType, ReceiptRepository


class TestEvents:
    def test_log(self, repository, clock):
        """An event of the caller's own is kept with its details, and its number is returned."""
        clock.seconds += 9
        number = repository.log_event("circuit_opened", metadata={"failures": 5, "why": "нет связи"})
        [event] = repository.get_events()
        assert (number, "circuit_opened", None, NOON + 9, {"failures": 5, "why": "нет связи"}) == (
            event.id,
            event.event_type,
            event.receipt_id,
            event.timestamp,
            event.details,
        )

    def test_of_a_receipt(self, repository):
        receipt = a_receipt(repository)
        repository.log_event("sync_failed", receipt_id=uuid.UUID(receipt.id))
        assert story(repository, receipt.id) == ["receipt_added", "sync_failed"]

    def test_own_name(self, repository):
        """A service may have types of its own, and find them."""
        number = repository.log_event("shift_opened")
        repository.log_event("receipt")
        assert [number] == [event.id for event in repository.get_events(event_type="shift_opened")]

    @pytest.mark.parametrize("event_type", ["receipt_added", "receipt_failed", "receipt_eaten", "receipt_"])
    def test_fact(self, repository, event_type):
        """Facts about receipts are the triggers' to write, those of later releases too."""
        with pytest.raises(ValueError, match=f"event_type: '{event_type}' is a fact about a receipt"):
            repository.log_event(event_type)
        assert repository.get_events() == []

    def test_newest_first(self, repository):
        numbers = [repository.log_event("sync_started") for _ in range(5)]
        assert numbers[::-1] == [event.id for event in repository.get_events()]
        assert numbers[:2:-1] == [event.id for event in repository.get_events(2)]

    def test_of_a_type(self, repository):
        """Each type is found, the common and the rare."""
        for status in STATUSES:
            repository.increment_retry_count(a_receipt(repository, status).id, "timeout")
        for event_type in EventType:
            if not event_type.startswith("receipt_"):
                repository.log_event(event_type)
        found = {event_type: len(repository.get_events(event_type=event_type)) for event_type in EventType}
        counted = {"receipt_added": 4, "receipt_attempt_failed": 4, "receipt_requeued": 0, "receipt_resolved": 0}
        counted |= {"receipt_completed": 0, "receipt_repaired": 0}
        assert dict.fromkeys(EventType, 1) | counted == found

    def test_completed(self, repository, engine):
        """That a held receipt was completed is a fact, with the time of the change, whoever completed it."""
        a_foreign_receipt(engine, "held", held_at=NOON)
        assert story(repository, "held") == ["receipt_added"]
        with engine.begin() as connection:
            printed = "UPDATE receipts SET fiscal_doc = '{\"n\":1}', digest = 'd', held_at = NULL, changed_at = 9"
            connection.execute(text(printed.replace(":", "\\:")))
        assert story(repository, "held") == ["receipt_added", "receipt_completed"]
        [event] = repository.get_events(event_type="receipt_completed")
        assert ("held", 9, {"digest": "d"}) == (event.receipt_id, event.timestamp, event.details)

    def test_not_completed(self, repository, engine):
        """A held receipt that was delivered all the same was not completed; nor was one that was never held."""
        a_foreign_receipt(engine, "held", held_at=NOON)
        repository.mark_synced("held", NOON)
        assert story(repository, "held") == ["receipt_added", "receipt_synced"]
        receipt = a_receipt(repository)
        repository.increment_retry_count(receipt.id, "HTTP 500")
        assert repository.get_events(event_type="receipt_completed") == []

    @pytest.mark.parametrize("event_type", [5, "", " ", "a\0b", "a" * 2001])
    def test_bad_type(self, repository, event_type):
        for operation in (repository.log_event, lambda kind: repository.get_events(event_type=kind)):
            with pytest.raises((ValueError, TypeError), match="event_type: "):
                operation(event_type)

    @pytest.mark.parametrize("limit", [0, True])
    def test_bad_limit(self, repository, limit):
        with pytest.raises((ValueError, TypeError), match="limit: expected"):
            repository.get_events(limit)

    def test_foreign_metadata(self, repository, engine):
        """What another program wrote and is not JSON comes back as its text."""
        with engine.begin() as connection:
            connection.execute(
                text("INSERT INTO buffer_events (event_type, timestamp, metadata) VALUES ('sync_failed', 1, 'oops')")
            )
        assert repository.get_events()[0].details == "oops"

    def test_append_only(self, repository, engine):
        """The database itself refuses to change an event, and to delete one before its time."""
        repository.log_event("sync_started")
        with pytest.raises(Exception, match="buffer_events is append-only"), engine.begin() as connection:
            connection.execute(text("UPDATE buffer_events SET timestamp = 5"))
        young = ReceiptRepository(engine)  # by the real clock
        young.log_event("sync_started")
        with pytest.raises(Exception, match="cannot be deleted before retention_events_days"):
            with engine.begin() as connection:
                connection.execute(text("DELETE FROM buffer_events"))
        with engine.begin() as connection:
            old = text("DELETE FROM buffer_events WHERE timestamp < :before")
            connection.execute(old, {"before": int(time.time()) - 90 * 86_400})
        assert len(repository.get_events()) == 1


def test_log_is_silent(repository, caplog):
    """Ordinary work writes nothing to the log."""
    with caplog.at_level(logging.DEBUG, logger="kkt_buffer"):
        a_receipt(repository, "failed")
    assert caplog.records == []
