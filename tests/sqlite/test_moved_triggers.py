"""The triggers of a file that was moved. `moving/` has the rest."""

import pytest
from builders import a_receipt, another_program

from kkt_buffer import BufferMovedError
from kkt_buffer.sqlite.schema import moved_triggers

TARGET = "postgresql+psycopg://db1:5432/O'Brien?options=-c+search_path%3Dtills"


def test_refused(path, file_repository):
    """They refuse what changes the file, and name the target, whatever its name."""
    a_receipt(file_repository)
    with another_program(path) as db:
        for trigger in moved_triggers(TARGET).values():
            db.execute(trigger)
        db.execute("UPDATE config SET value = '2.0.0' WHERE key = 'release'")
    with pytest.raises(BufferMovedError) as refused:
        a_receipt(file_repository)
    assert TARGET == refused.value.target
    assert 1 == file_repository.get_buffer_status().pending
