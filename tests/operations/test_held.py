"""Print first, then deliver: receipts that are held until their document is complete."""

import pytest
from builders import NOON, a_foreign_receipt, a_receipt, an_id, new_receipt, snapshot, stamps, story
from sqlalchemy import text

from kkt_buffer import (
    BufferDamagedError,
    BufferFullError,
    DuplicateReceiptError,
    InvalidDocumentError,
    InvalidTransitionError,
    ReceiptNotFoundError,
    deliver_pending,
)
from kkt_buffer.documents import digest_of

BY_ANNA = {"actor": "Anna", "reason": "the printer was out of paper"}
DRAFT = '{"totalSum": 10.10 }'
SIGN = {"fiscalSign": 3141592653}
COMPLETE = '{"totalSum": 10.10 ,"fiscalSign":3141592653}'


def hold(repository, **fields):
    return repository.insert_receipt(new_receipt(fiscal_doc=DRAFT, **fields), hold=True)


def ids(receipts):
    return [receipt.id for receipt in receipts]


class TestHold:
    def test_row(self, repository, clock):
        """It is pending, and held since it was stored."""
        receipt = repository.get_receipt_by_id(hold(repository))
        assert ("pending", NOON, DRAFT) == (receipt.status, receipt.held_at, receipt.fiscal_doc)
        assert a_receipt(repository).held_at is None

    def test_batch(self, repository):
        receipt_ids = repository.insert_receipts([new_receipt(), new_receipt()], hold=True)
        assert receipt_ids == ids(repository.list_held())

    def test_not_delivered(self, repository, clock):
        """Nobody gets it: not a worker, and not whoever asks what is pending."""
        receipt_id = hold(repository)
        assert [] == repository.get_pending_receipts()
        assert [] == repository.claim_pending()
        assert {} == deliver_pending(repository, lambda _: NOON).outcomes
        with pytest.raises(InvalidTransitionError, match="is held and cannot become syncing; .*discard_held"):
            repository.update_receipt_status(receipt_id, "syncing")
        assert repository.update_receipt_status(receipt_id, "pending") is True
        assert [receipt_id] == ids(repository.list_held())

    def test_counts(self, repository):
        """It takes a place of the capacity, and has a deadline like any other."""
        receipt_id = hold(repository)
        repository.set_config("buffer_capacity", 1)
        status = repository.get_buffer_status()
        assert (1, 1, NOON, NOON + 30 * 86_400) == (
            status.held,
            status.pending,
            status.oldest_undelivered_at,
            status.deadline_at,
        )
        assert [receipt_id] == ids(repository.get_receipts_due(NOON + 31 * 86_400))
        with pytest.raises(BufferFullError):
            hold(repository)

    def test_attempt(self, repository):
        """A failed print may be counted; the receipt stays held."""
        receipt_id = hold(repository)
        assert repository.increment_retry_count(receipt_id, "no paper") == 1
        assert repository.get_buffer_status().held == 1

    def test_synced(self, repository):
        """A delivery is a fact: it is recorded, alone and together with others, and ends the hold."""
        one, other = hold(repository), hold(repository)
        assert repository.mark_synced(one, NOON) is True
        assert repository.update_receipt_status(other, "synced") is True
        assert [] == repository.list_held()
        receipt = repository.get_receipt_by_id(one)
        assert ("synced", None, DRAFT) == (receipt.status, receipt.held_at, receipt.fiscal_doc)
        assert story(repository, one) == ["receipt_added", "receipt_synced"]


class TestUpdateReceiptFiscalDoc:
    def test_completed(self, repository, clock):
        """The fields are merged in, the receipt is due, and its digest is that of the complete document."""
        receipt_id = hold(repository)
        clock.seconds += 5
        assert repository.update_receipt_fiscal_doc(receipt_id, SIGN) is True
        receipt = repository.get_receipt_by_id(receipt_id)
        assert ("pending", None, COMPLETE) == (receipt.status, receipt.held_at, receipt.fiscal_doc)
        assert (digest_of(COMPLETE), digest_of(DRAFT), True) == (
            receipt.digest,
            receipt.inserted_digest,
            receipt.is_intact,
        )
        last = repository.get_events(1)[0]
        assert ("receipt_completed", NOON + 5, {"digest": digest_of(COMPLETE)}) == (
            last.event_type,
            last.timestamp,
            last.details,
        )
        assert repository.get_buffer_status().held == 0
        assert [receipt_id] == ids(repository.claim_pending())

    def test_order(self, repository, clock):
        """It keeps its place: completed late, it is delivered before what was stored after it."""
        first, second = hold(repository), hold(repository)
        third = a_receipt(repository).id
        clock.seconds += 60
        repository.update_receipt_fiscal_doc(second, SIGN)
        repository.update_receipt_fiscal_doc(first, SIGN)
        pending = repository.get_pending_receipts()
        assert [first, second, third] == ids(pending)
        assert [(NOON, 0), (NOON, 1), (NOON, 2)] == stamps(pending)
        sent = []
        deliver_pending(repository, lambda receipt: sent.append(receipt.fiscal_doc) or NOON)
        assert [COMPLETE, COMPLETE] == sent[:2]

    def test_again(self, repository, engine):
        """The same fields once more, whatever became of the receipt: true, and nothing changes."""
        receipt_id = hold(repository)
        repository.update_receipt_fiscal_doc(receipt_id, SIGN)
        for _ in range(2):
            before = snapshot(engine)
            assert repository.update_receipt_fiscal_doc(receipt_id, SIGN) is True
            assert before == snapshot(engine)
            repository.mark_synced(receipt_id, NOON)

    @pytest.mark.parametrize("status", ["pending", "syncing", "synced", "failed"])
    @pytest.mark.parametrize("fields", [{"fiscalSign": 1}, {"more": 1}, {**SIGN, "more": 1}])
    def test_not_held(self, repository, engine, status, fields):
        """A document that is complete takes no more fields, and no other values."""
        receipt = a_receipt(repository, status, fiscal_doc=COMPLETE)
        before = snapshot(engine)
        with pytest.raises(InvalidTransitionError, match=f"is {status} and cannot become completed; .*hold=True"):
            repository.update_receipt_fiscal_doc(receipt.id, fields)
        assert before == snapshot(engine)
        assert repository.update_receipt_fiscal_doc(receipt.id, SIGN) is True

    def test_already_there(self, repository):
        """A held receipt whose document has the fields already is released as it is."""
        receipt_id = repository.insert_receipt(new_receipt(fiscal_doc=COMPLETE), hold=True)
        assert repository.update_receipt_fiscal_doc(receipt_id, SIGN) is True
        assert [COMPLETE] == [receipt.fiscal_doc for receipt in repository.get_pending_receipts()]

    def test_missing(self, repository):
        assert repository.update_receipt_fiscal_doc(an_id(), SIGN) is False

    @pytest.mark.parametrize("fields", [None, {}, {"a": float("nan")}, {5: 1}])
    def test_bad_fields(self, repository, engine, fields):
        """What is no answer of a fiscal drive releases nothing."""
        receipt_id = hold(repository)
        before = snapshot(engine)
        with pytest.raises((TypeError, ValueError), match="^fields: "):
            repository.update_receipt_fiscal_doc(receipt_id, fields)
        assert before == snapshot(engine)

    def test_too_long(self, repository, engine):
        """The complete document has the limits of any other."""
        receipt_id = repository.insert_receipt(new_receipt(fiscal_doc={"a": "x" * 40_000_000}), hold=True)
        with pytest.raises(ValueError, match="fiscal_doc: at most 67108864 characters"):
            repository.update_receipt_fiscal_doc(receipt_id, {"b": "x" * 30_000_000})
        assert [receipt_id] == ids(repository.list_held())

    def test_damaged(self, repository, engine):
        """A draft that has changed since it was stored is not given a new digest: that would hide the damage."""
        receipt_id = hold(repository)
        with engine.begin() as connection:
            connection.execute(text("UPDATE receipts SET fiscal_doc = '{\"totalSum\": 90.10 }'"))
        with pytest.raises(BufferDamagedError, match=f"document of receipt {receipt_id} differs from its digest"):
            repository.update_receipt_fiscal_doc(receipt_id, SIGN)
        assert [receipt_id] == ids(repository.list_held())
        assert not repository.list_held()[0].is_intact

    def test_foreign(self, repository, engine):
        """A draft of another program has no digest: it is completed, and gets both. One that is no JSON is told."""
        a_foreign_receipt(engine, "foreign", held_at=5, fiscal_doc=DRAFT)
        a_foreign_receipt(engine, "broken", held_at=5, fiscal_doc="{")
        assert repository.update_receipt_fiscal_doc("foreign", SIGN) is True
        receipt = repository.get_receipt_by_id("foreign")
        assert (digest_of(COMPLETE), digest_of(DRAFT)) == (receipt.digest, receipt.inserted_digest)
        with pytest.raises(InvalidDocumentError, match="receipt broken is not JSON"):
            repository.update_receipt_fiscal_doc("broken", SIGN)


class TestReplay:
    @pytest.mark.parametrize("step", ["held", "completed", "synced"])
    @pytest.mark.parametrize("hold_again", [False, True])
    def test_identical(self, repository, engine, step, hold_again):
        """A repetition is recognised by what was inserted, whatever the document has become."""
        receipt = new_receipt(id=an_id(), fiscal_doc=DRAFT)
        repository.insert_receipt(receipt, hold=True)
        if step != "held":
            repository.update_receipt_fiscal_doc(receipt["id"], SIGN)
        if step == "synced":
            repository.mark_synced(receipt["id"], NOON)
        before = snapshot(engine)
        assert receipt["id"] == repository.insert_receipt(receipt, exist_ok=True, hold=hold_again)
        assert [receipt["id"]] == repository.insert_receipts([receipt], exist_ok=True, hold=hold_again)
        with pytest.raises(DuplicateReceiptError) as refused:
            repository.insert_receipt(receipt, hold=hold_again)
        assert refused.value.identical
        assert before == snapshot(engine)

    def test_other(self, repository):
        """The complete document is not what was inserted."""
        receipt = new_receipt(id=an_id(), fiscal_doc=DRAFT)
        repository.insert_receipt(receipt, hold=True)
        repository.update_receipt_fiscal_doc(receipt["id"], SIGN)
        with pytest.raises(DuplicateReceiptError) as refused:
            repository.insert_receipt({**receipt, "fiscal_doc": COMPLETE}, exist_ok=True)
        assert (True, False) == (refused.value.same_pos_id, refused.value.same_document)


class TestDeadLetters:
    """A dead-lettered receipt stays held; a print is recorded all the same."""

    def test_requeued(self, repository):
        """Given up and requeued, it is held again, and not delivered."""
        receipt_id = hold(repository)
        repository.move_to_dlq(receipt_id, "no paper")
        assert ([], 0) == (repository.list_held(), repository.get_buffer_status().held)
        assert repository.get_receipt_by_id(receipt_id).held_at == NOON
        repository.requeue(receipt_id, **BY_ANNA)
        assert [receipt_id] == ids(repository.list_held())
        assert [] == repository.claim_pending()

    def test_completed(self, repository):
        """It takes the fields, its dead letter too; it waits for an operator, and is due once requeued."""
        receipt_id = hold(repository)
        repository.move_to_dlq(receipt_id, "no answer of the register")
        repository.update_receipt_fiscal_doc(receipt_id, SIGN)
        [letter] = repository.list_dead_letters()
        receipt = repository.get_receipt_by_id(receipt_id)
        assert ("failed", COMPLETE, COMPLETE) == (receipt.status, receipt.fiscal_doc, letter.fiscal_doc)
        assert story(repository, receipt_id) == ["receipt_added", "receipt_failed", "receipt_completed"]
        repository.requeue(receipt_id, **BY_ANNA)
        assert [COMPLETE] == [due.fiscal_doc for due in repository.claim_pending()]

    def test_closed_letter(self, repository):
        """The copy in a dead letter that was closed before stays as it was."""
        receipt_id = hold(repository)
        repository.move_to_dlq(receipt_id, "no paper")
        repository.requeue(receipt_id, **BY_ANNA)
        repository.update_receipt_fiscal_doc(receipt_id, SIGN)
        assert [DRAFT] == [letter.fiscal_doc for letter in repository.list_dead_letters(open_only=False)]

    def test_synced(self, repository):
        receipt_id = hold(repository)
        repository.move_to_dlq(receipt_id, "no paper")
        assert repository.mark_synced(receipt_id, NOON) is True
        assert repository.get_receipt_by_id(receipt_id).held_at is None
        assert story(repository, receipt_id) == ["receipt_added", "receipt_failed", "receipt_synced"]


class TestListHeld:
    def test_order(self, repository, clock):
        """The oldest first; of one till, if that asks about its own."""
        made = []
        for seconds, pos_id in ((100, "till-1"), (50, "till-2"), (200, "till-1")):
            clock.seconds = NOON + seconds
            made.append(hold(repository, pos_id=pos_id))
        a_receipt(repository)
        assert made == ids(repository.list_held())
        assert made[:2] == ids(repository.list_held(2))
        assert [made[0], made[2]] == ids(repository.list_held(pos_id="till-1"))
        assert made[:1] == ids(repository.list_held(1, pos_id="till-1"))
        assert [] == repository.list_held(pos_id="till-3")

    @pytest.mark.parametrize("arguments", [{"limit": 0}, {"pos_id": ""}])
    def test_bad(self, repository, arguments):
        with pytest.raises(ValueError, match="expected"):
            repository.list_held(**arguments)


class TestDiscardHeld:
    @pytest.mark.parametrize("is_dead_lettered", [False, True])
    def test_closed(self, repository, clock, is_dead_lettered):
        """Given up for good, without being sent; who decided it, and why, is on record."""
        receipt_id = hold(repository)
        if is_dead_lettered:
            repository.move_to_dlq(receipt_id, BY_ANNA["reason"])
        clock.seconds += 5
        repository.discard_held(receipt_id, **BY_ANNA)
        status = repository.get_buffer_status()
        assert (0, 0, 1, 0, None) == (
            status.held,
            status.pending,
            status.failed,
            status.dlq_size,
            status.oldest_undelivered_at,
        )
        [letter] = repository.list_dead_letters(open_only=False)
        assert (BY_ANNA["reason"], "Anna", BY_ANNA["reason"], "resolved", NOON + 5) == (
            letter.reason,
            letter.resolved_by,
            letter.resolution_reason,
            letter.resolution,
            letter.resolved_at,
        )
        assert story(repository, receipt_id) == ["receipt_added", "receipt_failed", "receipt_resolved"]
        assert [] == repository.list_held()
        assert repository.check_integrity().is_sound

    def test_final(self, repository, engine):
        """Neither discarded again, nor requeued; a print of it is refused loudly, since it would not be delivered."""
        receipt_id = hold(repository)
        repository.discard_held(receipt_id, **BY_ANNA)
        before = snapshot(engine)
        with pytest.raises(InvalidTransitionError, match="is failed and cannot become discarded"):
            repository.discard_held(receipt_id, **BY_ANNA)
        with pytest.raises(InvalidTransitionError):
            repository.requeue(receipt_id, **BY_ANNA)
        with pytest.raises(InvalidTransitionError, match="is discarded and cannot become completed; .* with a new id"):
            repository.update_receipt_fiscal_doc(receipt_id, SIGN)
        assert before == snapshot(engine)

    @pytest.mark.parametrize("status", ["pending", "syncing", "synced", "failed"])
    def test_not_held(self, repository, engine, status):
        receipt = a_receipt(repository, status)
        before = snapshot(engine)
        with pytest.raises(InvalidTransitionError, match=f"is {status} and cannot become discarded; .*Only a held"):
            repository.discard_held(receipt.id, **BY_ANNA)
        assert before == snapshot(engine)

    def test_completed(self, repository):
        """What was printed is delivered, whatever somebody decides too late."""
        receipt_id = hold(repository)
        repository.update_receipt_fiscal_doc(receipt_id, SIGN)
        with pytest.raises(InvalidTransitionError):
            repository.discard_held(receipt_id, **BY_ANNA)
        assert [receipt_id] == ids(repository.claim_pending())

    def test_missing(self, repository):
        with pytest.raises(ReceiptNotFoundError):
            repository.discard_held(an_id(), **BY_ANNA)

    @pytest.mark.parametrize("wrong", [{"actor": ""}, {"reason": " "}])
    def test_unsigned(self, repository, wrong):
        receipt_id = hold(repository)
        with pytest.raises(ValueError, match="expected a text"):
            repository.discard_held(receipt_id, **BY_ANNA | wrong)
        assert [receipt_id] == ids(repository.list_held())
