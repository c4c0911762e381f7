"""What a connection may do, and what it leaves in the file."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import NOON, Clock, a_receipt, new_receipt
from sqlalchemy import event, text
from sqlalchemy.exc import InvalidRequestError

from kkt_buffer import (
    AcknowledgedReceiptError,
    BufferDamagedError,
    BufferStorageError,
    Receipt,
    ReceiptRepository,
)

PHONE = "+79161234567"


class TestReadOnlyTransactions:
    def test_refused(self, file_engine, file_repository):
        """A transaction that is marked as reading cannot write, on a connection that has written before, too."""
        a_receipt(file_repository)
        reading = file_engine.execution_options(kkt_buffer_read_only=True)
        for _ in range(2):
            with pytest.raises(BufferStorageError, match="read-only"), reading.begin() as connection:
                connection.execute(text("UPDATE receipts SET last_error = 'x'"))
            with file_engine.begin() as connection:
                connection.execute(text("UPDATE receipts SET last_error = 'y'"))
        assert [receipt.last_error for receipt in file_repository.get_pending_receipts()] == ["y"]


class TestCacheSize:
    @pytest.mark.parametrize(("options", "expected"), [({}, -64_000), ({"cache_size": -2000}, -2000)])
    def test_limit(self, path, open_engine, options, expected):
        """64 MB at most for each connection, unless its owner wants another limit."""
        with open_engine(path, **options).connect() as connection:
            assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == expected


def test_secure_delete(path, open_engine):
    """Nothing of a pruned receipt stays readable in the file."""
    clock = Clock()
    engine = open_engine(path)
    repository = ReceiptRepository(engine, now=clock)
    repository.set_config("retention_synced_days", 0)
    for _ in range(50):
        a_receipt(repository, "synced", fiscal_doc={"buyerPhoneOrAddress": PHONE, "text": "x" * 3000})
    engine.dispose()  # everything is in the database now
    assert PHONE.encode() in path.read_bytes()
    clock.seconds += 86_400
    assert repository.prune().receipts == 50
    engine.dispose()
    assert PHONE.encode() not in path.read_bytes()


class TestAcknowledged:
    def test_orm(self, file_repository):
        """What was acknowledged does not change through the ORM."""
        receipt = a_receipt(file_repository)
        with pytest.raises(AcknowledgedReceiptError, match="Nothing was changed"):
            with file_repository.transaction() as session:
                session.get(Receipt, receipt.id).fiscal_doc = '{"totalSum": 1}'
        assert receipt.fiscal_doc == file_repository.get_receipt_by_id(receipt.id).fiscal_doc

    @pytest.mark.parametrize("column", ["fiscal_doc", "pos_id", "id", "created_at", "hlc_local_time"])
    def test_sql(self, file_repository, file_engine, column):
        """Nor by plain SQL on our engine."""
        receipt = a_receipt(file_repository)
        with pytest.raises(AcknowledgedReceiptError), file_engine.begin() as connection:
            connection.execute(text(f"UPDATE receipts SET {column} = 7"))
        assert receipt.to_dict() == file_repository.get_receipt_by_id(receipt.id).to_dict()


def test_damaged_status(file_repository, file_engine):
    """A status that this package never stores is told as damage, by every operation that meets it."""
    receipt = a_receipt(file_repository)
    with file_engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        connection.execute(text("DROP TRIGGER trg_state_receipt_moved"))
        connection.execute(text("UPDATE receipts SET status = 'lost'"))
    for operation in (
        lambda: file_repository.mark_synced(receipt.id, NOON),
        lambda: file_repository.move_to_dlq(receipt.id, "why"),
        lambda: file_repository.get_receipt_by_id(receipt.id),
    ):
        with pytest.raises(BufferDamagedError, match="the status 'lost'"):
            operation()


def test_long_transaction(file_repository, caplog):
    """A write transaction that was open for longer than a second is told, with its thread."""
    with caplog.at_level(logging.WARNING), file_repository.transaction():
        file_repository.insert_receipt(new_receipt())
        threading.Event().wait(1.1)
    assert f"the thread {threading.current_thread().name!r} had a write transaction open for 1." in caplog.text


def test_closed_inside_a_transaction(path, open_engine):
    """A connection that is closed inside a transaction locks nobody out, though its cursor lives on."""
    engine = open_engine(path, busy_timeout=0.5)
    repository = ReceiptRepository(engine)
    receipt = a_receipt(repository)
    with engine.connect() as connection:
        connection.begin()
        cursor = connection.connection.cursor()
        cursor.execute("UPDATE receipts SET last_error = 'x' RETURNING id")
        connection.invalidate()
    repository.insert_receipt(new_receipt())
    assert repository.get_receipt_by_id(receipt.id).last_error is None


def test_check_of_a_missing_table(file_repository, file_engine):
    """A check that cannot be made is a finding, and the others are made all the same."""
    with file_engine.begin() as connection:
        connection.execute(text("DROP TABLE buffer_state"))
    findings = file_repository.check_integrity().findings
    assert "no such table: buffer_state" in "; ".join(findings["counts"])
    assert findings["references"] == ()


def test_refused_commit(file_repository, file_engine):
    """A listener of the service's own that refuses a shared commit: nobody in it is told that it was stored."""
    refusals = []

    def refuse(_connection):
        if threading.current_thread() is not threading.main_thread():
            refusals.append(threading.current_thread().name)
            raise InvalidRequestError("the shop is closed")

    def insert(_number):
        try:
            return file_repository.insert_receipt(new_receipt())
        except (InvalidRequestError, BufferStorageError) as error:
            return error

    event.listen(file_engine, "commit", refuse)
    with ThreadPoolExecutor(4) as threads:
        with file_repository.transaction():
            answers = [threads.submit(insert, number) for number in range(4)]
            threading.Event().wait(0.5)  # they wait for this transaction
        told = [answer.result(60) for answer in answers]
    event.remove(file_engine, "commit", refuse)
    assert all("the shop is closed" in str(answer) for answer in told)
    assert refusals
    assert file_repository.get_buffer_status().total_receipts == 0
