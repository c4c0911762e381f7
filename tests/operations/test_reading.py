"""`reading()`: one moment's state, without the write lock."""

import pytest
from builders import NOON, a_receipt, new_receipt
from sqlalchemy import func, select, text

from kkt_buffer import Receipt, ReceiptBufferError, ReceiptRepository
from kkt_buffer.models import ReceiptStatus


class TestReading:
    def test_one_moment(self, shared_repository):
        """What others store meanwhile is not seen, by the session and by operations alike; nobody waits."""
        a_receipt(shared_repository)
        with shared_repository.reading() as session:
            before = session.scalar(select(func.count()).select_from(Receipt))
            other = ReceiptRepository(session.get_bind().engine)
            assert (1, 1) == (before, shared_repository.get_buffer_status().pending)
            assert shared_repository.in_transaction
            assert [] == [receipt for receipt in other.get_pending_receipts() if receipt.pos_id != "till-1"]
        shared_repository.insert_receipt(new_receipt())
        assert shared_repository.get_buffer_status().pending == 2

    def test_beside_a_writer(self, shared_repository):
        """A block that reads for long keeps no writer out."""
        from builders import together  # noqa: PLC0415 (the one test that needs threads)

        with shared_repository.reading():
            assert shared_repository.get_buffer_status().pending == 0
            together(2, lambda _: shared_repository.insert_receipt(new_receipt()))
            assert shared_repository.get_buffer_status().pending == 0
        assert shared_repository.get_buffer_status().pending == 2

    @pytest.mark.parametrize("operation", ["insert_receipt", "mark_synced", "claim_pending", "transaction"])
    def test_no_operation_that_writes(self, repository, operation):
        """It is refused before it begins, and the block goes on."""
        receipt = a_receipt(repository)
        calls = {
            "insert_receipt": lambda: repository.insert_receipt(new_receipt()),
            "mark_synced": lambda: repository.mark_synced(receipt.id, NOON),
            "claim_pending": repository.claim_pending,
            "transaction": lambda: repository.transaction().__enter__(),
        }
        with repository.reading():
            with pytest.raises(ReceiptBufferError, match="inside reading"):
                calls[operation]()
            assert repository.get_receipt_by_id(receipt.id).status == ReceiptStatus.PENDING
        assert repository.insert_receipt(new_receipt())

    def test_no_write_of_ones_own(self, shared_repository):
        """The database refuses it."""
        receipt = a_receipt(shared_repository)
        with pytest.raises(ReceiptBufferError), shared_repository.reading() as session:
            session.execute(text("UPDATE receipts SET last_error = 'x'"))
        assert shared_repository.get_receipt_by_id(receipt.id).last_error is None

    def test_inside_transaction(self, repository):
        """It joins: what the transaction has stored is seen."""
        with repository.transaction() as outer:
            receipt_id = repository.insert_receipt(new_receipt())
            with repository.reading() as session:
                assert session is outer
                assert session.get(Receipt, receipt_id).pos_id == "till-1"
            repository.insert_receipt(new_receipt())
        assert repository.get_buffer_status().pending == 2


def test_two_repositories(engine):
    """An operation of another repository of the same engine joins the transaction that this thread has open."""
    first, second = ReceiptRepository(engine), ReceiptRepository(engine)
    with pytest.raises(LookupError), first.transaction():
        second.insert_receipt(new_receipt())
        assert first.get_buffer_status().pending == 1
        raise LookupError
    assert second.get_buffer_status().pending == 0
