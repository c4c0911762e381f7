"""Care for the file: copies of it, and whether it is whole."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import CheckConstraint, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.errors import BufferDamagedError, BufferStorageError, InvalidConfigError, ReceiptBufferError
from kkt_buffer.models import Base
from kkt_buffer.operations.settings import Settings
from kkt_buffer.sqlite.file import backup


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """What was checked, and what was found wrong with each: an empty tuple where all is well."""

    findings: Mapping[str, tuple[str, ...]]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not any(self.findings.values())

    def __str__(self) -> str:
        return "; ".join(f"{what}: {problem}" for what, problems in self.findings.items() for problem in problems)


# SQLite leaves them out where the file is opened for reading alone.
_RULES = " UNION ALL ".join(
    f"SELECT 'row ' || rowid || ' of {table.name} breaks {constraint.name}' FROM {table.name}"
    f" WHERE NOT ({constraint.sqltext})"
    for table in Base.metadata.sorted_tables
    for constraint in sorted(table.constraints, key=lambda constraint: str(constraint.name))
    if isinstance(constraint, CheckConstraint)
)

# Each invariant as a query for what breaks it: one text for each problem.
_INVARIANTS = {
    "rules of the tables": _RULES,
    "dead letters": """
        SELECT 'receipt ' || receipts.id || ' is ' || status || ' and has an open dead letter'
        FROM dlq JOIN receipts ON receipts.id = original_receipt_id WHERE resolved_at IS NULL AND status <> 'failed'
        UNION ALL
        SELECT 'receipt ' || id || ' is failed without a dead letter' FROM receipts
        WHERE status = 'failed' AND NOT EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id)""",
    "counts": """
        SELECT name || ' are counted as ' || value || ', and are ' || rows FROM (
            SELECT 'pending' AS name, pending AS value, (SELECT COUNT(*) FROM receipts WHERE status = 'pending') AS rows
                FROM buffer_state
            UNION ALL SELECT 'syncing', syncing, (SELECT COUNT(*) FROM receipts WHERE status = 'syncing')
                FROM buffer_state
            UNION ALL SELECT 'synced', synced, (SELECT COUNT(*) FROM receipts WHERE status = 'synced')
                FROM buffer_state
            UNION ALL SELECT 'failed', failed, (SELECT COUNT(*) FROM receipts WHERE status = 'failed')
                FROM buffer_state
            UNION ALL SELECT 'open_dead_letters', open_dead_letters,
                (SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL) FROM buffer_state)
        WHERE value <> rows
        UNION ALL
        SELECT 'buffer_state has no row' WHERE NOT EXISTS (SELECT 1 FROM buffer_state)""",
    # In the order of commits, which the rowid tells. What was taken over from the sqlite3 version keeps its own.
    "order of timestamps": """
        SELECT 'receipt ' || id || ' has a timestamp that is not above the one before it' FROM (
            SELECT rowid AS number, id, hlc_local_time AS time, hlc_logical_counter AS counter,
                LAG(hlc_local_time) OVER (ORDER BY rowid) AS time_before,
                LAG(hlc_logical_counter) OVER (ORDER BY rowid) AS counter_before
            FROM receipts)
        WHERE (time, counter) <= (time_before, counter_before)
            AND number > COALESCE((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'adopted_rows'), 0)""",
}
AT_MOST = 100  # problems of one kind that are told


class Integrity(Settings):
    """The operations on the file as a whole."""

    def backup(self, path: str | os.PathLike[str]) -> None:
        """
        Copy the buffer as it is at this moment to the file `path`, readable for the owner alone, whoever writes.

        What was at `path` is replaced once the copy is complete and on disk: a crash leaves the old one or the new one.
        The copy is a buffer like any other. Where stderr is a terminal, it says how far it is.

        Raises `BufferStorageError` if the copy cannot be written, `ReceiptBufferError` inside `transaction()`, whose
        changes would not be in it, `ValueError` if `path` is the buffer itself.
        """
        if self.in_transaction:
            raise ReceiptBufferError(
                "backup was called inside transaction(): what that has changed so far would not be in the copy. "
                "Nothing was copied. Call it outside."
            )
        backup(self._engine, path)

    def check_integrity(self) -> IntegrityReport:
        """
        Read all of the buffer and report what is wrong with it; changes nothing, and locks nobody out.

        Checked are the pages and indexes of the file, the references between its rows, what a row may be, texts,
        dead letters, counts, settings, and the order of timestamps. A million receipts take some seconds.
        """
        checks: dict[str, Callable[[Session], list[str]]] = {
            "pages and indexes": _pages,
            "references": _references,
            "settings": _settings,
            "texts": _texts,
        }
        checks |= {what: _query(sql) for what, sql in _INVARIANTS.items()}
        return IntegrityReport({what: self._found(check) for what, check in checks.items()})

    def _found(self, check: Callable[[Session], list[str]]) -> tuple[str, ...]:
        try:
            with self._reading() as session:
                return tuple(check(session)[:AT_MOST])
        except (BufferStorageError, SQLAlchemyError, ValueError) as error:
            return (str(error),)


def _query(sql: str) -> Callable[[Session], list[str]]:
    return lambda session: list(session.scalars(text(sql)).fetchmany(AT_MOST))


def _pages(session: Session) -> list[str]:
    try:
        found = list(session.scalars(text(f"PRAGMA integrity_check({AT_MOST})")))
    except BufferDamagedError as error:
        # It gives up where it cannot read on; this one goes around, and names the page.
        found = [*session.scalars(text(f"PRAGMA quick_check({AT_MOST})")), str(error)]
    return [line for line in found if line != "ok"]


def _references(session: Session) -> list[str]:
    return [
        f"row {row.rowid} of {row.table} refers to a row of {row.parent} that is not there"
        for row in session.execute(text("PRAGMA foreign_key_check"))
    ]


def _texts(session: Session) -> list[str]:
    problems = []
    columns = ("pos_id", "fiscal_doc", "last_error")
    blobs = ", ".join(f"CAST({column} AS BLOB)" for column in columns)
    for receipt_id, *values in session.execute(text(f"SELECT CAST(id AS BLOB), {blobs} FROM receipts")):
        for column, value in zip(("id", *columns), (receipt_id, *values), strict=True):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                problems.append(f"{column} of receipt {receipt_id.decode(errors='backslashreplace')}: {error}")
    return problems


def _settings(session: Session) -> list[str]:
    problems = []
    for key, value in session.execute(text("SELECT key, value FROM config")):
        if key in CONFIG_RULES and CONFIG_RULES[key].parse(value) is None:
            problems.append(str(InvalidConfigError(key, value, CONFIG_RULES[key].expected)))
    return problems
