"""A service that opens its buffer and then forks: each process gets connections of its own."""

import multiprocessing

import pytest
from builders import new_receipt

from kkt_buffer import ReceiptRepository

FORK = multiprocessing.get_context("fork")


def backend_pid(engine):
    """The number of the server's process for the connection that comes next."""
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()


def in_child(engine, answer):
    repository = ReceiptRepository(engine)
    answer.send((backend_pid(engine), repository.insert_receipt(new_receipt())))


def ends_in_child(engine):
    engine.dispose()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_end_of_child(server_engine):
    """A child that closes its buffer ends no session of its parent."""
    repository = ReceiptRepository(server_engine)
    repository.insert_receipt(new_receipt())
    before = backend_pid(server_engine)
    with repository.transaction():  # one connection in use, none idle
        child = FORK.Process(target=ends_in_child, args=(server_engine,))
        child.start()
        child.join()
        repository.insert_receipt(new_receipt())
    child = FORK.Process(target=ends_in_child, args=(server_engine,))
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
