"""`list_receipts`: the receipts of one status, page by page."""

import pytest
from builders import NOON, STATUSES, a_foreign_receipt, a_receipt, new_receipt, stamps
from sqlalchemy import text

from kkt_buffer import ReceiptRepository


def pages(repository, limit, **which):
    """The ids of all pages, from the first to an empty one."""
    found = []
    page = repository.list_receipts(limit=limit, **which)
    while page and len(found) < 10:
        found.append([receipt.id for receipt in page])
        page = repository.list_receipts(limit=limit, after=page[-1], **which)
    return found


class TestListReceipts:
    @pytest.mark.parametrize("status", STATUSES)
    def test_one_status(self, repository, status):
        """Only receipts of the status that was asked for."""
        receipts = {name: a_receipt(repository, name) for name in STATUSES}
        assert [receipts[status].id] == [receipt.id for receipt in repository.list_receipts(status=status)]

    @pytest.mark.parametrize("status", ["pending", "syncing", "failed"])
    def test_order(self, repository, clock, status):
        """In HLC order, also after the clock was set back."""
        for seconds in (NOON, NOON + 9, NOON + 3, NOON):
            clock.seconds = seconds
            a_receipt(repository, status)
        found = stamps(repository.list_receipts(status=status))
        assert [(NOON, 0), (NOON + 9, 0), (NOON + 9, 1), (NOON + 9, 2)] == found

    def test_order_of_synced(self, repository, clock):
        """In the order of their delivery."""
        ids = [repository.insert_receipt(new_receipt()) for _ in range(3)]
        for receipt_id in (ids[1], ids[2], ids[0]):
            clock.seconds += 1
            repository.mark_synced(receipt_id, NOON)
        found = [receipt.id for receipt in repository.list_receipts(status="synced")]
        assert [ids[1], ids[2], ids[0]] == found

    @pytest.mark.parametrize("status", STATUSES)
    @pytest.mark.parametrize("pos_id", [None, "till-1"])
    def test_pages(self, repository, status, pos_id):
        """The pages together are everything, each receipt once, also those delivered in the same second."""
        expected = {a_receipt(repository, status).id for _ in range(7)}
        found = pages(repository, 3, status=status, pos_id=pos_id)
        assert [3, 3, 1] == [len(page) for page in found]
        assert expected == {receipt_id for page in found for receipt_id in page}

    def test_same_timestamp(self, repository, engine):
        """Adopted receipts may have one timestamp: none is left out between two pages."""
        for number in range(5):
            a_foreign_receipt(engine, f"adopted-{number}")
        expected = [["adopted-0", "adopted-1"], ["adopted-2", "adopted-3"], ["adopted-4"]]
        assert expected == pages(repository, 2, status="pending")

    def test_held(self, repository, engine):
        """Pending are those too that wait to be printed, each in its place."""
        for number in range(6):
            held = {"held_at": NOON} if number % 2 else {}
            a_foreign_receipt(engine, f"receipt-{number}", hlc_logical_counter=number, **held)
        expected = [[f"receipt-{number}" for number in page] for page in ((0, 1), (2, 3), (4, 5))]
        assert expected == pages(repository, 2, status="pending")

    @pytest.mark.parametrize("status", STATUSES)
    def test_of_one_till(self, repository, status):
        mine = a_receipt(repository, status, pos_id="till-2")
        a_receipt(repository, status, pos_id="till-1")
        assert [mine.id] == [receipt.id for receipt in repository.list_receipts(status=status, pos_id="till-2")]

    def test_removed_between(self, repository, engine):
        """The page after a receipt that was pruned meanwhile is the same."""
        for _ in range(3):
            a_receipt(repository, "synced")
        first, *rest = repository.list_receipts(status="synced")
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM receipts WHERE id = :id"), {"id": first.id})
        assert [receipt.id for receipt in rest] == [
            receipt.id for receipt in repository.list_receipts(status="synced", after=first)
        ]

    def test_empty(self, repository):
        assert [] == repository.list_receipts(status="failed")

    @pytest.mark.parametrize(
        ("arguments", "error", "named"),
        [
            ({"status": "lost"}, ValueError, "Invalid status: 'lost'"),
            ({"status": "pending", "limit": 0}, ValueError, "limit: "),
            ({"status": "pending", "pos_id": " "}, ValueError, "pos_id: "),
            ({"status": "pending", "after": "an id"}, TypeError, "after: expected the last receipt of the page before"),
        ],
    )
    def test_refused(self, repository, arguments, error, named):
        with pytest.raises(error, match=named):
            repository.list_receipts(**arguments)

    def test_after_another_status(self, repository: ReceiptRepository):
        """A receipt of another status has no place on these pages."""
        with pytest.raises(ValueError, match="after: expected a synced receipt.*got a pending one"):
            repository.list_receipts(status="synced", after=a_receipt(repository))
