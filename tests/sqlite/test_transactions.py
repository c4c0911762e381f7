"""What a transaction locks, what its commit is worth, and the pool that it comes from."""

import contextlib
import threading

import pytest
from builders import a_receipt, new_receipt, start_python
from sqlalchemy import NullPool, exc, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from kkt_buffer import (
    BufferBusyError,
    BufferStorageError,
    ReceiptRepository,
)

ADD = text(
    "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)"
    " VALUES (:id, 'till-1', 1, 1, 0, '{}')"
)
COUNT = text("SELECT COUNT(*) FROM receipts")

# Hold a lock on the file until the standard input ends.
LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


class TestTransactions:
    def test_immediate(self, path, open_engine):
        """A write transaction has the lock from its BEGIN, so that none is upgraded in the middle."""
        first, second = open_engine(path), open_engine(path, busy_timeout=0.05)
        with first.begin() as connection:
            connection.execute(COUNT)
            with second.connect() as other, pytest.raises(BufferBusyError):
                other.execute(COUNT)
        with second.begin() as other:
            assert other.scalar(COUNT) == 0

    def test_foreign_lock(self, path, open_engine):
        """Another program's lock is waited for, and then named."""
        with start_python(LOCK, path, stdin=-1) as other:
            assert other.stdout.readline() == "locked\n"
            impatient = open_engine(path, busy_timeout=0.05)
            with pytest.raises(BufferBusyError, match="another program has kept it locked"), impatient.begin() as busy:
                busy.execute(COUNT)
            patient = open_engine(path, busy_timeout=60)
            threading.Timer(0.2, other.kill).start()
            with patient.begin() as connection:
                assert connection.scalar(COUNT) == 0

    def test_reader_is_free(self, file_engine):
        """A reader neither waits for the writer nor sees what is not committed, and keeps its snapshot."""
        reader = file_engine.execution_options(kkt_buffer_read_only=True)
        with reader.connect() as reading:
            assert reading.scalar(COUNT) == 0
            with file_engine.begin() as writing:
                writing.execute(ADD, {"id": "a"})
                with reader.connect() as other:
                    assert other.scalar(COUNT) == 0
            assert reading.scalar(COUNT) == 0
        with reader.connect() as reading:
            assert reading.scalar(COUNT) == 1

    def test_read_only_commit(self, file_engine):
        """A transaction that only reads may end in a commit like any other."""
        with file_engine.execution_options(kkt_buffer_read_only=True).begin() as connection:
            assert connection.scalar(COUNT) == 0

    def test_rollback(self, file_engine):
        """A block that fails leaves nothing, and the next writer comes in."""
        with pytest.raises(IntegrityError), file_engine.begin() as connection:
            connection.execute(ADD, {"id": "a"})
            connection.execute(ADD, {"id": "a"})
        with file_engine.begin() as connection:
            assert connection.scalar(COUNT) == 0

    def test_rolled_back_by_sqlite(self, file_engine):
        """
        A commit of a transaction that SQLite has rolled back by itself raises, and nothing is acknowledged.

        That is what SQLite may do when the disk is full; the driver's own commit() would report success.
        """
        with pytest.raises(BufferStorageError, match="had to roll the transaction back"):
            with file_engine.begin() as connection:
                connection.execute(ADD, {"id": "a"})
                connection.connection.dbapi_connection.execute("ROLLBACK")
        with file_engine.begin() as connection:
            assert connection.scalar(COUNT) == 0

    def test_full_disk(self, file_engine, file_repository):
        """A full disk is told as such; nothing is lost, and it goes on when there is room, without a restart."""
        kept = a_receipt(file_repository).id
        with file_engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1}")
        large = new_receipt(fiscal_doc={"text": "x" * 100_000})
        with pytest.raises(BufferStorageError, match="the disk is full .* Make room and try again"):
            file_repository.insert_receipt(large)
        assert [kept] == [receipt.id for receipt in file_repository.get_pending_receipts()]
        with file_engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        file_repository.insert_receipt(large)
        assert file_repository.get_buffer_status().pending == 2

    def test_other_errors(self, file_engine):
        """An error of the caller's own SQL stays SQLAlchemy's."""
        with pytest.raises(ProgrammingError), file_engine.begin() as connection:
            connection.execute(COUNT, [{}, {}])

    def test_pool(self, path, open_engine):
        """As many connections as are asked for at once; eight stay open between their uses."""
        own = open_engine(path)
        reader = own.execution_options(kkt_buffer_read_only=True)
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(reader.connect())
            assert own.pool.status() == "0 idle connections"
        assert own.pool.status() == "8 idle connections"

    def test_limited_pool(self, path, open_engine):
        """Who wants to wait for a connection, waits."""
        own = open_engine(path, pool_size=1, max_overflow=0, pool_timeout=0.05)
        repository = ReceiptRepository(own)
        repository.get_buffer_status()
        with own.connect():
            with pytest.raises(exc.TimeoutError, match="QueuePool limit"):
                own.connect()
            with pytest.raises(BufferBusyError, match="larger pool_size"):
                repository.insert_receipt(new_receipt())

    def test_execution_options(self, path, open_engine):
        """Those of the caller stand beside the package's own."""
        own = open_engine(path, execution_options={"shop": 7})
        assert 7 == own.get_execution_options()["shop"]
        assert 0 == ReceiptRepository(own).get_buffer_status().pending

    def test_null_pool(self, path, open_engine):
        """Another pool may be asked for."""
        own = open_engine(path, poolclass=NullPool)
        with own.begin() as connection:
            assert connection.scalar(COUNT) == 0
        assert isinstance(own.pool, NullPool)
