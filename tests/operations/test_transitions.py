"""What a receipt may become, and what is on record of it."""

import pytest
from builders import NOON, STATUSES, a_receipt, an_id, snapshot, story
from sqlalchemy import text

from kkt_buffer import InvalidTransitionError, ReceiptNotFoundError, ReceiptStatus
from kkt_buffer.models import TRANSITIONS


class TestMarkSynced:
    @pytest.mark.parametrize("status", ["pending", "syncing", "failed"])
    def test_from_any_status(self, repository, clock, status):
        """A delivery is recorded whatever the status was."""
        receipt = a_receipt(repository, status)
        clock.seconds += 60
        assert repository.mark_synced(receipt.id, NOON + 42) is True
        synced = repository.get_receipt_by_id(receipt.id)
        assert ("synced", NOON + 60, NOON + 42) == (synced.status, synced.synced_at, synced.hlc_server_time)
        [event] = repository.get_events(event_type="receipt_synced")
        assert (receipt.id, NOON + 60, NOON + 42) == (event.receipt_id, event.timestamp, event.details["server_time"])

    def test_first_stays(self, repository, engine):
        """A second report of the same delivery is true, and changes nothing."""
        receipt = a_receipt(repository, "synced")
        before = snapshot(engine)
        assert repository.mark_synced(receipt.id, NOON + 1000) is True
        assert before == snapshot(engine)

    def test_dead_letter(self, repository, engine, clock):
        """The open dead letter of a delivered receipt is resolved, by name."""
        receipt = a_receipt(repository, "failed")
        clock.seconds += 60
        repository.mark_synced(receipt.id, NOON)
        with engine.connect() as connection:
            row = connection.execute(text("SELECT resolved_at, resolved_by, resolution_reason FROM dlq")).one()
        assert (NOON + 60, "delivery", "the receipt was delivered") == row
        assert repository.get_buffer_status().dlq_size == 0
        assert story(repository, receipt.id) == ["receipt_added", "receipt_failed", "receipt_synced"]

    def test_missing(self, repository):
        assert repository.mark_synced(an_id(), NOON) is False

    @pytest.mark.parametrize("server_time", [-1, True, 1.5, "5", None, 2**63])
    def test_bad_server_time(self, repository, engine, server_time):
        receipt = a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises((ValueError, TypeError), match="server_time: expected a whole number of 0 or more"):
            repository.mark_synced(receipt.id, server_time)
        assert before == snapshot(engine)

    def test_zero_and_largest(self, repository):
        """Any time that the column holds is taken as it is."""
        for server_time in (0, 2**63 - 1):
            receipt = a_receipt(repository)
            repository.mark_synced(receipt.id, server_time)
            assert server_time == repository.get_receipt_by_id(receipt.id).hlc_server_time


class TestIncrementRetryCount:
    def test_counts(self, repository, clock):
        receipt = a_receipt(repository)
        clock.seconds += 5
        assert repository.increment_retry_count(receipt.id, "no route to host") == 1
        assert repository.increment_retry_count(receipt.id, "timeout") == 2
        after = repository.get_receipt_by_id(receipt.id)
        assert (2, "timeout", "pending") == (after.retry_count, after.last_error, after.status)
        assert story(repository, receipt.id) == ["receipt_added", "receipt_attempt_failed", "receipt_attempt_failed"]
        last = repository.get_events(1)[0]
        assert (NOON + 5, {"retry_count": 2, "error": "timeout"}) == (last.timestamp, last.details)

    @pytest.mark.parametrize("status", STATUSES)
    def test_touches_no_status(self, repository, status):
        """It never dead-letters, however often, and leaves every status as it is."""
        repository.set_config("max_retry_attempts", 1)
        receipt = a_receipt(repository, status)
        for _ in range(3):
            repository.increment_retry_count(receipt.id, "timeout")
        assert status == repository.get_receipt_by_id(receipt.id).status

    def test_missing(self, repository):
        with pytest.raises(ReceiptNotFoundError, match="no receipt 'x' in this buffer"):
            repository.increment_retry_count("x", "timeout")

    def test_strange_error(self, repository):
        """An error of any content and length is kept as well as it can be."""
        receipt = a_receipt(repository)
        repository.increment_retry_count(receipt.id, "\ud800\0" + "x" * 10**6)
        assert len(repository.get_receipt_by_id(receipt.id).last_error) == 2000

    @pytest.mark.parametrize("error", ["", "  \n"])
    def test_no_message(self, repository, error):
        """The text of an exception often is empty: the attempt is counted all the same."""
        receipt = a_receipt(repository)
        assert repository.increment_retry_count(receipt.id, error) == 1
        assert repository.get_receipt_by_id(receipt.id).last_error == "(no message)"

    @pytest.mark.parametrize("error", [None, ValueError("x")])
    def test_bad_error(self, repository, engine, error):
        receipt = a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises((ValueError, TypeError), match="error: expected a text"):
            repository.increment_retry_count(receipt.id, error)
        assert before == snapshot(engine)


class TestMoveToDlq:
    @pytest.mark.parametrize("status", ["pending", "syncing"])
    def test_dead_letter(self, repository, engine, clock, status):
        """The dead letter has all that an operator needs, a copy of the document included."""
        receipt = a_receipt(repository, status)
        repository.increment_retry_count(receipt.id, "timeout")
        clock.seconds += 60
        assert repository.move_to_dlq(receipt.id, "unknown tax rate") is True
        assert repository.get_receipt_by_id(receipt.id).status == "failed"
        with engine.connect() as connection:
            letter = connection.execute(text("SELECT * FROM dlq")).one()
        assert (receipt.id, NOON + 60, "unknown tax rate", receipt.fiscal_doc, 1, "timeout", None) == (
            letter.original_receipt_id,
            letter.failed_at,
            letter.reason,
            letter.fiscal_doc,
            letter.retry_attempts,
            letter.last_error,
            letter.resolved_at,
        )
        last = repository.get_events(1)[0]
        assert ("receipt_failed", receipt.id, NOON + 60) == (last.event_type, last.receipt_id, last.timestamp)
        assert {"reason": "unknown tax rate", "retry_attempts": 1} == last.details

    def test_idempotent(self, repository, engine):
        receipt = a_receipt(repository, "failed")
        before = snapshot(engine)
        assert repository.move_to_dlq(receipt.id, "again") is True
        assert before == snapshot(engine)

    def test_missing(self, repository):
        assert repository.move_to_dlq(an_id(), "rejected") is False

    def test_synced(self, repository, engine):
        """What the OFD has cannot be given up."""
        receipt = a_receipt(repository, "synced")
        before = snapshot(engine)
        with pytest.raises(InvalidTransitionError, match="is synced and cannot become failed; it was not changed"):
            repository.move_to_dlq(receipt.id, "rejected")
        assert before == snapshot(engine)

    @pytest.mark.parametrize("reason", ["", " ", None])
    def test_bad_reason(self, repository, engine, reason):
        receipt = a_receipt(repository)
        before = snapshot(engine)
        with pytest.raises((ValueError, TypeError), match="reason: expected a text"):
            repository.move_to_dlq(receipt.id, reason)
        assert before == snapshot(engine)


class TestUpdateReceiptStatus:
    @pytest.mark.parametrize("wanted", STATUSES)
    @pytest.mark.parametrize("status", STATUSES)
    def test_every_move(self, repository, engine, status, wanted):
        """The allowed moves are made, the status it has already is no move, all others are refused."""
        receipt = a_receipt(repository, status)
        before = snapshot(engine)
        if wanted in TRANSITIONS[ReceiptStatus(status)]:
            assert repository.update_receipt_status(receipt.id, wanted) is True
            assert wanted == repository.get_receipt_by_id(receipt.id).status
        elif wanted == status:
            assert repository.update_receipt_status(receipt.id, wanted) is True
            assert before == snapshot(engine)
        else:
            with pytest.raises(InvalidTransitionError, match=f"is {status} and cannot become {wanted}"):
                repository.update_receipt_status(receipt.id, wanted)
            assert before == snapshot(engine)

    def test_the_moves(self):
        """The table of the moves, in full."""
        moves = {(str(a), str(b)) for a, targets in TRANSITIONS.items() for b in targets}
        assert moves == {
            ("pending", "syncing"),
            ("pending", "synced"),
            ("pending", "failed"),
            ("syncing", "pending"),
            ("syncing", "synced"),
            ("syncing", "failed"),
            ("failed", "synced"),
        }

    def test_synced_now(self, repository, clock):
        """`synced` takes the present time for the OFD's."""
        receipt = a_receipt(repository)
        clock.seconds += 7.9
        repository.update_receipt_status(receipt.id, "synced")
        assert repository.get_receipt_by_id(receipt.id).hlc_server_time == NOON + 7

    def test_failed(self, repository, engine):
        """`failed` leaves a dead letter with its reason."""
        repository.update_receipt_status(a_receipt(repository).id, ReceiptStatus.FAILED)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT reason FROM dlq")) == "status set to failed"

    @pytest.mark.parametrize("status", ["done", "", "PENDING", None, 5])
    def test_bad_status(self, repository, status):
        with pytest.raises(ValueError, match="^Invalid status: .*expected pending, syncing, synced, failed$"):
            repository.update_receipt_status(a_receipt(repository).id, status)

    def test_missing(self, repository):
        assert repository.update_receipt_status(an_id(), "syncing") is False

    def test_leases_leave_no_event(self, repository):
        """Taking a receipt and giving it back is no fact about it."""
        receipt = a_receipt(repository)
        repository.update_receipt_status(receipt.id, "syncing")
        repository.update_receipt_status(receipt.id, "pending")
        assert story(repository, receipt.id) == ["receipt_added"]
