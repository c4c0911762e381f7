"""What an operator does with receipts that were given up, and what is kept on record of it."""

import pytest
from builders import NOON, a_receipt, an_id, new_receipt, story

from kkt_buffer import BufferFullError, InvalidTransitionError, ReceiptNotFoundError

BY_ANNA = {"actor": "Anna", "reason": "the tax table was put right"}
DAY = 86_400


def letters(repository, **options):
    return repository.list_dead_letters(**options)


class TestListDeadLetters:
    def test_open(self, repository, clock):
        """The oldest first, and only those that are open."""
        made = []
        for _ in range(3):
            made.append(a_receipt(repository, "failed").id)
            clock.seconds += 1
        repository.resolve(made[1], **BY_ANNA)
        assert [made[0], made[2]] == [letter.original_receipt_id for letter in letters(repository)]
        assert made == [letter.original_receipt_id for letter in letters(repository, open_only=False)]
        assert made[:1] == [letter.original_receipt_id for letter in letters(repository, limit=1)]

    def test_bad_limit(self, repository):
        with pytest.raises(ValueError, match="limit: expected"):
            letters(repository, limit=0)


class TestRequeue:
    def test_pending_again(self, repository, clock):
        """Pending, with its place and deadline, a fresh budget, and who and why on record."""
        receipt = a_receipt(repository)
        repository.increment_retry_count(receipt.id, "timeout")
        repository.move_to_dlq(receipt.id, "rejected")
        a_receipt(repository)
        clock.seconds += 60
        repository.requeue(receipt.id, **BY_ANNA)
        again = repository.get_pending_receipts()[0]
        assert (receipt.id, 0, receipt.hlc_local_time, receipt.created_at) == (
            again.id,
            again.retry_count,
            again.hlc_local_time,
            again.created_at,
        )
        assert repository.get_buffer_status().oldest_undelivered_at == NOON
        [letter] = letters(repository, open_only=False)
        assert (NOON + 60, "Anna", BY_ANNA["reason"], "requeued", 1) == (
            letter.resolved_at,
            letter.resolved_by,
            letter.resolution_reason,
            letter.resolution,
            letter.retry_attempts,
        )
        event = repository.get_events(1)[0]
        assert ("receipt_requeued", NOON + 60, BY_ANNA) == (event.event_type, event.timestamp, event.details)
        assert [receipt.id] == [claimed.id for claimed in repository.claim_pending(1)]

    def test_second_failure(self, repository):
        """A second failure is a second dead letter; the first stays as history."""
        receipt = a_receipt(repository, "failed")
        repository.requeue(receipt.id, **BY_ANNA)
        repository.move_to_dlq(receipt.id, "rejected again")
        assert ["rejected", "rejected again"] == [letter.reason for letter in letters(repository, open_only=False)]
        assert ["rejected again"] == [letter.reason for letter in letters(repository)]

    def test_full(self, repository):
        """A requeued receipt takes a place like any other; without one, all stays as it was."""
        receipt = a_receipt(repository, "failed")
        repository.set_config("buffer_capacity", 1)
        a_receipt(repository)
        with pytest.raises(BufferFullError, match="1 of 1"):
            repository.requeue(receipt.id, **BY_ANNA)
        assert (1, 1) == (len(letters(repository)), repository.get_buffer_status().failed)
        assert repository.get_events(event_type="receipt_requeued") == []


class TestRequeueAll:
    def test_all(self, repository):
        made = [a_receipt(repository, "failed").id for _ in range(3)]
        assert repository.requeue_all(**BY_ANNA) == 3
        assert made == [receipt.id for receipt in repository.get_pending_receipts()]
        assert len(repository.get_events(event_type="receipt_requeued")) == 3

    def test_none(self, repository):
        a_receipt(repository, "synced")
        assert repository.requeue_all(**BY_ANNA) == 0

    def test_as_many_as_fit(self, repository):
        """The first in HLC order, up to the capacity; the others stay open. With no room at all it says so."""
        made = [a_receipt(repository, "failed").id for _ in range(3)]
        repository.set_config("buffer_capacity", 2)
        assert repository.requeue_all(**BY_ANNA) == 2
        assert made[2:] == [letter.original_receipt_id for letter in letters(repository)]
        with pytest.raises(BufferFullError, match="2 of 2"):
            repository.requeue_all(**BY_ANNA)

    def test_not_the_resolved(self, repository):
        repository.resolve(a_receipt(repository, "failed").id, **BY_ANNA)
        a_receipt(repository, "failed")
        assert repository.requeue_all(**BY_ANNA) == 1


class TestClosed:
    @pytest.mark.parametrize("verb", ["requeue", "resolve"])
    def test_again(self, repository, verb):
        """What was decided is final, and the operator who asks again is told so."""
        receipt = a_receipt(repository, "failed")
        repository.resolve(receipt.id, **BY_ANNA)
        with pytest.raises(InvalidTransitionError, match=r"Its dead letter is closed already, and that is final\."):
            getattr(repository, verb)(receipt.id, **BY_ANNA)


class TestResolve:
    def test_final(self, repository, clock):
        """Failed for good, out of the 30-day rule, and on record."""
        receipt = a_receipt(repository, "failed")
        clock.seconds += 60
        repository.resolve(receipt.id, **BY_ANNA)
        status = repository.get_buffer_status()
        assert (1, 0, None, None) == (
            status.failed,
            status.dlq_size,
            status.oldest_undelivered_at,
            status.deadline_at,
        )
        event = repository.get_events(1)[0]
        assert ("receipt_resolved", NOON + 60, BY_ANNA) == (event.event_type, event.timestamp, event.details)
        for again in (repository.resolve, repository.requeue):
            with pytest.raises(InvalidTransitionError, match="is failed and cannot become"):
                again(receipt.id, **BY_ANNA)
        assert repository.move_to_dlq(receipt.id, "again") is True
        assert letters(repository) == []

    def test_delivered_after_all(self, repository):
        """A delivery is a fact, of a resolved receipt too; the resolution stays on record."""
        receipt = a_receipt(repository, "failed")
        repository.resolve(receipt.id, **BY_ANNA)
        assert repository.mark_synced(receipt.id, NOON)
        assert repository.get_receipt_by_id(receipt.id).status == "synced"
        assert [letter.resolution for letter in letters(repository, open_only=False)] == ["resolved"]


class TestRefused:
    @pytest.mark.parametrize("verb", ["requeue", "resolve"])
    @pytest.mark.parametrize("status", ["pending", "syncing", "synced"])
    def test_no_dead_letter(self, repository, verb, status):
        receipt = a_receipt(repository, status)
        with pytest.raises(InvalidTransitionError, match=f"is {status} and cannot become {verb}d; it was not changed"):
            getattr(repository, verb)(receipt.id, **BY_ANNA)
        assert status == repository.get_receipt_by_id(receipt.id).status

    @pytest.mark.parametrize("verb", ["requeue", "resolve"])
    def test_missing(self, repository, verb):
        with pytest.raises(ReceiptNotFoundError):
            getattr(repository, verb)(an_id(), **BY_ANNA)

    @pytest.mark.parametrize("verb", ["requeue", "resolve", "requeue_all"])
    @pytest.mark.parametrize("field", ["actor", "reason"])
    @pytest.mark.parametrize("value", ["", "  ", None])
    def test_who_and_why(self, repository, verb, field, value):
        """Nobody does this without a name and a reason."""
        receipt = a_receipt(repository, "failed")
        arguments = () if verb == "requeue_all" else (receipt.id,)
        with pytest.raises((ValueError, TypeError), match=f"{field}: expected a text"):
            getattr(repository, verb)(*arguments, **BY_ANNA | {field: value})
        assert len(letters(repository)) == 1


class TestGetReceiptsDue:
    def test_most_urgent_first(self, repository, clock):
        """What the OFD must have by then: undelivered and dead-lettered ones, not what is synced or resolved."""
        made = {}
        for status in ("failed", "syncing", "pending", "synced", "resolved", "late"):
            made[status] = a_receipt(repository, status if status in {"failed", "syncing", "synced"} else "pending").id
            clock.seconds += DAY
        repository.move_to_dlq(made["resolved"], "rejected")
        repository.resolve(made["resolved"], **BY_ANNA)
        due = repository.get_receipts_due(NOON + 35 * DAY)
        assert [made["failed"], made["syncing"], made["pending"]] == [receipt.id for receipt in due]
        assert [made["failed"]] == [receipt.id for receipt in repository.get_receipts_due(NOON + 35 * DAY, limit=1)]

    def test_to_the_second(self, repository):
        """Its time is up 30 days after it was made; before that moment it is not missed."""
        receipt = a_receipt(repository)
        assert repository.get_receipts_due(NOON + 30 * DAY) == []
        assert [receipt.id] == [due.id for due in repository.get_receipts_due(NOON + 30 * DAY + 1)]

    def test_setting(self, repository):
        repository.set_config("ofd_deadline_days", 1)
        a_receipt(repository)
        assert len(repository.get_receipts_due(NOON + DAY + 1)) == 1

    def test_requeue_resets_nothing(self, repository, clock):
        receipt = a_receipt(repository, "failed")
        clock.seconds += 10 * DAY
        repository.requeue(receipt.id, **BY_ANNA)
        assert len(repository.get_receipts_due(NOON + 30 * DAY + 1)) == 1

    @pytest.mark.parametrize("before", [-1, True, "x"])
    def test_bad(self, repository, before):
        with pytest.raises((ValueError, TypeError), match="before: expected"):
            repository.get_receipts_due(before)


def test_story(repository, clock):
    """The events of a receipt tell its story, each fact once and in order."""
    receipt_id = repository.insert_receipt(new_receipt())
    [claimed] = repository.claim_pending(1)
    repository.record_failure(receipt_id, "timeout", claimed.lease_token)
    repository.move_to_dlq(receipt_id, "rejected")
    repository.requeue(receipt_id, **BY_ANNA)
    repository.move_to_dlq(receipt_id, "rejected again")
    repository.mark_synced(receipt_id, NOON)
    assert [
        "receipt_added",
        "receipt_attempt_failed",
        "receipt_failed",
        "receipt_requeued",
        "receipt_failed",
        "receipt_synced",
    ] == story(repository, receipt_id)
