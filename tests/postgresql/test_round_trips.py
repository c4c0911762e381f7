"""
How often a call crosses the network, where the database is on another machine.

The lock that all inserts take is not held meanwhile: one receipt, or one batch, is one statement in autocommit.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import an_id, new_receipt
from postgresql.cluster import wait_until
from sqlalchemy import event, text

from kkt_buffer.postgresql.engine import ONE_STATEMENT

BATCH = 64

# Each operation, on a connection that has been used for it before, and its round trips.
BUDGETS = {
    "insert": 1,
    "batch": 1,
    "claim": 6,  # locks only what others skip
    "mark_synced": 3,  # BEGIN, the statement, COMMIT
    "status": 3,
    "transaction": 8,  # BEGIN, a savepoint for each receipt and its release, COMMIT
}


@pytest.fixture
def repository(open_repository, through_proxy):
    repository = open_repository(through_proxy)
    repository.set_config("buffer_capacity", 10_000)
    return repository


@pytest.fixture
def operations(repository):
    def in_transaction():
        with repository.transaction():
            repository.insert_receipt(new_receipt())
            repository.insert_receipt(new_receipt())

    def mark_synced():
        repository.mark_synced(known.pop(), 5)

    known = repository.insert_receipts(new_receipt() for _ in range(20))
    return {
        "insert": lambda: repository.insert_receipt(new_receipt(id=an_id())),
        "batch": lambda: repository.insert_receipts(new_receipt() for _ in range(BATCH)),
        "claim": lambda: repository.claim_pending(1),
        "mark_synced": mark_synced,
        "status": repository.get_buffer_status,
        "transaction": in_transaction,
    }


@pytest.mark.parametrize("name", BUDGETS)
def test_round_trips(operations, proxy, name):
    for _ in range(10):  # until the schema was checked and a connection is in the pool
        operations[name]()
    before = proxy.round_trips
    operations[name]()
    assert BUDGETS[name] == proxy.round_trips - before


def test_mixed(repository, server_engine):
    """Inserts that wait for their turn among deliveries are stored with one statement, outside of a transaction."""
    known = repository.insert_receipts(new_receipt() for _ in range(4))
    is_alone = []

    def note(connection, _cursor, statement, *_):
        if "kkt_insert_receipts" in statement:
            is_alone.append(connection.get_execution_options().get(ONE_STATEMENT))

    event.listen(repository.engine, "before_cursor_execute", note)
    with ThreadPoolExecutor(9) as pool:
        with server_engine.begin() as connection:
            connection.execute(text("SELECT kkt_lock_buffer()"))
            calls = [pool.submit(repository.insert_receipt, new_receipt())]
            wait_until(lambda: is_alone)
            for receipt_id in known:
                calls.append(pool.submit(repository.mark_synced, receipt_id, 5))
                calls.append(pool.submit(repository.insert_receipt, new_receipt()))
            wait_until(lambda: len(repository._group._waiting) == 8)
        for call in calls:
            assert call.result()
    assert {True} == set(is_alone)
    assert (5, 4) == (repository.get_buffer_status().pending, repository.get_buffer_status().synced)
