"""A trigger of the service's own refuses the second half of what an operation does: the first half is undone."""

import pytest
from builders import NOON, a_receipt, new_receipt
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from kkt_buffer import BufferDamagedError, deliver_pending


def refuse(engine, when):
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TRIGGER own BEFORE {when} BEGIN SELECT RAISE(ABORT, 'it is closed'); END"))


def test_record_failure(repository, engine):
    """If dead-lettering fails, the attempt is not counted either."""
    repository.set_config("max_retry_attempts", 1)
    a_receipt(repository)
    [claimed] = repository.claim_pending(1)
    refuse(engine, "INSERT ON dlq")
    with pytest.raises(IntegrityError, match="it is closed"):
        repository.record_failure(claimed.id, "timeout", claimed.lease_token)
    found = repository.get_receipt_by_id(claimed.id)
    assert ("syncing", 0, claimed.lease_token) == (found.status, found.retry_count, found.lease_token)


def test_delivery(repository, engine):
    """A delivery that cannot be recorded is told, and nothing more is sent."""
    first, second = a_receipt(repository).id, a_receipt(repository).id
    received = []

    def send(receipt):
        received.append(receipt.id)
        refuse(engine, "UPDATE ON receipts")
        return NOON

    with pytest.raises(IntegrityError, match="it is closed"):
        deliver_pending(repository, send)
    assert [first] == received
    assert ["syncing"] * 2 == [repository.get_receipt_by_id(receipt_id).status for receipt_id in (first, second)]


def test_ignored(repository, engine):
    """A trigger that lets a receipt vanish in silence does not get it acknowledged."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TRIGGER own BEFORE INSERT ON receipts BEGIN SELECT RAISE(IGNORE); END"))
    with pytest.raises(BufferDamagedError, match="0 of 1 receipts were stored"):
        repository.insert_receipt(new_receipt())
    with pytest.raises(BufferDamagedError, match="0 of 2 receipts were stored"):
        repository.insert_receipts([new_receipt(), new_receipt()])
