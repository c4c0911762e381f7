"""
Taking over a file of the hand-written `sqlite3` module that came before this package: every row kept, and those that
break an invariant of ours repaired.

It is a part of migration 0001 and, like a migration, history: it speaks of that schema, not of today's models.
"""

import functools
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, inspect

from kkt_buffer.backup import backup
from kkt_buffer.progress import progress

if TYPE_CHECKING:
    import sqlite3

logger = logging.getLogger(__name__)

CAPACITY = 200  # where the predecessor's config has none
BY = "adoption"  # who resolves a dead letter here

# The predecessor's columns; the first one is the key.
COLUMNS = {
    "config": ("key", "value", "updated_at"),
    "buffer_events": ("id", "event_type", "receipt_id", "timestamp", "metadata"),
    "receipts": (
        "id",
        "pos_id",
        "created_at",
        "hlc_local_time",
        "hlc_logical_counter",
        "hlc_server_time",
        "fiscal_doc",
        "status",
        "retry_count",
        "last_error",
        "synced_at",
    ),
    "dlq": (
        "id",
        "original_receipt_id",
        "failed_at",
        "reason",
        "fiscal_doc",
        "retry_attempts",
        "last_error",
        "resolved_at",
        "resolved_by",
    ),
}
ADDED = {"dlq": ("resolution_reason",)}  # the columns of 0001 that a repair fills
TRIGGERS = ("trg_receipt_added", "trg_receipt_synced")
VIEW = "v_buffer_status"

Row = dict[str, Any]


class _Mended(str):
    """A text whose bytes were no UTF-8."""

    __slots__ = ()


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _Mended(raw.decode("utf-8", "backslashreplace"))


def is_predecessor(connection: Connection) -> bool:
    """Whether the tables are the predecessor's; asked where there is no version table of ours."""
    inspector = inspect(connection)
    if not inspector.has_table("receipts"):
        return False
    found = {column["name"] for column in inspector.get_columns("receipts")}
    return found.issuperset(COLUMNS["receipts"])


class Predecessor:
    """
    What the predecessor left in a database; where that is nothing, every method does nothing.

    To be called in this order, in one transaction with foreign keys off and `legacy_alter_table` on: `set_aside`, then
    our tables are made; `take_over`, then our triggers are made; `put_back`.
    """

    def __init__(self, connection: Connection) -> None:
        self._engine = connection.engine
        self._db = cast("sqlite3.Connection", connection.connection.dbapi_connection)
        self._tables: list[str] = []
        if is_predecessor(connection):
            names = inspect(connection).get_table_names()
            self._tables = [table for table in COLUMNS if table in names]
        self._triggers: list[str] = []  # the shop's own
        self._now = int(time.time())
        self._events: list[tuple[str | None, int, str, str]] = []
        self._copied: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()

    def set_aside(self) -> None:
        """Back the file up; then give its tables other names, and drop what stands on them."""
        if not self._tables:
            return
        path = self._engine.url.database
        if path and path != ":memory:":
            # Nobody can write meanwhile: this transaction holds the write lock.
            target = f"{path}.before-adoption-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            backup(self._engine, target)
            logger.warning("taking over the buffer of the sqlite3 version; as it was, it is kept in %s", target)
        marks = ", ".join("?" * len(self._tables))
        standing = self._db.execute(
            "SELECT type, name, sql FROM sqlite_master"  # noqa: S608 (question marks)
            f" WHERE type IN ('index', 'trigger') AND sql IS NOT NULL AND tbl_name IN ({marks})",
            self._tables,
        ).fetchall()
        for kind, name, sql in standing:
            if kind == "trigger" and name not in TRIGGERS:
                self._triggers.append(sql)
            self._db.execute(f"DROP {kind} {_quoted(name)}")
        self._db.execute(f"DROP VIEW IF EXISTS {VIEW}")
        for table in self._tables:
            self._db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")

    def take_over(self) -> None:
        """Copy every row into our tables, repaired where it must be, with an event and a line in the log for each."""
        if not self._tables:
            return
        read_as = self._db.text_factory
        self._db.text_factory = _text
        mended = {"receipts": self._receipts, "dlq": self._letters}
        for table in self._tables:
            rows = self._rows(table)
            self._copy(table, mended[table](rows) if table in mended else rows)
        self._compare_with_capacity()
        self._db.text_factory = read_as
        # The ids of the events go on where they were, even if the latest events are gone.
        self._db.execute("DELETE FROM sqlite_sequence WHERE name = 'buffer_events'")
        self._db.execute("UPDATE sqlite_sequence SET name = 'buffer_events' WHERE name = 'old_buffer_events'")
        self._db.executemany(
            "INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)"
            " VALUES ('receipt_repaired', ?, ?, json_object('found', ?, 'became', ?))",
            self._events,
        )
        for table in self._tables:
            self._db.execute(f"DROP TABLE old_{table}")
        # Up to here timestamps need not be in order.
        self._db.execute(
            "INSERT OR REPLACE INTO config SELECT 'adopted_rows', COALESCE(MAX(rowid), 0), ? FROM receipts",
            (self._now,),
        )
        kept = ", ".join(f"{count} rows of {table}" for table, count in self._copied.items())
        repairs = "; ".join(f"{count} times {what}" for what, count in self._repairs.items())
        logger.warning("took over %s; repaired: %s", kept, repairs or "nothing")

    def put_back(self) -> None:
        """Make the triggers anew that the shop had on these tables."""
        for sql in self._triggers:
            self._db.execute(sql)

    def _rows(self, table: str) -> Iterator[Row]:
        """The rows in the order in which they were made, with their rowid, which tells that order."""
        key = COLUMNS[table][0]
        (total,) = self._db.execute(f"SELECT COUNT(*) FROM old_{table}").fetchone()  # noqa: S608 (a name of ours)
        cursor = self._db.execute(f"SELECT rowid, * FROM old_{table} ORDER BY rowid")  # noqa: S608 (the same)
        columns = [column[0] for column in cursor.description]
        columns[0] = "rowid"
        with progress(f"taking over {table}", total) as tell:
            for done, values in enumerate(cursor, start=1):
                row = dict(zip(columns, values, strict=True))
                if row[key] is None:  # SQLite lets a primary key be null
                    row[key] = str(uuid.uuid4())
                yield row
                self._copied[table] = done
                tell(done)

    def _copy(self, table: str, rows: Iterator[Row]) -> None:
        ours = {column[1] for column in self._db.execute(f"PRAGMA table_info({table})")}
        found = {column[1]: column[2] for column in self._db.execute(f"PRAGMA table_info(old_{table})")}
        for name in found.keys() - ours:
            self._db.execute(f"ALTER TABLE {table} ADD COLUMN {_quoted(name)} {found[name]}")
            logger.warning("kept the column %s of %s, which is not ours", name, table)
        columns = ["rowid", *found, *(name for name in ADDED.get(table, ()) if name not in found)]
        names, marks = ", ".join(map(_quoted, columns)), ", ".join("?" * len(columns))
        self._db.executemany(
            f"INSERT INTO {table} ({names}) VALUES ({marks})",  # noqa: S608 (quoted names)
            ([row[column] for column in columns] for row in rows),
        )

    def _repaired(self, receipt_id: str | None, found: str, became: str, detail: object = "") -> None:
        self._events.append((receipt_id, self._now, f"{found}: {detail}" if detail else found, became))
        self._repairs[f"{found} → {became}"] += 1
        logger.info("repaired receipt %s: %s %s → %s", receipt_id, found, detail, became)

    def _receipts(self, rows: Iterator[Row]) -> Iterator[Row]:
        numbers: dict[str, int | None] = {"created_at": self._now, "hlc_local_time": self._now}
        numbers |= {"hlc_logical_counter": 0, "hlc_server_time": None, "retry_count": 0, "synced_at": None}
        dead = set()
        if "dlq" in self._tables:
            dead = {row[0] for row in self._db.execute("SELECT original_receipt_id FROM old_dlq")}
        latest = (-1, -1)
        for row in rows:
            note = functools.partial(self._repaired, row["id"])
            _mend_values(row, numbers, ("pos_id", "fiscal_doc", "last_error"), note)
            if row["retry_count"] is None:
                row["retry_count"] = 0
                note("retry_count null", "0")
            self._mend_status(row, dead, note)
            if not _is_json(row["fiscal_doc"]):
                note("a document that is not JSON", "kept as text")
            stamp = row["hlc_local_time"], row["hlc_logical_counter"]
            if stamp <= latest:
                note("a timestamp that is not above the ones before it", "kept", stamp)
            latest = max(latest, stamp)
            yield row

    @staticmethod
    def _mend_status(row: Row, dead: set[str], note: Callable[..., None]) -> None:
        if row["status"] == "synced":
            for column, other in (("synced_at", "hlc_server_time"), ("hlc_server_time", "synced_at")):
                if row[column] is None:
                    row[column] = row["created_at"] if row[other] is None else row[other]
                    note(f"synced without {column}", "taken from what is known", row[column])
            return
        for column in ("synced_at", "hlc_server_time"):
            if row[column] is not None:
                note(f"{row['status']} with {column}", "removed", row[column])
                row[column] = None
        if row["status"] == "syncing":
            row["status"] = "pending"
            note("syncing, and nobody works on it", "pending")
        elif row["status"] == "failed" and row["id"] not in dead:
            row["status"] = "pending"
            note("failed without a dead letter", "pending")

    def _letters(self, rows: Iterator[Row]) -> Iterator[Row]:
        opened = self._db.execute(
            "SELECT original_receipt_id, rowid FROM old_dlq WHERE resolved_at IS NULL ORDER BY failed_at, rowid"
        )
        newest = dict(opened.fetchall())
        numbers = {"failed_at": self._now, "retry_attempts": 0, "resolved_at": None}
        for row in rows:
            receipt_id = row["original_receipt_id"]
            note = functools.partial(self._repaired, receipt_id)
            _mend_values(row, numbers, ("reason", "fiscal_doc", "last_error", "resolved_by"), note)
            row["resolution_reason"] = None
            if row["resolved_at"] is None:
                row["resolved_by"] = None
                why = self._why_closed(receipt_id, is_newest=newest[receipt_id] == row["rowid"])
                if why:
                    row["resolved_at"], row["resolved_by"], row["resolution_reason"] = self._now, BY, why
                    note(f"an open dead letter, but {why}", f"resolved by {BY}")
            elif row["resolved_by"] is None:
                row["resolved_by"] = BY
                note("a dead letter resolved by nobody", f"resolved by {BY}")
            yield row

    def _why_closed(self, receipt_id: str, *, is_newest: bool) -> str | None:
        status = self._db.execute("SELECT status FROM receipts WHERE id = ?", (receipt_id,)).fetchone()
        if status is None:
            return "its receipt is gone"
        if status[0] != "failed":
            return f"its receipt is {status[0]}"
        return None if is_newest else "there is a newer one"

    def _compare_with_capacity(self) -> None:
        (undelivered,) = self._db.execute("SELECT COUNT(*) FROM receipts WHERE status = 'pending'").fetchone()
        given = self._db.execute("SELECT value FROM config WHERE key = 'buffer_capacity'").fetchone()
        capacity = int(given[0]) if given and given[0].isdecimal() else CAPACITY
        if undelivered > capacity:
            self._repaired(None, "more receipts than buffer_capacity", "all kept", f"{undelivered} > {capacity}")


def _mend_values(
    row: Row, numbers: Mapping[str, int | None], texts: tuple[str, ...], note: Callable[..., None]
) -> None:
    """SQLite stores anything in any column; these are to be read as whole numbers (else the one given) and as texts."""
    for column, otherwise in numbers.items():
        value = row[column]
        if value is not None and not isinstance(value, int):
            row[column] = _whole(value, otherwise)
            note(f"{column} is no whole number", "made one", f"{value!r} → {row[column]!r}")
    for column in texts:
        value = row[column]
        if isinstance(value, bytes):
            value = _text(value)
            row[column] = value
            note(f"{column} is a BLOB", "made a text")
        if isinstance(value, _Mended):
            note(f"{column} is no UTF-8", "its stray bytes are written as \\x…")


def _whole(value: float | str | bytes, otherwise: int | None) -> int | None:
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return otherwise


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
