"""What has to arrive at the target of a move."""

from builders import another_program
from sqlalchemy import make_url

from kkt_buffer.models import metadata

_NOT_MOVED = {"release", "adopted_rows", "moved_to", "moved_at"}


def rows_of(buffer):
    """What has to arrive: the rows of each table, and the counts with the greatest timestamp."""
    with another_program(buffer) as db:
        found = {}
        for name in ("receipts", "dlq", "buffer_events", "config", "buffer_state"):
            columns = ", ".join(column.name for column in metadata.tables[name].columns)
            found[name] = sorted(map(tuple, db.execute(f"SELECT {columns} FROM {name}")), key=str)
        found["config"] = [row for row in found["config"] if row[0] not in _NOT_MOVED]
        return found


def name_of(url):
    """The URL as the file remembers it: without user and password."""
    return make_url(url)._replace(username=None, password=None).render_as_string()


def stored(path):
    """All that a file holds, to the byte: also text that is not UTF-8."""
    with another_program(path) as db:
        db.text_factory = bytes
        tables = ("sqlite_master", "receipts", "dlq", "buffer_events", "config", "buffer_state")
        return [row for table in tables for row in db.execute(f"SELECT * FROM {table}")]
