"""Operations that only read: they lock nobody out, and are all that a monitor may do."""

import pytest
from builders import Clock, everything, new_receipt, together
from operations_table import OPERATIONS, prepared

from kkt_buffer import ReceiptBufferError, ReceiptRepository, create_buffer_engine

READING = [name for name, operation in OPERATIONS.items() if not operation.writes]
WRITING = [name for name, operation in OPERATIONS.items() if operation.writes and name != "transaction"]  # it is empty


@pytest.fixture
def known(file_engine, file_repository):
    return prepared(file_repository)


@pytest.fixture
def monitor(path, known):
    engine = create_buffer_engine(path, read_only=True)
    yield ReceiptRepository(engine, now=Clock())
    engine.dispose()


@pytest.mark.parametrize("name", READING)
def test_beside_a_writer(file_repository, known, monitor, name):
    """While another thread keeps the write lock, reading goes on, in its process and in a monitor's."""
    with file_repository.transaction():
        file_repository.insert_receipt(new_receipt())
        together(2, lambda number: OPERATIONS[name].call((file_repository, monitor)[number], known))


@pytest.mark.parametrize("name", WRITING)
def test_monitor_cannot_write(path, known, monitor, name):
    """On an engine that only reads, whatever writes is refused, and the file stays as it is."""
    before = everything(path)
    with pytest.raises(ReceiptBufferError):
        OPERATIONS[name].call(monitor, known)
    assert before == everything(path)
