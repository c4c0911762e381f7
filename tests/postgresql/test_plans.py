"""How PostgreSQL finds the rows: no operation reads more of them because the table holds more."""

import pytest
from operations_table import OPERATIONS, prepared
from sqlalchemy import text

from kkt_buffer import ReceiptRepository, create_buffer_engine

MANY = 100_000
ENOUGH = 5_000  # rows, for any operation
# The first reads all, the second all that it deletes, the third all that wait, the fourth until it has found its page.
MORE = {"check_integrity", "prune", "seconds_until_due", "list_receipts"}

# Many delivered receipts and a long queue, which the planner knows of.
FILL = f"""
ALTER TABLE receipts DISABLE TRIGGER USER;
INSERT INTO receipts (
    id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, status, synced_at, hlc_server_time)
SELECT 'many-' || n, 'till-9', n, n, 0, '{{}}', CASE WHEN n % 4 = 0 THEN 'pending' ELSE 'synced' END,
    CASE WHEN n % 4 > 0 THEN n END, CASE WHEN n % 4 > 0 THEN n END
FROM generate_series(1, {MANY}) AS n;
ALTER TABLE receipts ENABLE TRIGGER USER;
INSERT INTO buffer_changes (pending, synced, hlc_local_time, hlc_logical_counter)
VALUES ({MANY // 4}, {MANY * 3 // 4}, {MANY}, 0);
ANALYZE receipts"""
# Rows of the table, and entries of its indexes, that were read so far, also by triggers and functions.
READ = """
SELECT seq_tup_read + COALESCE((
    SELECT SUM(idx_tup_read) FROM pg_stat_user_indexes AS i WHERE i.relid = t.relid), 0)::bigint
FROM pg_stat_user_tables AS t WHERE relid = 'receipts'::regclass"""


@pytest.fixture(scope="module")
def large_engine(server, migrated_schema):
    with migrated_schema.copy() as schema:
        engine = create_buffer_engine(server.url(schema=schema), pool_size=1, max_overflow=0)
        with engine.begin() as connection:
            for statement in FILL.split(";\n"):
                connection.execute(text(statement))
        yield engine
        engine.dispose()


def rows_read(engine):
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
    with engine.begin() as connection:
        return connection.execute(text(READ)).scalar_one()


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - MORE))
def test_operation(large_engine, name):
    repository = ReceiptRepository(large_engine)
    repository.set_config("buffer_capacity", MANY)
    known = prepared(repository)
    before = rows_read(large_engine)
    OPERATIONS[name].call(repository, known)
    assert rows_read(large_engine) - before < ENOUGH
