"""How SQLite finds the rows: no operation reads or sorts a whole table, however much it holds."""

import re

import pytest
from operations_table import OPERATIONS, prepared
from sqlalchemy import event
from sqlalchemy.pool import Pool

SMALL = {"SCAN config", "SCAN buffer_state", "SCAN m"}  # settings, counts, the schema
# By number from one end of the table to the LIMIT; and what no till waits for.
# The heads of three indexes, put into order.
HEADS = {"SCAN part", "SCAN oldest", "USE TEMP B-TREE FOR ORDER BY"}
# Receipts with equal timestamps are sorted by id; SQLite has had two names for that.
TIES = {"USE TEMP B-TREE FOR RIGHT PART OF ORDER BY", "USE TEMP B-TREE FOR LAST TERM OF ORDER BY"}
KNOWN = {
    "claim_pending": {"SCAN due"},  # the receipts that were found, at most the limit
    "list_receipts": HEADS | TIES,
    "get_buffer_status": HEADS,
    "get_receipts_due": HEADS,
    "get_events": {"SCAN buffer_events"},
    "prune": {"SCAN buffer_events", "SCAN dlq", "SCAN letter"},
    "list_dead_letters": {"USE TEMP B-TREE FOR ORDER BY"},
    "requeue_all": {"USE TEMP B-TREE FOR ORDER BY"},
}


@pytest.fixture
def statements():
    """What every connection runs, with its values. Steps of triggers are in the plan of the statement they follow."""
    ran = []

    def trace(driver, *_):
        driver.set_trace_callback(
            lambda sql: ran.append(sql) if re.match("SELECT|WITH|INSERT|UPDATE|DELETE", sql) else None
        )

    def untrace(driver, *_):
        driver.set_trace_callback(None)

    event.listen(Pool, "checkout", trace)
    event.listen(Pool, "checkin", untrace)
    yield ran
    event.remove(Pool, "checkout", trace)
    event.remove(Pool, "checkin", untrace)


def plan(engine, sql):
    """The steps of a statement, triggers included, without the numbers of its subqueries."""
    with engine.connect() as connection:
        rows = connection.connection.dbapi_connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
    return {re.sub(r" (\(subquery-\d+\)|\d+)$", "", step) for *_, step in rows}


# `check_integrity` reads everything, because that is what it is for.
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"check_integrity"}))
def test_operation(repository, engine, statements, name):
    """Nothing that an operation runs reads a whole table, or sorts."""
    known = prepared(repository)
    statements.clear()
    OPERATIONS[name].call(repository, known)
    ran = list(statements)
    assert ran or name in {"reading", "transaction"}
    steps = set().union(*(plan(engine, sql) for sql in ran))
    assert {step for step in steps if re.fullmatch(r"SCAN \w+|.*TEMP B-TREE.*", step)} <= SMALL | KNOWN.get(name, set())
