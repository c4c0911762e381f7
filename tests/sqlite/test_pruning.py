"""What `prune` does to the numbers of rows: SQLite gives the greatest ones again once they are free."""

import pytest
from builders import NOON, a_receipt
from predecessor import adopt, make, receipt, run
from sqlalchemy import text

from kkt_buffer import ReceiptRepository

DELIVERED = {"status": "synced", "hlc_server_time": NOON, "synced_at": NOON}


@pytest.fixture
def adopted(tmp_path, open_engine, clock):
    """A repository on an adopted file, of receipts that are delivered or not, a week after the last delivery."""

    def opened(*kinds):
        path = make(tmp_path / "old.db")
        run(path, *(receipt(id=f"r{number}", hlc_logical_counter=number, **kind) for number, kind in enumerate(kinds)))
        adopt(path)
        clock.seconds += 8 * 86_400
        engine = open_engine(path)
        return engine, ReceiptRepository(engine, now=clock)

    return opened


class TestAdoptedRows:
    def test_lowered(self, adopted):
        """`adopted_rows` follows the greatest row that is left, so that no later row is taken for an adopted one."""
        _, repository = adopted(DELIVERED, {}, DELIVERED)
        assert repository.get_config("adopted_rows") == "3"
        assert repository.prune().receipts == 2
        assert repository.get_config("adopted_rows") == "2"
        repository.mark_synced("r1", NOON)
        a_receipt(repository)
        assert repository.get_config("adopted_rows") == "2"

    def test_lowered_by_resolved(self, adopted, clock):
        """The same where resolved receipts are pruned."""
        _, repository = adopted({}, {})
        repository.move_to_dlq("r1", "a test of the till")
        repository.resolve("r1", actor="Anna", reason="not a real sale")
        clock.seconds += 90 * 86_400
        assert repository.prune().receipts == 1
        assert repository.get_config("adopted_rows") == "1"

    def test_order_is_checked(self, adopted):
        """A receipt that has the row number of an adopted one again is checked like any other of ours."""
        engine, repository = adopted(DELIVERED, DELIVERED)
        assert repository.prune().receipts == 2
        assert repository.get_config("adopted_rows") == "0"
        first, _second = a_receipt(repository), a_receipt(repository)
        assert repository.check_integrity().is_sound
        with engine.begin() as connection:
            connection.execute(text("DROP TRIGGER trg_guard_acknowledged"))
            change = text("UPDATE receipts SET hlc_local_time = hlc_local_time + 9 WHERE id = :id")
            connection.execute(change, {"id": first.id})
        assert repository.check_integrity().findings["order of timestamps"]

    def test_clock_goes_on(self, adopted, clock):
        """Timestamps go on above those of the adopted receipts, after all of them were pruned."""
        _, repository = adopted(DELIVERED, DELIVERED)
        repository.prune()
        clock.seconds = NOON - 1
        made = a_receipt(repository)
        assert (NOON, 2) == (made.hlc_local_time, made.hlc_logical_counter)
