"""Reading a schema and its rows, and moving between revisions."""

import os
import re
import subprocess
import sys
from pathlib import Path

from alembic import command
from builders import NOON
from sqlalchemy import inspect, text

from kkt_buffer import (
    create_buffer_engine,
    migrate,
)

ROOT = Path(__file__).parents[2]

HEAD = migrate.revisions()[-1]

ALEMBIC = (str(Path(sys.executable).with_name("alembic")),)


def alembic(*arguments, cwd=ROOT, within=os.environ, **environment):
    """Run the `alembic` of this environment in the checkout, with these variables beside those `within`."""
    return subprocess.run(
        [*ALEMBIC, *map(str, arguments)],
        cwd=cwd,
        env={**within, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def objects(engine):
    """Each object of the schema with its SQL, white space and quotes aside."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        return {name: plain(sql) for name, sql in rows if name != "sqlite_sequence"}


def contents(engine):
    """Every row of every table, as {table: {key: row}}; the keys are the first columns."""
    with engine.connect() as connection:
        tables = {
            table: connection.execute(text(f"SELECT * FROM {table}")).mappings().all()
            for table in inspect(connection).get_table_names()
        }
    return {table: {next(iter(row.values())): dict(row) for row in rows} for table, rows in tables.items()}


def schema(path):
    engine = create_buffer_engine(path)
    try:
        return objects(engine)
    finally:
        engine.dispose()


def plain(sql):
    return re.sub(r"\s+", " ", str(sql)).replace('"', "").strip()


def checks(sql):
    """The CHECK constraints in the text of a table, up to the parenthesis that closes each."""
    found = []
    for start in re.finditer(r"CONSTRAINT \S+ CHECK \(", sql):
        depth, end = 1, start.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            end += 1
        found.append(sql[start.start() : end])
    return sorted(found)


def structure(engine):
    """What SQLite itself understands of the schema: columns, keys, references, indexes; and the text of the rest."""
    found = {}
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT type, name, sql FROM sqlite_master ORDER BY name")).all()
        for kind, name, sql in rows:
            if kind == "table" and not name.startswith(("sqlite_", "kkt_buffer_version")):
                for pragma in ("table_xinfo", "foreign_key_list", "index_list"):
                    # The first number tells the order, which ADD COLUMN changes.
                    lines = connection.exec_driver_sql(f"PRAGMA {pragma}({name})")
                    found[pragma, name] = sorted(str(tuple(line)[1:]) for line in lines)
                found["checks", name] = checks(plain(sql))
            elif kind == "index" and sql:
                keys = connection.exec_driver_sql(f"PRAGMA index_xinfo({name})")
                found[kind, name] = plain(sql), [tuple(key)[2:] for key in keys]
            elif sql and "kkt_buffer_version" not in name:
                found[kind, name] = plain(sql)
    return found


def upgrade_to(engine, revision):
    """Upgrade to a revision that is not the last one."""
    command.upgrade(migrate.alembic_config(engine), revision)


def downgrade_to(engine, revision):
    command.downgrade(migrate.alembic_config(engine), revision)


def state(engine):
    """The row of `buffer_state`."""
    return contents(engine)["buffer_state"][1]


def state_of_rows(engine):
    """What the row of `buffer_state` should be, from the rows of the other tables."""
    with engine.connect() as connection:
        statuses = dict(list(connection.execute(text("SELECT status, COUNT(*) FROM receipts GROUP BY status"))))
        open_letters = connection.scalar(text("SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL"))
        last_synced_at = connection.scalar(text("SELECT MAX(synced_at) FROM receipts"))
        stamps = connection.execute(text("SELECT hlc_local_time, hlc_logical_counter FROM receipts")).all()
    local_time, counter = max(map(tuple, stamps), default=(0, -1))
    return {
        "id": 1,
        **{status: statuses.get(status, 0) for status in ("pending", "syncing", "synced", "failed")},
        "open_dead_letters": open_letters,
        "hlc_local_time": local_time,
        "hlc_logical_counter": counter,
        "last_synced_at": last_synced_at,
    }


# A buffer as the release of 0001 left it: every status, dead letters open and closed, more than its capacity allows.
DOCUMENT = '{ "user" : "ООО \\"Ромашка\\"",  "totalSum":6490 }'

RECEIPT = f"""\
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, retry_count, last_error,
    changed_at) VALUES ('%s', 'till-1', {NOON}, {NOON}, %d, '{DOCUMENT}', %d, %s, %s)"""


SYNCED = f"UPDATE receipts SET status = 'synced', synced_at = {NOON + 9}, hlc_server_time = {NOON + 8} WHERE id = '%s'"

LETTER = f"""\
INSERT INTO dlq (id, original_receipt_id, failed_at, reason, fiscal_doc, retry_attempts, last_error)
    VALUES ('letter of %s', '%s', {NOON + 5}, 'rejected', '{DOCUMENT}', 2, 'no answer')"""


CLOSED = f"""\
UPDATE dlq SET resolved_at = {NOON + 9}, resolved_by = 'delivery', resolution_reason = 'the receipt was delivered'
    WHERE original_receipt_id = '%s'"""


ROWS_OF_0001 = [
    RECEIPT % ("pending", 0, 0, "NULL", "NULL"),
    RECEIPT % ("retried", 1, 3, "'no answer'", str(NOON + 3)),
    RECEIPT % ("syncing", 2, 1, "'no answer'", str(NOON + 1)),
    "UPDATE receipts SET status = 'syncing' WHERE id = 'syncing'",
    RECEIPT % ("synced", 3, 0, "NULL", "NULL"),
    SYNCED % "synced",
    RECEIPT % ("failed", 4, 2, "'no answer'", str(NOON + 5)),
    LETTER % ("failed", "failed"),
    "UPDATE receipts SET status = 'failed' WHERE id = 'failed'",
    RECEIPT % ("late", 5, 2, "'no answer'", str(NOON + 5)),
    LETTER % ("late", "late"),
    "UPDATE receipts SET status = 'failed' WHERE id = 'late'",
    CLOSED % "late",
    SYNCED % "late",
    f"INSERT INTO buffer_events (event_type, timestamp, metadata) VALUES ('circuit_opened', {NOON}, '{{\"n\": 5}}')",
    f"UPDATE config SET value = '2', updated_at = {NOON} WHERE key = 'buffer_capacity'",
    f"INSERT INTO config VALUES ('shop', 'Ромашка', {NOON})",
]


def fill_0001(engine):
    """The rows of a buffer of revision 0001 in the middle of its work."""
    with engine.begin() as connection:
        for statement in ROWS_OF_0001:
            connection.exec_driver_sql(statement)
