"""Buffers in memory, for unit tests with threads."""

import threading

import pytest
from builders import new_receipt, together
from sqlalchemy import StaticPool, create_engine, make_url, text

from kkt_buffer import (
    ReceiptRepository,
    upgrade,
)

COUNT = text("SELECT COUNT(*) FROM receipts")


def acknowledged_and_kept(engine):
    """One thread commits a row while another one, in between, rolls its own back."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS rows (who TEXT)"))
    half_done, rolled_back = threading.Event(), threading.Event()

    def careful():
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO rows VALUES ('careful')"))
            half_done.set()
            rolled_back.wait(0.5)

    def careless():
        half_done.wait()
        with engine.connect() as connection:
            connection.execute(text("INSERT INTO rows VALUES ('careless')"))
            connection.rollback()
        rolled_back.set()

    together(2, lambda number: (careful, careless)[number]())
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT who FROM rows")))


class TestMemory:
    def test_threads_are_isolated(self, engine):
        """What one thread rolls back takes nothing from another that was told that its commit is done."""
        assert acknowledged_and_kept(engine) == ["careful"]

    def test_static_pool_is_not(self):
        """The usual recipe for tests in memory, one connection for all threads, loses an acknowledged row."""
        naive = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        assert acknowledged_and_kept(naive) != ["careful"]
        naive.dispose()

    def test_many_threads(self, engine):
        """Sixteen threads write and read one database: no error, nothing lost."""
        repository = ReceiptRepository(engine)
        repository.set_config("buffer_capacity", 1000)

        def work(_number):
            for _ in range(10):
                repository.insert_receipt(new_receipt())
                repository.get_buffer_status()

        together(16, work)
        assert repository.get_buffer_status().pending == 160

    @pytest.mark.parametrize("url", [":memory:", "sqlite://", "sqlite:///:memory:", make_url("sqlite+pysqlite://")])
    def test_own(self, url, open_engine):
        """Each engine in memory is a buffer of its own, gone with its engine."""
        one, other = open_engine(url), open_engine(url)
        upgrade(one)
        with other.connect() as connection, pytest.raises(Exception, match="no such table: receipts"):
            connection.execute(COUNT)
        one.dispose()
        with pytest.raises(Exception, match="no such table: receipts"), one.connect() as connection:
            connection.execute(COUNT)

    def test_not_read_only(self, open_engine):
        with pytest.raises(ValueError, match="read_only: an in-memory buffer"):
            open_engine(":memory:", read_only=True)
