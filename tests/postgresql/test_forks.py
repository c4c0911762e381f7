"""A service that opens its buffer and then forks: each process gets connections of its own."""

import multiprocessing

import pytest
from builders import new_receipt

from kkt_buffer import BufferStorageError, ReceiptRepository

FORK = multiprocessing.get_context("fork")


def backend_pid(engine):
    """The number of the server's process for the connection that comes next."""
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()


def in_child(engine, answer):
    repository = ReceiptRepository(engine)
    answer.send((backend_pid(engine), repository.insert_receipt(new_receipt())))


def in_transaction_of_parent(repository, answer):
    try:
        repository.insert_receipt(new_receipt())
    except BufferStorageError as error:
        answer.send(str(error))
    repository.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_inside_a_transaction(server_engine):
    """A child that is born inside a transaction cannot add to it, nor end it: its parent decides that."""
    repository = ReceiptRepository(server_engine)
    ours, theirs = FORK.Pipe()
    with repository.transaction():
        first = repository.insert_receipt(new_receipt())
        child = FORK.Process(target=in_transaction_of_parent, args=(repository, theirs))
        child.start()
        child.join()
        second = repository.insert_receipt(new_receipt())
    assert ours.poll(0)
    assert "it belongs to the parent process" in ours.recv()
    assert [first, second] == [receipt.id for receipt in repository.get_pending_receipts()]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_end_of_child(server_engine):
    """A child that closes its buffer ends no session of its parent."""
    before = backend_pid(server_engine)
    child = FORK.Process(target=server_engine.dispose)
    child.start()
    child.join()
    assert before == backend_pid(server_engine)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_fork(server_engine):
    """The child does not use the parent's connection, and does not end it."""
    repository = ReceiptRepository(server_engine)
    repository.insert_receipt(new_receipt())
    before = backend_pid(server_engine)
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=in_child, args=(server_engine, theirs))
    child.start()
    of_child, receipt_id = ours.recv()
    child.join()
    assert 0 == child.exitcode
    assert before != of_child
    assert before == backend_pid(server_engine)
    assert repository.get_receipt_by_id(receipt_id) is not None
