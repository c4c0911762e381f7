"""What a disposed engine leaves behind."""

import contextlib

import pytest
from builders import a_receipt, everything, open_files, start_python
from sqlalchemy import text

from kkt_buffer import (
    ReceiptRepository,
)

# Opens and closes the buffer for some seconds, and tells how often.
OPEN_AND_CLOSE = """
import sys, time
from kkt_buffer import create_buffer_engine

until, times = time.monotonic() + 5, 0
while time.monotonic() < until:
    engine = create_buffer_engine(sys.argv[1])
    engine.connect().close()
    engine.dispose()
    times += 1
print(times)
"""
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


@pytest.mark.slow
def test_beside_others(path):
    """The last one that closes deletes the WAL: nobody who opens the buffer at that moment takes it for replaced."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start_python(OPEN_AND_CLOSE, path)) for _ in range(3)]
        assert all(int(process.stdout.read() or 0) for process in processes)
