"""
Pruning: deleting what its retention allows, and nothing that another row refers to.

The file does not get smaller: SQLite reuses the freed pages for what comes next, so it stops growing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import text

from kkt_buffer.operations.status import SECONDS_PER_DAY
from kkt_buffer.transaction import Transaction, Transactions

BATCH = 100  # rows of one transaction: a few milliseconds of the write lock


@dataclass(frozen=True, slots=True)
class PruneReport:
    """
    How many rows `prune` deleted.

    `kept_receipts` are receipts whose retention is over but that another row refers to.
    """

    receipts: int
    dead_letters: int
    events: int
    kept_receipts: int


# By idx_receipts_synced.
_DELIVERED = "status = 'synced' AND synced_at <= :synced"

# Closed dead letters that do not tell why a receipt is failed: it is not, or a later one tells it.
_HISTORY = f"""\
DELETE FROM dlq WHERE id IN (
    SELECT letter.id FROM dlq AS letter JOIN receipts ON receipts.id = letter.original_receipt_id
    WHERE letter.resolved_at <= :closed AND (receipts.status <> 'failed' OR EXISTS (
        SELECT 1 FROM dlq AS later
        WHERE later.original_receipt_id = letter.original_receipt_id AND later.rowid > letter.rowid))
    LIMIT {BATCH})"""

# Failed receipts whose last dead letter was resolved. By the letters: they are few, and the undelivered may be many.
_RESOLVED = """\
SELECT id FROM receipts
WHERE id IN (SELECT original_receipt_id FROM dlq WHERE resolved_at <= :closed) AND status = 'failed'
    AND NOT EXISTS (
        SELECT 1 FROM dlq
        WHERE original_receipt_id = receipts.id AND (resolved_at IS NULL OR resolved_at > :closed))"""

# By number, which is the order of time. The guard of the table goes by the wall clock.
_EVENTS = text(
    f"""\
SELECT id FROM buffer_events WHERE timestamp <= :events AND timestamp <= unixepoch() - :events_age
ORDER BY id LIMIT {BATCH}"""
)

# Where the receipts with the greatest rowids are deleted, the next one gets such a rowid again, and is not an adopted
# one: `adopted_rows` must not reach that far.
_ADOPTED = text(
    """\
UPDATE config SET value = (SELECT COALESCE(MAX(rowid), 0) FROM receipts)
WHERE key = 'adopted_rows' AND CAST(value AS INTEGER) > (SELECT COALESCE(MAX(rowid), 0) FROM receipts)"""
)

Parameters = Mapping[str, int]


def prune(transactions: Transactions) -> PruneReport:
    """Delete what is older than its retention, in short transactions, so that writers do not wait."""
    with transactions.reading() as tx:
        ages = {what: tx.number(f"retention_{what}_days") * SECONDS_PER_DAY for what in ("synced", "dlq", "events")}
        now = tx.now
        others, any_other = _unreferred(tx, but="dlq"), _unreferred(tx)
    cutoffs = {"synced": now - ages["synced"], "closed": now - ages["dlq"]}
    letters = _delete(transactions, _HISTORY, cutoffs)
    resolved_letters, resolved = _prune_resolved(transactions, f"{_RESOLVED} AND {others} LIMIT {BATCH}", cutoffs)
    free = f"SELECT id FROM receipts WHERE {_DELIVERED} AND {any_other} LIMIT {BATCH}"
    delivered = _delete(transactions, f"DELETE FROM receipts WHERE id IN ({free})", cutoffs)
    with transactions.reading() as tx:
        kept = tx.connection.scalar(text(f"SELECT COUNT(*) FROM receipts WHERE {_DELIVERED}"), cutoffs) or 0
    return PruneReport(
        receipts=delivered + resolved,
        dead_letters=letters + resolved_letters,
        events=_prune_events(transactions, {"events": now - ages["events"], "events_age": ages["events"]}),
        kept_receipts=kept,
    )


def _unreferred(tx: Transaction, but: str = "") -> str:
    """The condition that no row refers to the receipt, of tables other than `but`."""
    quoted = tx.connection.dialect.identifier_preparer.quote_identifier
    conditions = [
        f"NOT EXISTS (SELECT 1 FROM {quoted(table)} AS other WHERE other.{quoted(column)} = receipts.{quoted(target)})"
        for table, column, target in tx.backend.references(tx.connection)
        if table != but
    ]
    return " AND ".join(conditions).replace(":", "\\:") or "TRUE"  # a colon would begin a parameter


def _delete(transactions: Transactions, statement: str, parameters: Parameters) -> int:
    """Repeat a deletion of at most BATCH rows until it finds no more."""
    deleted = 0
    while True:
        with transactions.writing() as tx:
            batch = tx.connection.execute(text(statement), parameters).rowcount
            tx.connection.execute(_ADOPTED)
        deleted += batch
        if batch < BATCH:
            return deleted


def _prune_resolved(transactions: Transactions, resolved: str, parameters: Parameters) -> tuple[int, int]:
    letters = receipts = 0
    while True:
        with transactions.writing() as tx:
            found = tx.connection.execute(text(resolved), parameters).all()
            for (receipt_id,) in found:
                of_this = {"id": receipt_id}
                letters += tx.connection.execute(
                    text("DELETE FROM dlq WHERE original_receipt_id = :id"), of_this
                ).rowcount
                tx.connection.execute(text("DELETE FROM receipts WHERE id = :id"), of_this)
            tx.connection.execute(_ADOPTED)
        receipts += len(found)
        if len(found) < BATCH:
            return letters, receipts


def _prune_events(transactions: Transactions, parameters: Parameters) -> int:
    """Look for old events outside the write lock, as no index knows their time; then delete them by number."""
    deleted = 0
    while True:
        with transactions.reading() as tx:
            found = tx.connection.scalars(_EVENTS, parameters).all()
        if found:
            with transactions.writing() as tx:
                tx.connection.execute(
                    text("DELETE FROM buffer_events WHERE id = :number"), [{"number": number} for number in found]
                )
        deleted += len(found)
        if len(found) < BATCH:
            return deleted
