"""What holds for every operation, whatever it does."""

import contextlib

import pytest
from builders import NOON, checkouts, new_receipt, snapshot
from operations_table import OPERATIONS, OTHERS, Known, prepared, public_names

from kkt_buffer import ReceiptBufferError

# Those that have nothing to do in a buffer as `prepared` makes it: one where no lease is over and nothing is old.
IDLE = {"prune", "recover_expired_leases", "transaction"}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def test_table():
    """A new operation gets a line in the table."""
    assert public_names() == set(OPERATIONS) | OTHERS


@every_operation
class TestEach:
    def test_writes(self, repository, engine, clock, name):
        """An operation changes what the buffer holds exactly if the table says that it writes."""
        known = prepared(repository)
        before = snapshot(engine)
        clock.seconds += 1
        OPERATIONS[name].call(repository, known)
        assert (OPERATIONS[name].writes and name not in IDLE) == (before != snapshot(engine))

    def test_leaves_nothing_open(self, repository, engine, name):
        """The connection goes back, whether the operation is done or refused, and the next one works."""
        for known in (prepared(repository), Known.nothing()):
            with checkouts() as in_use:
                with contextlib.suppress(ReceiptBufferError):
                    OPERATIONS[name].call(repository, known)
                assert [] == in_use
            assert not repository.in_transaction
        repository.insert_receipt(new_receipt())

    def test_undone_with_its_transaction(self, repository, engine, name):
        """Inside a transaction an operation works, and is undone with it."""
        known = prepared(repository)
        before = snapshot(engine)
        with pytest.raises(RuntimeError), repository.transaction():
            OPERATIONS[name].call(repository, known)
            raise RuntimeError
        assert before == snapshot(engine)

    def test_kept_with_its_transaction(self, repository, engine, name):
        """Or is committed with it."""
        known = prepared(repository)
        with repository.transaction():
            OPERATIONS[name].call(repository, known)
            receipt_id = repository.insert_receipt(new_receipt())
        assert repository.get_receipt_by_id(receipt_id).created_at == NOON
