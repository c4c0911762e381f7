"""Engines that read alone: monitors."""

import pytest
from builders import a_receipt, new_receipt
from sqlalchemy import text

from kkt_buffer import (
    BufferStorageError,
    ReceiptRepository,
)

ADD = text(
    "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)"
    " VALUES (:id, 'till-1', 1, 1, 0, '{}')"
)
COUNT = text("SELECT COUNT(*) FROM receipts")


class TestReadOnly:
    def test_live(self, file_repository, path, open_engine):
        """A monitor sees what a running service commits, and its own writes are refused with a clear error."""
        monitor = open_engine(path, read_only=True)
        watched = ReceiptRepository(monitor)
        assert watched.get_buffer_status().pending == 0
        receipt = a_receipt(file_repository)
        assert watched.get_buffer_status().pending == 1
        for write in (
            lambda: watched.insert_receipt(new_receipt()),
            lambda: watched.mark_synced(receipt.id, 1),
            lambda: watched.set_config("buffer_capacity", 1),
            lambda: watched.log_event("sync_started"),
        ):
            with pytest.raises(BufferStorageError, match="it is read-only here"):
                write()
        assert file_repository.get_buffer_status() == watched.get_buffer_status()

    def test_twice_refused(self, path, open_engine):
        """Not even a program that switches `query_only` off can write through it."""
        with open_engine(path, read_only=True).connect() as connection:
            connection.connection.cursor().execute("PRAGMA query_only = OFF")
            with pytest.raises(BufferStorageError, match="it is read-only here"):
                connection.execute(ADD, {"id": "a"})

    def test_nobody_else(self, path, open_engine):
        """It works on a database that nobody has open, too."""
        assert ReceiptRepository(open_engine(path, read_only=True)).get_buffer_status().pending == 0

    def test_missing(self, tmp_path, open_engine):
        """It makes no file."""
        with pytest.raises(BufferStorageError, match="No such file or directory"):
            open_engine(tmp_path / "buffer.db", read_only=True)
        assert list(tmp_path.iterdir()) == []
