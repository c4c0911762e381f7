"""Files that are deleted or replaced while they are in use."""

from pathlib import Path

import pytest
from builders import a_receipt, new_receipt
from sqlalchemy import text

from kkt_buffer import (
    BufferStorageError,
)

ADD = text(
    "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)"
    " VALUES (:id, 'till-1', 1, 1, 0, '{}')"
)
COUNT = text("SELECT COUNT(*) FROM receipts")


class TestReplacedFiles:
    @pytest.fixture
    def used(self, file_repository):
        a_receipt(file_repository)
        return file_repository

    @pytest.mark.parametrize("suffix", ["", "-wal"])
    @pytest.mark.parametrize("how", ["deleted", "replaced"])
    def test_refused(self, used, path, suffix, how):
        """A write into files that are no longer there would be lost: refused before anything is written."""
        file = Path(f"{path}{suffix}")
        file.rename(f"{file}.moved")
        if how == "replaced":
            file.write_bytes(b"")
        with pytest.raises(
            BufferStorageError, match="was deleted or replaced while it was in use. Nothing was written"
        ):
            used.insert_receipt(new_receipt())
        with pytest.raises(BufferStorageError, match="was deleted or replaced"):
            used.get_pending_receipts()

    def test_new_connection(self, used, file_engine, path):
        """A new connection does not take up a file that was put in place of the first."""
        file_engine.dispose()
        content = path.read_bytes()
        path.rename(f"{path}.moved")
        path.write_bytes(content)
        with pytest.raises(BufferStorageError, match="was deleted or replaced while it was in use"):
            used.get_pending_receipts()

    def test_no_new_file(self, used, file_engine, path):
        """Nor does it make an empty one."""
        file_engine.dispose()
        path.unlink()
        with pytest.raises(BufferStorageError, match="cannot be opened"):
            used.get_pending_receipts()
        assert not path.exists()

    def test_during_commit(self, file_engine, path):
        """A commit into a file that was taken away meanwhile is not acknowledged."""
        with pytest.raises(BufferStorageError, match="The last transaction may be lost"):
            with file_engine.begin() as connection:
                connection.execute(ADD, {"id": "a"})
                path.rename(f"{path}.moved")
