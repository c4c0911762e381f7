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
EMPTY_AT_MOST = 100  # after so many empty ranges in a row, stop, or go on at the next known row
LARGEST_ROWID = 2**62  # a number outside 1 … LARGEST_ROWID is that of a damaged row

# Each is read until it fails: the table from both ends, because a damaged page in the middle ends a scan.
_ROWIDS = (
    "SELECT rowid FROM receipts INDEXED BY sqlite_autoindex_receipts_1",
    "SELECT rowid FROM receipts NOT INDEXED ORDER BY rowid",
    "SELECT rowid FROM receipts NOT INDEXED ORDER BY rowid DESC",
)
_ROWS = "SELECT rowid, * FROM receipts WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
_IDS = "SELECT rowid, id FROM receipts INDEXED BY sqlite_autoindex_receipts_1"


class Lost(NamedTuple):
    """What could not be read: the ids of these receipts, and a problem if there may be more of them."""

    ids: list[str]
    problem: str | None = None


def salvage(path_or_url: str | os.PathLike[str]) -> Iterator[dict[str, Any] | Lost]:
    """
    The columns of each receipt that can be read, in the order in which they were stored; then one `Lost`, if
    rows were lost.

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
        connection.execute("PRAGMA writable_schema = ON")  # SQLite then also reads a truncated file
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'receipts'").fetchone():
            raise BufferDamagedError.found(path, "it has no table of receipts")
        yield from _Salvage(connection, driver.Error).rows()


class _Salvage:
    def __init__(self, connection: sqlite3.Connection, error: type[Exception]) -> None:
        self._connection = connection
        self._error = error
        self._saved: set[int] = set()
        self._has_failed = False

    def rows(self) -> Iterator[dict[str, Any] | Lost]:
        ranges, is_complete = self._ranges()
        number = empty = 0
        while ranges or not (is_complete or empty > EMPTY_AT_MOST):
            if ranges and (is_complete or empty > EMPTY_AT_MOST or ranges[-1] == number):
                number, empty = ranges.pop(), 0
            found = self._read(number * ROWS_AT_ONCE, (number + 1) * ROWS_AT_ONCE - 1)
            yield from found
            empty = 0 if found else empty + 1
            number += 1
        lost = self._lost()
        if lost.ids or lost.problem:
            yield lost

    def _ranges(self) -> tuple[list[int], bool]:
        """The numbers of the ranges in which rows are known, last first; and whether no other range has a row."""
        ranges = {0}
        for query in _ROWIDS:
            with contextlib.suppress(self._error):
                for (rowid,) in self._connection.execute(query):
                    if 0 < rowid <= LARGEST_ROWID:
                        ranges.add(rowid // ROWS_AT_ONCE)
                return sorted(ranges, reverse=True), True
        return sorted(ranges, reverse=True), False

    def _read(self, first: int, last: int) -> list[dict[str, Any]]:
        """The rows from `first` to `last`; a range that cannot be read is halved, down to the single row."""
        try:
            cursor = self._connection.execute(_ROWS, (first, last))
            names = [column[0] for column in cursor.description[1:]]
            rows = cursor.fetchall()
        except self._error:
            self._has_failed = True
            if first == last:
                return []
            middle = (first + last) // 2
            return self._read(first, middle) + self._read(middle + 1, last)
        self._saved.update(row[0] for row in rows)
        return [dict(zip(names, row[1:], strict=True)) for row in rows]

    def _lost(self) -> Lost:
        """The receipts that the index has, and that were not read."""
        ids: list[str] = []
        try:
            ids += (receipt_id for rowid, receipt_id in self._connection.execute(_IDS) if rowid not in self._saved)
        except self._error:
            if self._has_failed:
                return Lost(ids, "more receipts may be lost: the index with their ids is damaged too")
        return Lost(ids)
