"""
How often a call crosses the network, where the database is on another machine.

The lock that all inserts take is not held meanwhile: one receipt, or one batch, is one statement in autocommit.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import an_id, new_receipt
from postgresql.cluster import wait_until
from sqlalchemy import text

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


def test_delivery(repository, server, server_engine):
    """A delivery waits neither for the lock of inserts, nor for those of its own process that wait for it."""
    known = repository.insert_receipt(new_receipt())
    with ThreadPoolExecutor(1) as pool:
        with server_engine.begin() as connection:
            connection.execute(text("SELECT kkt_lock_buffer()"))
            insert = pool.submit(repository.insert_receipt, new_receipt())
            wait_until(lambda: server.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory'"))
            assert repository.mark_synced(known, 5)
            assert not insert.done()
        assert insert.result()
