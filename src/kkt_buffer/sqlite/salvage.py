"""
Salvage: read the rows of a file that may be damaged, as far as they can be read.

A row is lost if its page, or a page on the way to it, is damaged. The index on the ids is another set of pages, and
often still names the receipts that are lost.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from kkt_buffer.errors import BufferDamagedError
from kkt_buffer.sqlite.driver import load_driver
from kkt_buffer.sqlite.engine import file_of
from kkt_buffer.sqlite.errors import storage_errors

ROWS_AT_ONCE = 128
EMPTY_AT_MOST = 100  # ranges in a row without a row: then there is nothing behind them

# The greatest number of a row; the last two are read as far as they go.
_LAST = "SELECT MAX(rowid) FROM receipts NOT INDEXED"
_NUMBERS = (
    "SELECT rowid FROM receipts INDEXED BY sqlite_autoindex_receipts_1",
    "SELECT rowid FROM receipts NOT INDEXED",
)
_ROWS = "SELECT * FROM receipts WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
_IDS = "SELECT rowid, id FROM receipts INDEXED BY sqlite_autoindex_receipts_1"


class Lost(NamedTuple):
    """What could not be read: the ids of these receipts, and a problem if there may be more of them."""

    ids: list[str]
    problem: str | None = None


def salvage(path_or_url: str | os.PathLike[str]) -> Iterator[dict[str, Any] | Lost]:
    """
    The columns of each receipt that can be read, in the order in which they were stored; at last, what is lost.

    Raises `BufferDamagedError` if not even the table is found, `BufferStorageError` if the file cannot be opened,
    `ValueError` for a buffer in memory.
    """
    path = file_of(path_or_url)
    if path is None:
        raise ValueError("path_or_url: export needs a file, and a buffer in memory has none")
    driver = load_driver(None, writing=False)
    # Not an engine: that refuses a damaged file.
    with (
        storage_errors(path, driver),
        contextlib.closing(driver.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection,
    ):
        connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
        connection.execute("PRAGMA writable_schema = ON")  # SQLite then reads a file that was cut, too
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'receipts'").fetchone():
            raise BufferDamagedError.found(path, "it has no table of receipts")
        yield from _Salvage(connection, driver.Error).rows()


class _Salvage:
    def __init__(self, connection: sqlite3.Connection, error: type[Exception]) -> None:
        self._connection = connection
        self._error = error
        self._lost: set[int] = set()

    def rows(self) -> Iterator[dict[str, Any] | Lost]:
        last, is_known = self._last()
        first, empty = 1, 0
        while first <= last or not (is_known or empty > EMPTY_AT_MOST):
            found = self._read(first, first + ROWS_AT_ONCE - 1)
            yield from found
            empty = 0 if found else empty + 1
            first += ROWS_AT_ONCE
        if self._lost:
            yield self._named(is_known=is_known)

    def _last(self) -> tuple[int, bool]:
        """The greatest number of a row that is found, and whether it is the greatest of all."""
        with contextlib.suppress(self._error):
            return self._connection.execute(_LAST).fetchone()[0] or 0, True
        last = 0
        for query in _NUMBERS:
            with contextlib.suppress(self._error):
                for (number,) in self._connection.execute(query):
                    last = max(last, number)
        return last, False

    def _read(self, first: int, last: int) -> list[dict[str, Any]]:
        """The rows from `first` to `last`; a range that cannot be read is halved, down to the single row."""
        try:
            rows = self._connection.execute(_ROWS, (first, last))
            names = [column[0] for column in rows.description]
            return [dict(zip(names, row, strict=True)) for row in rows]
        except self._error:
            if first == last:
                self._lost.add(first)
                return []
            middle = (first + last) // 2
            return self._read(first, middle) + self._read(middle + 1, last)

    def _named(self, *, is_known: bool) -> Lost:
        """The ids of the lost rows. A number that the index does not have belongs to no row."""
        ids: list[str] = []
        try:
            ids += (receipt_id for number, receipt_id in self._connection.execute(_IDS) if number in self._lost)
        except self._error:
            is_known = False
        return Lost(ids, None if is_known else "more receipts may be lost: the index with their ids is damaged too")
