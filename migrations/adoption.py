"""
Adopt a file of the predecessor, a hand-written `sqlite3` module: keep every row, and repair rows that break an
invariant.

This is part of revision 0001 and uses the schema of that revision, not the current models.
"""

import functools
import glob
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, event, inspect

from kkt_buffer.arguments import UUID_TEXT
from kkt_buffer.backend import backend_of
from kkt_buffer.errors import SchemaError
from kkt_buffer.progress import progress
from kkt_buffer.sqlite.ddl import REFERENCES, first_word, quoted, table_clauses

if TYPE_CHECKING:
    import sqlite3

logger = logging.getLogger("kkt_buffer.migrations.adoption")  # the module is loaded by path, so __name__ is not useful

# The predecessor's settings, with the default for a value that is missing or invalid.
SETTINGS = {
    "buffer_capacity": 200,
    "circuit_breaker_threshold": 5,
    "circuit_breaker_timeout": 60,
    "max_retry_attempts": 20,
}
BY = "adoption"  # resolved_by of the dead letters that are closed here

# The predecessor's columns; the first one is the key. Receipts come first: the other tables refer to their ids.
COLUMNS = {
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
    "buffer_events": ("id", "event_type", "receipt_id", "timestamp", "metadata"),
    "config": ("key", "value", "updated_at"),
}
ADDED = {"dlq": ("resolution_reason",)}  # columns of 0001 that the predecessor does not have and a repair fills
TRIGGERS = ("trg_receipt_added", "trg_receipt_synced")
VIEW = "v_buffer_status"

Row = dict[str, Any]


class _Repaired(str):
    """A text decoded from invalid UTF-8, with backslash escapes."""

    __slots__ = ()


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _Repaired(raw.decode("utf-8", "backslashreplace"))


def is_predecessor(connection: Connection) -> bool:
    """Whether the tables are the predecessor's. Only for a database that this package never migrated."""
    inspector = inspect(connection)
    if not inspector.has_table("receipts"):
        return False
    found = {column["name"] for column in inspector.get_columns("receipts")}
    return found.issuperset(COLUMNS["receipts"])


class Predecessor:
    """
    The predecessor's tables in a database. If there are none, every method does nothing.

    Call in one transaction, with foreign keys off and `legacy_alter_table` on, in this order: `set_aside`, create the
    new tables, `adopt`, create the new triggers, `put_back`.
    """

    def __init__(self, connection: Connection) -> None:
        self._engine = connection.engine
        self._db = cast("sqlite3.Connection", connection.connection.dbapi_connection)
        self._tables: list[str] = []
        if is_predecessor(connection):
            names = inspect(connection).get_table_names()
            self._tables = [table for table in COLUMNS if table in names]
        for table in self._tables:
            missing = set(COLUMNS[table]).difference(self._columns(table))
            if missing:
                raise SchemaError(
                    f"the table {table} is not that of the sqlite3 version: it has no column {min(missing)}. "
                    "Nothing was changed. Rename the table, or add the column, and upgrade again."
                )
        self._connection = connection
        self._triggers: list[str] = []  # of other programs
        self._new_ids: dict[object, str] = {}
        self._now = int(time.time())
        self._events: list[tuple[str | None, int, str, str]] = []
        self._copied: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()

    def set_aside(self) -> None:
        """Back up the file; then rename its tables, and drop their indexes, triggers and view."""
        if not self._tables:
            return
        path = Path(self._engine.url.database or ":memory:")
        if path.name != ":memory:":
            self._back_up(path)
        marks = ", ".join("?" * len(self._tables))
        dependent = self._db.execute(
            "SELECT type, name, sql FROM sqlite_master"
            f" WHERE type IN ('index', 'trigger') AND sql IS NOT NULL AND tbl_name IN ({marks})",
            self._tables,
        ).fetchall()
        for kind, name, sql in dependent:
            if kind == "trigger" and name not in TRIGGERS:
                self._triggers.append(sql)
            elif kind == "index" and "UNIQUE" in sql.upper():
                logger.warning(
                    "dropped the unique index %s of another program, which could refuse receipts: %s", name, sql
                )
            self._db.execute(f"DROP {kind} {quoted(name)}")
        self._db.execute(f"DROP VIEW IF EXISTS {VIEW}")
        for table in self._tables:
            self._db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")

    def _back_up(self, path: Path) -> None:
        for unfinished in path.parent.glob(f".{glob.escape(path.name)}.before-adoption-*.unfinished"):
            unfinished.unlink()
        target = path.with_name(f"{path.name}.before-adoption-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        # No other process can write meanwhile: this transaction holds the write lock.
        backend_of(self._engine).backup(self._engine, target)
        # After a rollback the file is unchanged, and each new attempt would leave one more copy.
        event.listen(self._connection, "rollback", lambda _connection: target.unlink(missing_ok=True))
        logger.warning("adopting the buffer of the sqlite3 version; a backup of the original is kept in %s", target)

    def adopt(self) -> None:
        """Copy every row into the new tables. Each repair writes an event and a log line."""
        if not self._tables:
            return
        text_factory_before = self._db.text_factory
        self._db.text_factory = _text
        repaired = {
            "receipts": self._receipts,
            "dlq": self._dead_letters,
            "buffer_events": self._old_events,
            "config": self._settings,
        }
        for table in self._tables:
            self._copy(table, repaired[table](self._rows(table)))
        self._rename_references()
        self._compare_with_capacity()
        self._db.text_factory = text_factory_before
        # New events continue the old ids, even if the latest events were deleted.
        self._db.execute("DELETE FROM sqlite_sequence WHERE name = 'buffer_events'")
        self._db.execute("UPDATE sqlite_sequence SET name = 'buffer_events' WHERE name = 'old_buffer_events'")
        self._db.executemany(
            "INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)"
            " VALUES ('receipt_repaired', ?, ?, json_object('found', ?, 'became', ?))",
            self._events,
        )
        for table in self._tables:
            self._db.execute(f"DROP TABLE old_{table}")
        # For check_integrity: the timestamps of these receipts need not be in order.
        self._db.execute(
            "INSERT OR REPLACE INTO config SELECT 'adopted_rows', COALESCE(MAX(rowid), 0), ? FROM receipts",
            (self._now,),
        )
        kept = ", ".join(f"{count} rows of {table}" for table, count in self._copied.items())
        repairs = "; ".join(f"{what} ({count})" for what, count in self._repairs.items())
        logger.warning("adopted %s; repaired: %s", kept, repairs or "nothing")

    def put_back(self) -> None:
        """Create the triggers of other programs on these tables again."""
        for sql in self._triggers:
            self._db.execute(sql)

    def _rows(self, table: str) -> Iterator[Row]:
        """The rows with their rowid, in the order of insertion."""
        key = COLUMNS[table][0]
        (total,) = self._db.execute(f"SELECT COUNT(*) FROM old_{table}").fetchone()
        cursor = self._db.execute(f"SELECT rowid, * FROM old_{table} ORDER BY rowid")
        columns = [column[0] for column in cursor.description]
        columns[0] = "rowid"
        with progress(f"adopting {table}", total) as report:
            for done, values in enumerate(cursor, start=1):
                row = dict(zip(columns, values, strict=True))
                if row[key] is None:  # SQLite lets a primary key be null
                    row[key] = str(uuid.uuid4())
                    self._repaired(
                        row[key] if table == "receipts" else None, f"a row of {table} without {key}", "got one"
                    )
                yield row
                self._copied[table] = done
                report(done)

    def _copy(self, table: str, rows: Iterator[Row]) -> None:
        found = self._columns(f"old_{table}")
        for name in found:
            if name not in COLUMNS[table]:
                self._keep_column(table, name, found[name])
        stored = [name for name, (_, generated) in found.items() if not generated]
        columns = ["rowid", *stored, *ADDED.get(table, ())]
        names, marks = ", ".join(map(quoted, columns)), ", ".join("?" * len(columns))
        self._db.executemany(
            f"INSERT INTO {table} ({names}) VALUES ({marks})",
            ([row[column] for column in columns] for row in rows),
        )

    def _columns(self, table: str) -> dict[str, tuple[str, bool]]:
        """Each column with its type, and whether it is a generated column."""
        return {column[1]: (column[2], column[6] != 0) for column in self._db.execute(f"PRAGMA table_xinfo({table})")}

    def _keep_column(self, table: str, name: str, kind: tuple[str, bool]) -> None:
        """Add a column of another program to the new table, with its full definition if SQLite allows it."""
        (sql,) = self._db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (f"old_{table}",)).fetchone()
        clauses = {first_word(clause): clause for clause in table_clauses(sql)}
        try:
            self._db.execute(f"ALTER TABLE {table} ADD COLUMN {clauses[name.lower()]}")
        except (KeyError, backend_of(self._engine).driver.OperationalError) as error:
            if "duplicate column" in str(error) or kind[1]:
                raise
            self._db.execute(f"ALTER TABLE {table} ADD COLUMN {quoted(name)} {kind[0]}")
        logger.warning("kept the column %s of %s, which another program has added", name, table)

    def _rename_references(self) -> None:
        """Apply changed ids to the tables of other programs that refer to them by a foreign key."""
        if not self._new_ids:
            return
        for table, column, _ in self._db.execute(REFERENCES).fetchall():
            if table not in COLUMNS and table.removeprefix("old_") not in COLUMNS:
                self._db.executemany(
                    f"UPDATE {quoted(table)} SET {quoted(column)} = ? WHERE {quoted(column)} = ?",
                    [(new, old) for old, new in self._new_ids.items()],
                )

    def _repaired(self, receipt_id: str | None, found: str, became: str, detail: object = "") -> None:
        self._events.append((receipt_id, self._now, f"{found}: {detail}" if detail else found, became))
        self._repairs[f"{found} → {became}"] += 1
        logger.info("repaired receipt %s: %s %s → %s", receipt_id, found, detail, became)

    def _receipts(self, rows: Iterator[Row]) -> Iterator[Row]:
        dead = set()
        if "dlq" in self._tables:
            dead = {row[0] for row in self._db.execute("SELECT original_receipt_id FROM old_dlq")}
            dead |= {self._repaired_id(receipt_id) for receipt_id in dead}
        latest = (-1, -1)
        for row in rows:
            row["id"] = self._repair_id(row["id"])
            note = functools.partial(self._repaired, row["id"])
            # If one of the two times is invalid, the other replaces it: the 30-day deadline is counted from it.
            made = _whole_number(row["created_at"], _whole_number(row["hlc_local_time"], self._now))
            numbers = {"created_at": made, "hlc_local_time": made, "hlc_logical_counter": 0}
            numbers |= {"hlc_server_time": None, "retry_count": 0, "synced_at": None}
            _repair_values(row, numbers, ("pos_id", "fiscal_doc", "last_error"), note)
            if row["retry_count"] is None:
                row["retry_count"] = 0
                note("retry_count null", "0")
            self._repair_status(row, dead, note)
            if not _is_json(row["fiscal_doc"]):
                note("a document that is not JSON", "kept as text")
            stamp = row["hlc_local_time"], row["hlc_logical_counter"]
            if stamp <= latest:
                note("a timestamp that is not above the ones before it", "kept", stamp)
            latest = max(latest, stamp)
            yield row

    def _repair_id(self, given: object) -> str:
        """The id in the form that operations look up: text, and lower case if it is a UUID."""
        wanted = _text(given) if isinstance(given, bytes) else str(given)
        if UUID_TEXT.fullmatch(wanted.lower()):
            wanted = wanted.lower()
        if wanted == given and not isinstance(given, _Repaired):
            return wanted
        if self._db.execute("SELECT 1 FROM old_receipts WHERE id = ?", (str(wanted),)).fetchone():
            wanted = str(uuid.uuid4())
        self._new_ids[given] = wanted
        self._repaired(wanted, "an id that cannot be looked up", "another", f"{given!r} → {wanted}")
        return wanted

    @staticmethod
    def _repair_status(row: Row, dead: set[str], note: Callable[..., None]) -> None:
        if row["status"] == "synced":
            for column, other in (("synced_at", "hlc_server_time"), ("hlc_server_time", "synced_at")):
                if row[column] is None:
                    row[column] = row["created_at"] if row[other] is None else row[other]
                    note(f"synced without {column}", "set from another time of the receipt", row[column])
            return
        for column in ("synced_at", "hlc_server_time"):
            if row[column] is not None:
                note(f"{row['status']} with {column}", "removed", row[column])
                row[column] = None
        if row["status"] == "syncing":
            row["status"] = "pending"
            note("syncing without a lease", "pending")
        elif row["status"] == "failed" and row["id"] not in dead:
            # As after a requeue: the attempts start from 0.
            row["status"], row["retry_count"] = "pending", 0
            note("failed without a dead letter", "pending")

    def _dead_letters(self, rows: Iterator[Row]) -> Iterator[Row]:
        opened = self._db.execute(
            "SELECT original_receipt_id, rowid FROM old_dlq WHERE resolved_at IS NULL ORDER BY failed_at, rowid"
        )
        newest = dict(opened.fetchall())
        numbers = {"failed_at": self._now, "retry_attempts": 0, "resolved_at": self._now}
        for row in rows:
            is_newest = newest.get(row["original_receipt_id"]) == row["rowid"]
            receipt_id = row["original_receipt_id"] = self._repaired_id(row["original_receipt_id"])
            note = functools.partial(self._repaired, receipt_id)
            _repair_values(row, numbers, ("reason", "fiscal_doc", "last_error", "resolved_by"), note)
            row["resolution_reason"] = None
            if row["resolved_at"] is None:
                row["resolved_by"] = None
                why = self._why_closed(receipt_id, is_newest=is_newest)
                if why:
                    row["resolved_at"], row["resolved_by"], row["resolution_reason"] = self._now, BY, why
                    note(f"an open dead letter, but {why}", f"resolved by {BY}")
            elif row["resolved_by"] is None:
                row["resolved_by"] = BY
                note("a resolved dead letter without resolved_by", f"resolved by {BY}")
            yield row

    def _why_closed(self, receipt_id: str, *, is_newest: bool) -> str | None:
        status = self._db.execute("SELECT status FROM receipts WHERE id = ?", (receipt_id,)).fetchone()
        if status is None:
            return "its receipt is gone"
        if status[0] != "failed":
            return f"its receipt is {status[0]}"
        return None if is_newest else "there is a newer one"

    def _repaired_id(self, given: object) -> Any:  # noqa: ANN401 (SQLite stores any type)
        if given in self._new_ids:
            return self._new_ids[given]
        wanted = _text(given) if isinstance(given, bytes) else given
        lowered = wanted.lower() if isinstance(wanted, str) else wanted
        return lowered if isinstance(lowered, str) and UUID_TEXT.fullmatch(lowered) else wanted

    def _old_events(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            note = functools.partial(self._repaired, None)
            _repair_values(row, {"timestamp": self._now}, ("event_type", "receipt_id", "metadata"), note)
            if row["receipt_id"] is not None:
                row["receipt_id"] = self._repaired_id(row["receipt_id"])
            yield row

    def _settings(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            note = functools.partial(self._repaired, None)
            _repair_values(row, {"updated_at": self._now}, ("key", "value"), note)
            value = row["value"]
            if row["key"] in SETTINGS and not (value.isascii() and value.isdigit() and int(value) > 0):
                row["value"] = str(max(_whole_number(value, SETTINGS[row["key"]]) or 0, 1))
                note(f"{row['key']} is not a whole number", "replaced", f"{value!r} → {row['value']}")
            yield row

    def _compare_with_capacity(self) -> None:
        (undelivered,) = self._db.execute("SELECT COUNT(*) FROM receipts WHERE status = 'pending'").fetchone()
        given = self._db.execute("SELECT value FROM config WHERE key = 'buffer_capacity'").fetchone()
        capacity = int(given[0]) if given else SETTINGS["buffer_capacity"]
        if undelivered > capacity:
            self._repaired(None, "more receipts than buffer_capacity", "all kept", f"{undelivered} > {capacity}")


def _repair_values(
    row: Row, numbers: Mapping[str, int | None], texts: tuple[str, ...], note: Callable[..., None]
) -> None:
    """Convert `numbers` to int (or the given default) and `texts` to text: SQLite stores any type in any column."""
    for column, default in numbers.items():
        value = row[column]
        if value is not None and not isinstance(value, int):
            row[column] = _whole_number(value, default)
            note(f"{column} is not a whole number", "replaced", f"{value!r} → {row[column]!r}")
    for column in texts:
        value = row[column]
        if isinstance(value, bytes):
            value = _text(value)
            row[column] = value
            note(f"{column} is a BLOB", "converted to text")
        if isinstance(value, _Repaired):
            note(f"{column} is not UTF-8", "its invalid bytes are written as \\x…")


def _whole_number(value: object, default: int | None) -> int | None:
    """An int from a number, its text, or a date; a date without a time zone is UTC, as SQLite's functions write it."""
    if isinstance(value, int):
        return value
    text = _text(value) if isinstance(value, bytes) else str(value)
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return default
        number = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    return number if abs(number) < 2**63 else default


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
