"""Receipts that are read: which, in which order, and what can be done with them afterwards."""

import pickle

import pytest
from builders import NOON, STATUSES, a_foreign_receipt, a_receipt, an_id, new_receipt
from sqlalchemy import event

from kkt_buffer import InvalidDocumentError


class TestGetPendingReceipts:
    def test_order_and_limit(self, repository, clock):
        made = []
        for step in (0, 0, 1, 1, 5):
            clock.seconds += step
            made.append(a_receipt(repository).id)
        assert made == [receipt.id for receipt in repository.get_pending_receipts()]
        assert made[:2] == [receipt.id for receipt in repository.get_pending_receipts(2)]

    def test_limit_by_default(self, repository):
        repository.insert_receipts(new_receipt() for _ in range(60))
        assert len(repository.get_pending_receipts()) == 50

    def test_only_pending(self, repository):
        made = {status: a_receipt(repository, status).id for status in STATUSES}
        assert [made["pending"]] == [receipt.id for receipt in repository.get_pending_receipts()]

    @pytest.mark.parametrize("limit", [0, -1, True, "5", 2.0, None, 2**63])
    def test_bad_limit(self, repository, limit):
        with pytest.raises((ValueError, TypeError), match="limit: expected a whole number of 1 or more"):
            repository.get_pending_receipts(limit)

    def test_detached(self, repository, engine):
        """What was returned is complete: no attribute touches the database any more."""
        receipt = a_receipt(repository)
        engine.dispose()
        touched = []
        event.listen(engine, "before_cursor_execute", lambda *_: touched.append(1))
        assert receipt.to_dict() == pickle.loads(pickle.dumps(receipt)).to_dict()
        assert receipt.changed_at is None
        assert [] == touched


class TestReceipt:
    def test_not_json(self, repository, engine):
        """A text that is no JSON, which a predecessor may have left, is kept; decoding it is refused clearly."""
        receipt_id = an_id()
        a_foreign_receipt(engine, receipt_id, fiscal_doc="чек №1")
        receipt = repository.get_receipt_by_id(receipt_id)
        assert receipt.fiscal_doc == "чек №1"
        with pytest.raises(InvalidDocumentError, match=f"fiscal_doc of receipt {receipt.id} is not JSON"):
            receipt.document  # noqa: B018 (a property that raises)
        with pytest.raises(InvalidDocumentError):
            receipt.to_dict()

    def test_missing(self, repository):
        assert repository.get_receipt_by_id(an_id()) is None

    def test_repr(self, repository):
        """What is printed says which and what."""
        receipt = a_receipt(repository, "failed")
        assert f"<Receipt {receipt.id} of till-1: failed>" == repr(receipt)
        assert f"<DeadLetter of {receipt.id}: open>" == repr(repository.list_dead_letters()[0])
        assert f"receipt_failed of {receipt.id} at {NOON}>" in repr(repository.get_events(1)[0])

    def test_bad_id(self, repository):
        with pytest.raises(TypeError, match="id: expected a UUID"):
            repository.get_receipt_by_id(5)
