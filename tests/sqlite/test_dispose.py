"""What a disposed engine leaves behind."""

from builders import a_receipt, everything, open_files
from sqlalchemy import text

from kkt_buffer import (
    ReceiptRepository,
)

COUNT = text("SELECT COUNT(*) FROM receipts")


class TestDispose:
    def test_no_descriptor_left(self, path, open_engine):
        """A disposed engine leaves no file open."""
        own = open_engine(path)
        a_receipt(ReceiptRepository(own))
        own.dispose()
        own.dispose()
        assert open_files(path) == []

    def test_used_again(self, path, open_engine):
        """A disposed engine opens the file again when it is used again."""
        own = open_engine(path)
        own.dispose()
        a_receipt(ReceiptRepository(own))
        assert ReceiptRepository(own).get_buffer_status().pending == 1

    def test_last_close_waits(self, path, clock, open_engine):
        """The last connection checkpoints as it closes, so it waits its turn at the gate, but not for ever."""
        own = open_engine(path, busy_timeout=0.05)
        a_receipt(ReceiptRepository(own, now=clock))
        other = open_engine(path)
        with other.begin() as connection:
            connection.execute(COUNT)
            own.dispose()
        assert any("till-1" in line for line in everything(path))
