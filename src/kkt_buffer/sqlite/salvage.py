"""
Salvage: read the rows of a file that may be damaged, as far as they can be read.

A row is lost if its page, or a page on the way to it, is damaged. The index on the ids is another set of pages, and
often still names the receipts that are lost.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine

from kkt_buffer.backend import READ_ONLY, backend_of
from kkt_buffer.errors import BufferDamagedError

ROWS_AT_ONCE = 128

_LAST = (
    "SELECT MAX(rowid) FROM receipts",
    "SELECT MAX(rowid) FROM receipts INDEXED BY sqlite_autoindex_receipts_1",
)
_ROWS = "SELECT * FROM receipts WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
_IDS = "SELECT rowid, id FROM receipts INDEXED BY sqlite_autoindex_receipts_1"


class Lost(NamedTuple):
    """What could not be read: the ids of these receipts, or why nobody knows them."""

    ids: list[str]
    problem: str | None = None


def salvage(engine: Engine) -> Iterator[dict[str, Any] | Lost]:
    """
    The columns of each receipt that can be read, in the order in which they were stored; at last, what is lost.

    Raises `BufferDamagedError` if not even the table is found.
    """
    with (
        engine.connect().execution_options(**{READ_ONLY: True}) as connection,
        backend_of(engine).lenient_text(connection),
    ):
        lost: set[int] = set()
        for first in range(1, _last(connection) + 1, ROWS_AT_ONCE):
            yield from _read(connection, first, first + ROWS_AT_ONCE - 1, lost)
        if lost:
            yield _named(connection, lost)


def _last(connection: Connection) -> int:
    for query in _LAST[:-1]:
        try:
            return connection.exec_driver_sql(query).scalar() or 0
        except BufferDamagedError:
            continue
    return connection.exec_driver_sql(_LAST[-1]).scalar() or 0


def _read(connection: Connection, first: int, last: int, lost: set[int]) -> Iterator[dict[str, Any]]:
    """The rows from `first` to `last`; a range that cannot be read is halved, down to the single row."""
    try:
        found = connection.exec_driver_sql(_ROWS, (first, last)).mappings().all()
    except BufferDamagedError:
        if first == last:
            lost.add(first)
            return
        middle = (first + last) // 2
        yield from _read(connection, first, middle, lost)
        yield from _read(connection, middle + 1, last, lost)
    else:
        yield from map(dict, found)


def _named(connection: Connection, lost: set[int]) -> Lost:
    """The ids of the lost rows. A number without an entry in the index never had a row, or was pruned."""
    ids: list[str] = []
    try:
        for number, receipt_id in connection.exec_driver_sql(_IDS):
            if number in lost:
                ids.append(receipt_id)
    except BufferDamagedError:
        return Lost(ids, f"rows among the numbers {min(lost)} to {max(lost)}: the index with their ids is damaged too")
    return Lost(ids)
