"""A trigger of the service's own refuses the second half of what an operation does: the first half is undone."""

import pytest
from builders import NOON, a_receipt, new_receipt
from sqlalchemy.exc import IntegrityError

from kkt_buffer import BufferDamagedError, deliver_pending

OWN = {
    "sqlite": ["CREATE TRIGGER own BEFORE {when} BEGIN SELECT RAISE({what}); END"],
    "postgresql": [
        "CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {what}; END $$",
        "CREATE TRIGGER own BEFORE {when} FOR EACH ROW EXECUTE FUNCTION own()",
    ],
}
REFUSE = {
    "sqlite": "ABORT, 'it is closed'",
    "postgresql": "RAISE EXCEPTION 'it is closed' USING ERRCODE = 'integrity_constraint_violation'",
}
IGNORE = {"sqlite": "IGNORE", "postgresql": "RETURN NULL"}


def trigger(engine, what, when):
    name = engine.dialect.name
    with engine.begin() as connection:
        for statement in OWN[name]:
            connection.exec_driver_sql(statement.format(when=when, what=what[name]))


def test_record_failure(repository, engine):
    """If dead-lettering fails, the attempt is not counted either."""
    repository.set_config("max_retry_attempts", 1)
    a_receipt(repository)
    [claimed] = repository.claim_pending(1)
    trigger(engine, REFUSE, "INSERT ON dlq")
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
        trigger(engine, REFUSE, "UPDATE ON receipts")
        return NOON

    with pytest.raises(IntegrityError, match="it is closed"):
        deliver_pending(repository, send)
    assert [first] == received
    assert ["syncing"] * 2 == [repository.get_receipt_by_id(receipt_id).status for receipt_id in (first, second)]


def test_ignored(repository, engine):
    """A trigger that lets a receipt vanish in silence does not get it acknowledged."""
    trigger(engine, IGNORE, "INSERT ON receipts")
    with pytest.raises(BufferDamagedError, match="0 of 1 receipts were stored"):
        repository.insert_receipt(new_receipt())
    with pytest.raises(BufferDamagedError, match="0 of 2 receipts were stored"):
        repository.insert_receipts([new_receipt(), new_receipt()])


@pytest.mark.parametrize("status", ["pending", "failed"])
def test_delivery_ignored(repository, engine, status):
    """Nor does one that lets a delivery vanish: it is told, and no thread waits for ever."""
    receipt = a_receipt(repository, status)
    trigger(engine, IGNORE, "UPDATE ON receipts")
    with pytest.raises(BufferDamagedError, match="cannot be marked as synced"):
        repository.mark_synced(receipt.id, NOON)
    assert status == repository.get_receipt_by_id(receipt.id).status
