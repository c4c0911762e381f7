"""`check_integrity`: read the whole buffer and report problems."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import CheckConstraint, Connection, select, text
from sqlalchemy.exc import SQLAlchemyError

from kkt_buffer.backend import AT_MOST, Backend
from kkt_buffer.columns import ONLY_ON
from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.documents import is_intact
from kkt_buffer.errors import (
    BufferBusyError,
    ConnectionLostError,
    InvalidConfigError,
    ReceiptBufferError,
    TransactionConflictError,
)
from kkt_buffer.models import OPEN_ONLY, ConfigEntry, Receipt, ReceiptStatus, metadata
from kkt_buffer.transaction import Transaction, Transactions

# Problems with these subjects damage no receipt: a backup would not be better.
_NO_DAMAGE = frozenset({"settings", "order of timestamps", "safety of commits", "schema"})


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """
    The problems of each checked subject; an empty tuple if there are none.

    `is_damaged` tells problems for which a backup must be restored from those for which nothing must be restored: a
    setting that can be corrected, a trigger that was dropped, a timestamp that another program wrote out of order.
    """

    findings: Mapping[str, tuple[str, ...]]

    @property
    def is_sound(self) -> bool:
        """Whether no problem was found."""
        return not any(self.findings.values())

    @property
    def is_damaged(self) -> bool:
        """Whether a problem was found that only a backup can repair."""
        return any(problems for what, problems in self.findings.items() if what not in _NO_DAMAGE)

    def __str__(self) -> str:
        return "; ".join(f"{what}: {problem}" for what, problems in self.findings.items() for problem in problems)


# PRAGMA integrity_check does not check them in a file that is opened read-only.
_RULES = " UNION ALL ".join(
    f"SELECT 'a row of {table.name} breaks {constraint.name}: ' || {next(iter(table.primary_key.columns)).name}"
    f" FROM {table.name} WHERE NOT ({constraint.sqltext})"
    for table in metadata.sorted_tables
    for constraint in sorted(table.constraints, key=lambda constraint: str(constraint.name))
    if isinstance(constraint, CheckConstraint) and ONLY_ON not in table.info
)
_DEAD_LETTERS = """\
SELECT 'receipt ' || receipts.id || ' is ' || status || ' and has an open dead letter'
FROM dlq JOIN receipts ON receipts.id = original_receipt_id WHERE resolved_at IS NULL AND status <> 'failed'
UNION ALL
SELECT 'receipt ' || id || ' is failed without a dead letter' FROM receipts
WHERE status = 'failed' AND NOT EXISTS (SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id)"""


_LAST = """\
SELECT 'the last timestamp is below that of receipt ' || receipts.id FROM receipts, buffer_state AS state
WHERE (receipts.hlc_local_time, receipts.hlc_logical_counter) > (state.hlc_local_time, state.hlc_logical_counter)"""
# On every engine; `buffer_state` is a table or a view.
_COUNTS = "\nUNION ALL\n".join(
    [
        f"SELECT '{name} are counted as ' || COALESCE({column}, 0) || ', and are ' || found"
        f" FROM buffer_state, (SELECT COUNT(*) AS found FROM {table} WHERE {where}) AS rows_of_{column}"
        f" WHERE COALESCE({column}, -1) <> found"
        for name, column, table, where in (
            *((str(status), str(status), "receipts", f"status = '{status}'") for status in ReceiptStatus),
            ("open dead letters", "open_dead_letters", "dlq", OPEN_ONLY),
        )
    ]
    + [
        "SELECT 'the row of counts is missing' WHERE NOT EXISTS (SELECT 1 FROM buffer_state)",
        _LAST,
    ]
)


def _query(sql: str) -> Callable[[Connection], list[str]]:
    return lambda connection: list(connection.scalars(text(sql.replace(":", "\\:"))).fetchmany(AT_MOST))


def _settings(connection: Connection) -> list[str]:
    problems = []
    for key, value in connection.execute(select(ConfigEntry.key, ConfigEntry.value)):
        if key in CONFIG_RULES and CONFIG_RULES[key].parse(value) is None:
            problems.append(str(InvalidConfigError(key, value, CONFIG_RULES[key].expected)))
    return problems


# yield_per: never more than these rows in memory.
_DIGESTS = (
    select(Receipt.id, Receipt.fiscal_doc, Receipt.digest)
    .where(Receipt.digest.is_not(None))
    .execution_options(yield_per=100)
)


def _documents(connection: Connection, backend: Backend) -> list[str]:
    """Compare each document with its digest. SQLite has no checksums of its own."""
    problems: list[str] = []
    with backend.lenient_text(connection), connection.execute(_DIGESTS) as rows:
        for receipt_id, document, digest in rows:
            if not is_intact(document, digest):
                problems.append(f"the document of receipt {receipt_id} differs from its digest")
                if len(problems) == AT_MOST:
                    break
    return problems


def check(transactions: Transactions) -> IntegrityReport:
    """Run every check in its own read transaction."""
    checks = {
        **transactions.backend.checks(),
        "settings": _settings,
        "rules of the tables": _query(_RULES),
        "dead letters": _query(_DEAD_LETTERS),
        "counts": _query(_COUNTS),
        "documents": lambda connection: _documents(connection, transactions.backend),
    }
    return IntegrityReport({what: _found(transactions, check) for what, check in checks.items()})


def _found(transactions: Transactions, check: Callable[[Connection], list[str]]) -> tuple[str, ...]:
    problems: list[str] = []

    def run(tx: Transaction) -> None:
        with transactions.backend.patience(tx.connection):
            problems[:] = check(tx.connection)

    try:
        transactions.read(run)
    except (BufferBusyError, ConnectionLostError, TransactionConflictError):
        raise  # it tells nothing about the rows
    except (ReceiptBufferError, SQLAlchemyError, ValueError) as error:
        # In a damaged file the end of the transaction can fail too. The problems found before are more useful.
        problems = problems or [str(error)]
    return tuple(problems[:AT_MOST])
