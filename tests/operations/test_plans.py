"""How SQLite finds the rows: each statement by its index, so that a full buffer costs what an empty one does."""

import re

import pytest
from builders import NOON, a_receipt
from sqlalchemy import ClauseElement, event
from sqlalchemy.dialects import sqlite

from kkt_buffer import ReceiptRepository
from kkt_buffer.operations import dead_letters, leases, receipts, status

BY_ID = "SEARCH receipts USING INDEX sqlite_autoindex_receipts_1 (id=?)"
SETTING = "SEARCH config USING INDEX sqlite_autoindex_config_1 (key=?)"
OPEN_LETTER = "SEARCH dlq USING INDEX idx_dlq_open (original_receipt_id=?)"

# A SCAN by an index goes through it in its order, and ends at the LIMIT; each index has only what its name says.
PLANS = {
    "receipts.ADD": ["SEARCH dlq USING COVERING INDEX idx_dlq_original_receipt (original_receipt_id=?)"],
    "receipts.CLOSE_DEAD_LETTER": [OPEN_LETTER],
    "receipts.DEAD_LETTER": [BY_ID],
    "receipts.FAIL": [BY_ID],
    "receipts.KNOWN": [BY_ID],
    "receipts.LAST_HLC": ["SCAN buffer_state"],
    "receipts.MARK_FAILED_SYNCED": [BY_ID],
    "receipts.MARK_SYNCED": [BY_ID],
    "receipts.PENDING": ["SCAN receipts USING INDEX idx_receipts_status"],
    "receipts.RECEIPT": [BY_ID],
    "receipts.STATUS_OF": [BY_ID],
    "leases.FAIL_ATTEMPT": [BY_ID],
    "leases.POSTPONE": [BY_ID],
    "leases.RECOVER": ["SCAN receipts USING INDEX idx_receipts_lease"],
    "leases.RELEASE": [BY_ID],
    "leases.RENEW": [BY_ID],
    "leases.TAKE": [
        "SEARCH receipts USING COVERING INDEX sqlite_autoindex_receipts_1 (id=?)",
        "LIST SUBQUERY",
        "SCAN receipts USING INDEX idx_receipts_status",
    ],
    "leases.TAKEN": ["SEARCH receipts USING INDEX idx_receipts_lease (lease_token=?)"],
    "leases.TAKE_OF_POS": [
        "SEARCH receipts USING COVERING INDEX sqlite_autoindex_receipts_1 (id=?)",
        "LIST SUBQUERY",
        "SEARCH receipts USING INDEX idx_receipts_pos_id (pos_id=?)",
    ],
    # An operator's decision, not a till's work: all open dead letters, in the order of their receipts.
    "dead_letters.OPEN_IN_ORDER": [
        BY_ID,
        "LIST SUBQUERY",
        "SCAN dlq USING INDEX idx_dlq_open",
        "USE TEMP B-TREE FOR ORDER BY",
    ],
    "dead_letters.REVIVE": [BY_ID],
    "status.DUE": [
        "SCAN receipts",
        "CORRELATED SCALAR SUBQUERY",
        OPEN_LETTER,
        "USE TEMP B-TREE FOR ORDER BY",
    ],
    "status.STATUS": [
        "SCAN buffer_state",
        "SCALAR SUBQUERY",
        SETTING,
        "SCALAR SUBQUERY",
        SETTING,
        "SCALAR SUBQUERY",
        "SCAN receipts",
        "CORRELATED SCALAR SUBQUERY",
        OPEN_LETTER,
        "USE TEMP B-TREE FOR ORDER BY",
        "SCALAR SUBQUERY",
        SETTING,
        "SCALAR SUBQUERY",
        SETTING,
    ],
}
# Parts of others, and what is known by the name of its own module.
OTHERS = {"dead_letters.OPEN", "dead_letters.CLOSE_DEAD_LETTER", "status.OWED"}
STATEMENTS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": statement
    for module in (receipts, leases, dead_letters, status)
    for name, statement in vars(module).items()
    if name.isupper() and isinstance(statement, ClauseElement)
}


def plan(engine, sql, values=None):
    """The steps of a statement, triggers included, without the numbers of its subqueries."""
    with engine.connect() as connection:
        driver = connection.connection.dbapi_connection
        rows = driver.execute(f"EXPLAIN QUERY PLAN {sql}", values or {}).fetchall()
    return [re.sub(r" (\(subquery-\d+\)|\d+)$", "", step) for *_, step in rows]


def test_all_are_here():
    """A new statement gets its plan here."""
    assert set(PLANS) == set(STATEMENTS) - OTHERS


@pytest.mark.parametrize("name", PLANS)
def test_statement(engine, name):
    sql = str(STATEMENTS[name].compile(dialect=sqlite.dialect(paramstyle="named")))
    assert PLANS[name] == plan(engine, sql, dict.fromkeys(re.findall(r":(\w+)", sql), 1))


OPERATIONS = {
    "claim_pending": lambda repository, _: repository.claim_pending(),
    "get_buffer_status": lambda repository, _: repository.get_buffer_status(),
    "get_events": lambda repository, _: repository.get_events(5),
    "get_events of a receipt": lambda repository, receipt_id: repository.get_events(5, receipt_id=receipt_id),
    "get_events of a type": lambda repository, _: repository.get_events(5, event_type="circuit_opened"),
    "get_pending_receipts": lambda repository, _: repository.get_pending_receipts(),
    "get_receipt_by_id": lambda repository, receipt_id: repository.get_receipt_by_id(receipt_id),
    "get_receipts_due": lambda repository, _: repository.get_receipts_due(2 * NOON),
    "increment_retry_count": lambda repository, receipt_id: repository.increment_retry_count(receipt_id, "an error"),
    "insert_receipt": lambda repository, _: a_receipt(repository),
    "list_dead_letters": lambda repository, _: repository.list_dead_letters(),
    "mark_synced": lambda repository, receipt_id: repository.mark_synced(receipt_id, NOON),
    "move_to_dlq": lambda repository, receipt_id: repository.move_to_dlq(receipt_id, "a reason"),
    "prune": lambda repository, _: repository.prune(),
}

SMALL = {"SCAN config", "SCAN buffer_state", "SCAN m"}  # settings, one row, the schema
# By number from one end of the table to the LIMIT; and what no till waits for.
KNOWN = {
    "get_events": {"SCAN buffer_events"},
    "get_buffer_status": {"SCAN receipts", "USE TEMP B-TREE FOR ORDER BY"},
    "get_receipts_due": {"SCAN receipts", "USE TEMP B-TREE FOR ORDER BY"},
    "prune": {"SCAN buffer_events", "SCAN dlq", "SCAN letter"},
    "list_dead_letters": {"USE TEMP B-TREE FOR ORDER BY"},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(engine, clock, name):
    """Nothing that an operation runs reads a whole table, or sorts."""
    repository = ReceiptRepository(engine, now=clock)
    receipt_id = a_receipt(repository).id
    a_receipt(repository, "failed")
    ran = []
    event.listen(engine, "checkout", lambda driver, *_: driver.set_trace_callback(ran.append))
    OPERATIONS[name](repository, receipt_id)
    steps = {step for sql in ran if re.match("SELECT|INSERT|UPDATE|DELETE", sql) for step in plan(engine, sql)}
    assert {step for step in steps if re.fullmatch(r"SCAN \w+|.*TEMP B-TREE.*", step)} <= SMALL | KNOWN.get(name, set())
