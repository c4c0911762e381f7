"""
Pruning: delete rows after their retention, except those that another row refers to.

The file does not get smaller: SQLite reuses the freed pages for new rows, so the file stops growing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from kkt_buffer.operations.status import SECONDS_PER_DAY
from kkt_buffer.transaction import Transaction, Transactions

BATCH = 100  # rows per transaction: it holds the write lock for a few milliseconds


@dataclass(frozen=True, slots=True)
class PruneReport:
    """
    The numbers of rows that `prune` deleted.

    `kept_receipts` counts the receipts that were kept after their retention because another row refers to them.
    """

    receipts: int
    dead_letters: int
    events: int
    kept_receipts: int


# Served by idx_receipts_synced.
_DELIVERED = "status = 'synced' AND synced_at <= :synced"

# Closed dead letters that no longer explain a status: the receipt is not failed, or it was requeued after this one.
_HISTORY = f"""\
DELETE FROM dlq WHERE id IN (
    SELECT letter.id FROM dlq AS letter JOIN receipts ON receipts.id = letter.original_receipt_id
    WHERE letter.resolved_at <= :closed AND (receipts.status <> 'failed' OR letter.resolution = 'requeued')
    LIMIT {BATCH})"""

# Failed receipts with all dead letters resolved. The query starts from dlq: it is small, receipts may be large.
_RESOLVED = """\
SELECT id FROM receipts
WHERE id IN (SELECT original_receipt_id FROM dlq WHERE resolved_at <= :closed) AND status = 'failed'
    AND NOT EXISTS (
        SELECT 1 FROM dlq
        WHERE original_receipt_id = receipts.id AND (resolved_at IS NULL OR resolved_at > :closed))"""

# In the order of id, which is the order of time. The wall clock, because the guard trigger uses it instead of `now`.
_EVENTS = """\
SELECT id FROM buffer_events WHERE timestamp <= :events AND timestamp <= {unix_time} - :events_age
ORDER BY id LIMIT {batch}"""

Parameters = Mapping[str, int]


def prune(transactions: Transactions) -> PruneReport:
    """Delete what is older than its retention, in short transactions, so that writers do not wait."""
    now, ages, by_dlq_only, unreferenced = transactions.read(_limits)
    cutoffs = {"synced": now - ages["synced"], "closed": now - ages["dlq"]}
    letters = _delete(transactions, _HISTORY, cutoffs)
    resolved_letters, resolved = _prune_resolved(transactions, f"{_RESOLVED} AND {by_dlq_only} LIMIT {BATCH}", cutoffs)
    free = f"SELECT id FROM receipts WHERE {_DELIVERED} AND {unreferenced} LIMIT {BATCH}"
    delivered = _delete(transactions, f"DELETE FROM receipts WHERE id IN ({free})", cutoffs)
    [kept] = transactions.read(_ask, f"SELECT COUNT(*) FROM receipts WHERE {_DELIVERED}", cutoffs)
    return PruneReport(
        receipts=delivered + resolved,
        dead_letters=letters + resolved_letters,
        events=_prune_events(transactions, {"events": now - ages["events"], "events_age": ages["events"]}),
        kept_receipts=kept,
    )


def _limits(tx: Transaction) -> tuple[int, dict[str, int], str, str]:
    """The time, the retentions in seconds, and what no row refers to: none but a dead letter, and none at all."""
    ages = {what: tx.number(f"retention_{what}_days") * SECONDS_PER_DAY for what in ("synced", "dlq", "events")}
    return tx.now, ages, _unreferenced(tx, but="dlq"), _unreferenced(tx)


def _ask(tx: Transaction, query: str, parameters: Parameters) -> list[Any]:
    """The values of the first column."""
    return list(tx.connection.scalars(text(query), parameters))


def _unreferenced(tx: Transaction, but: str = "") -> str:
    """The SQL condition that no row of a table other than `but` refers to the receipt."""
    conditions = [
        f"NOT EXISTS (SELECT 1 FROM {table} AS other WHERE other.{column} = receipts.{target})"
        for table, column, target in tx.backend.references(tx.connection)
        if table.strip('"') != but
    ]
    return " AND ".join(conditions).replace(":", "\\:") or "TRUE"  # a colon would begin a parameter


def _delete(transactions: Transactions, statement: str, parameters: Parameters) -> int:
    """Repeat a deletion of at most BATCH rows until no rows are left."""
    deleted = 0
    while True:
        batch = transactions.write(_delete_batch, statement, parameters)
        deleted += batch
        if batch < BATCH:
            return deleted


def _delete_batch(tx: Transaction, statement: str, parameters: Parameters) -> int:
    deleted = tx.connection.execute(text(statement), parameters).rowcount
    tx.backend.pruned(tx.connection)
    return deleted


def _prune_resolved(transactions: Transactions, resolved: str, parameters: Parameters) -> tuple[int, int]:
    letters = receipts = 0
    while True:
        of_these, batch = transactions.write(_delete_resolved, resolved, parameters)
        letters += of_these
        receipts += batch
        if batch < BATCH:
            return letters, receipts


def _delete_resolved(tx: Transaction, resolved: str, parameters: Parameters) -> tuple[int, int]:
    letters, found = 0, _ask(tx, resolved, parameters)
    for receipt_id in found:
        of_this = {"id": receipt_id}
        letters += tx.connection.execute(text("DELETE FROM dlq WHERE original_receipt_id = :id"), of_this).rowcount
        tx.connection.execute(text("DELETE FROM receipts WHERE id = :id AND status = 'failed'"), of_this)
    tx.backend.pruned(tx.connection)
    return letters, len(found)


def _prune_events(transactions: Transactions, parameters: Parameters) -> int:
    """Find old events without the write lock, because their time has no index; then delete them by id."""
    deleted = 0
    old = _EVENTS.format(unix_time=transactions.backend.unix_time, batch=BATCH)
    while True:
        found = transactions.read(_ask, old, parameters)
        if found:
            transactions.write(_delete_events, found)
        deleted += len(found)
        if len(found) < BATCH:
            return deleted


def _delete_events(tx: Transaction, found: list[int]) -> None:
    tx.connection.execute(
        text("DELETE FROM buffer_events WHERE id = :number"), [{"number": number} for number in found]
    )
