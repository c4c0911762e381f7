"""Copies of a buffer in use: whole, private, and in place all at once."""

import stat

import pytest
from builders import a_receipt, everything

from kkt_buffer import BufferStorageError, ReceiptRepository


def left_behind(folder):
    return [path.name for path in folder.iterdir() if "unfinished" in path.name]


class TestBackup:
    def test_whole(self, tmp_path, path, file_repository):
        """What the buffer holds, readable for the owner alone; with its folder, and over an older copy."""
        target = tmp_path / "backups" / "monday.db"
        for _ in range(2):
            a_receipt(file_repository, "failed")
            file_repository.backup(target)
            assert everything(path) == everything(target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert [] == left_behind(target.parent)

    def test_is_a_buffer(self, tmp_path, file_repository, open_engine):
        receipt = a_receipt(file_repository)
        file_repository.backup(tmp_path / "copy.db")
        copy = open_engine(tmp_path / "copy.db")
        assert [receipt.id] == [found.id for found in ReceiptRepository(copy).get_pending_receipts()]

    def test_of_memory(self, tmp_path, repository):
        receipt = a_receipt(repository)
        repository.backup(tmp_path / "copy.db")
        assert any(receipt.id in line for line in everything(tmp_path / "copy.db"))

    def test_something_in_the_way(self, tmp_path, file_repository):
        """A copy that cannot be put in place leaves nothing behind."""
        (tmp_path / "backup" / "folder").mkdir(parents=True)
        with pytest.raises(BufferStorageError, match="the backup .*folder cannot be used: .*Nothing was written"):
            file_repository.backup(tmp_path / "backup" / "folder")
        assert [] == left_behind(tmp_path / "backup")
