"""
Pruning: deleting what its retention allows, and nothing that anybody still needs.

The file does not get smaller: SQLite reuses the freed pages for what comes next, so it stops growing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import text

from kkt_buffer.operations.settings import SECONDS_PER_DAY, Settings
from kkt_buffer.sqlite.ddl import REFERENCES, quoted

BATCH = 100  # rows of one transaction: a few milliseconds of the write lock


@dataclass(frozen=True, slots=True)
class PruneReport:
    """
    How many rows `prune` deleted.

    `kept_receipts` are receipts whose retention is over but that another row refers to, or that hold the clock.
    """

    receipts: int
    dead_letters: int
    events: int
    kept_receipts: int


# The receipt with the highest HLC is the memory of the clock.
_NOT_LAST = """\
(hlc_local_time, hlc_logical_counter) <> (SELECT hlc_local_time, hlc_logical_counter FROM buffer_state)"""

# By idx_receipts_synced.
_DELIVERED = f"status = 'synced' AND synced_at <= :synced AND {_NOT_LAST}"

# Closed dead letters that do not tell why a receipt is failed: it is not, or a later one tells it.
_HISTORY = f"""\
DELETE FROM dlq WHERE id IN (
    SELECT letter.id FROM dlq AS letter JOIN receipts ON receipts.id = letter.original_receipt_id
    WHERE letter.resolved_at <= :closed AND (receipts.status <> 'failed' OR EXISTS (
        SELECT 1 FROM dlq AS later
        WHERE later.original_receipt_id = letter.original_receipt_id AND later.rowid > letter.rowid))
    LIMIT {BATCH})"""

# Failed receipts whose last dead letter was resolved. By the letters: they are few, and the undelivered may be many.
_RESOLVED = f"""\
SELECT id FROM receipts
WHERE id IN (SELECT original_receipt_id FROM dlq WHERE resolved_at <= :closed) AND status = 'failed' AND {_NOT_LAST}
    AND NOT EXISTS (
        SELECT 1 FROM dlq
        WHERE original_receipt_id = receipts.id AND (resolved_at IS NULL OR resolved_at > :closed))"""

# By number, which is the order of time. The guard of the table goes by the wall clock.
_EVENTS = f"""\
SELECT id FROM buffer_events WHERE timestamp <= :events AND timestamp <= unixepoch() - :events_age
ORDER BY id LIMIT {BATCH}"""


class Pruning(Settings):
    """The operation that makes room."""

    def prune(self) -> PruneReport:
        """
        Delete synced receipts, closed dead letters and events that are older than their retention.

        What is undelivered, or has an open dead letter, is never deleted, nor is the receipt with the highest HLC. A
        receipt that a row of any table refers to stays until that row is gone. A resolved receipt leaves with its
        last dead letter. Works in short transactions, so that writers do not wait; inside `transaction()` it is one.
        """
        now = self._seconds()
        numbers = self._numbers("retention_synced_days", "retention_dlq_days", "retention_events_days")
        ages = {what: numbers[f"retention_{what}_days"] * SECONDS_PER_DAY for what in ("synced", "dlq", "events")}
        cutoffs = {"synced": now - ages["synced"], "closed": now - ages["dlq"]}
        others = self._unreferred(but="dlq")
        letters = self._delete(_HISTORY, cutoffs)
        resolved_letters, resolved = self._prune_resolved(f"{_RESOLVED} AND {others}", cutoffs)
        free = f"{_DELIVERED} AND {self._unreferred()}"
        delivered = self._delete(
            f"DELETE FROM receipts WHERE id IN (SELECT id FROM receipts WHERE {free} LIMIT {BATCH})",
            cutoffs,
        )
        with self._reading() as session:
            over = "SELECT COUNT(*) FROM receipts WHERE status = 'synced' AND synced_at <= :synced"
            kept = session.scalar(text(over), cutoffs) or 0
        return PruneReport(
            receipts=delivered + resolved,
            dead_letters=letters + resolved_letters,
            events=self._prune_events({"events": now - ages["events"], "events_age": ages["events"]}),
            kept_receipts=kept,
        )

    def _unreferred(self, but: str = "") -> str:
        """The condition that no row refers to the receipt, of tables other than `but`."""
        with self._reading() as session:
            references = session.execute(text(REFERENCES)).all()
        conditions = [
            f"NOT EXISTS (SELECT 1 FROM {quoted(name)} AS other"
            f" WHERE other.{quoted(origin)} = receipts.{quoted(target)})"
            for name, origin, target in references
            if name != but
        ]
        return " AND ".join(conditions) or "TRUE"

    def _delete(self, statement: str, parameters: Mapping[str, int]) -> int:
        """Repeat a deletion of at most BATCH rows until it finds no more."""
        deleted = 0
        while True:
            with self._writing() as session:
                batch = session.connection().exec_driver_sql(statement, dict(parameters)).rowcount
            deleted += batch
            if batch < BATCH:
                return deleted

    def _prune_resolved(self, resolved: str, parameters: Mapping[str, int]) -> tuple[int, int]:
        letters = receipts = 0
        while True:
            with self._writing() as session:
                connection = session.connection()
                found = connection.exec_driver_sql(f"{resolved} LIMIT {BATCH}", dict(parameters)).all()
                for (receipt_id,) in found:
                    letters += connection.exec_driver_sql(
                        "DELETE FROM dlq WHERE original_receipt_id = ?", (receipt_id,)
                    ).rowcount
                    connection.exec_driver_sql("DELETE FROM receipts WHERE id = ?", (receipt_id,))
            receipts += len(found)
            if len(found) < BATCH:
                return letters, receipts

    def _prune_events(self, parameters: Mapping[str, int]) -> int:
        """Look for old events outside the write lock, as no index knows their time; then delete them by number."""
        deleted = 0
        while True:
            with self._reading() as session:
                found = session.connection().exec_driver_sql(_EVENTS, dict(parameters)).all()
            if found:
                with self._writing() as session:
                    session.connection().exec_driver_sql(
                        "DELETE FROM buffer_events WHERE id = ?", [tuple(row) for row in found]
                    )
            deleted += len(found)
            if len(found) < BATCH:
                return deleted
