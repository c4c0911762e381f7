"""
The objects of the schema, as the server describes them: those of the database, and those that this release expects.

The expected ones are created as temporary objects and described by the same queries, so that nothing is kept twice.
"""

import re
from collections.abc import Callable

from sqlalchemy import Connection, text

from kkt_buffer.backend import READ_ONLY, Objects
from kkt_buffer.columns import ONLY_ON
from kkt_buffer.models import VERSION_TABLE, metadata
from kkt_buffer.postgresql.connection import SCRATCH

_DESCRIBED = text(
    """\
WITH here AS (SELECT CAST(:schema AS regnamespace)::oid AS oid), tables AS (
    SELECT pg_class.* FROM pg_class JOIN here ON relnamespace = here.oid WHERE relname = ANY (:tables) AND relkind = 'r'
)
SELECT 'table', relname::text,
    CASE relpersistence WHEN 'u' THEN 'CREATE UNLOGGED TABLE ' ELSE 'CREATE TABLE ' END || relname || ' ('
    || concat_ws(', ',
        (SELECT string_agg(concat_ws(' ', quote_ident(attname), format_type(atttypid, atttypmod),
            CASE WHEN attcollation <> typcollation THEN 'COLLATE ' || collname END,
            'DEFAULT ' || pg_get_expr(adbin, adrelid), CASE WHEN attnotnull THEN 'NOT NULL' END), ', ' ORDER BY attnum)
        FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
            LEFT JOIN pg_collation ON pg_collation.oid = attcollation
            LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = tables.oid AND attnum > 0 AND NOT attisdropped),
        (SELECT string_agg(format('CONSTRAINT %s %s', conname, pg_get_constraintdef(oid, true)), ', ' ORDER BY conname)
        FROM pg_constraint WHERE conrelid = tables.oid AND contype IN ('c', 'f', 'p', 'u')))
    || ')' || COALESCE(' WITH ' || reloptions::text, '')
FROM tables
UNION ALL
SELECT 'index', pg_class.relname::text,
    pg_get_indexdef(indexrelid, 0, true) || CASE WHEN indisvalid THEN '' ELSE ' INVALID' END
FROM pg_index JOIN tables ON indrelid = tables.oid JOIN pg_class ON pg_class.oid = indexrelid
WHERE NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('p', 'u'))
UNION ALL
SELECT 'trigger', tgname::text,
    pg_get_triggerdef(pg_trigger.oid, true) || CASE WHEN tgenabled = 'O' THEN '' ELSE ' OFF' END
FROM pg_trigger JOIN tables ON tgrelid = tables.oid WHERE NOT tgisinternal
UNION ALL
SELECT 'view', relname::text, pg_get_viewdef(pg_class.oid, true) FROM pg_class JOIN here ON relnamespace = here.oid
WHERE relname IN ('buffer_state', 'v_buffer_status') AND relkind = 'v'
UNION ALL
SELECT 'function', proname::text, pg_get_functiondef(pg_proc.oid) FROM pg_proc JOIN here ON pronamespace = here.oid
WHERE proname LIKE 'kkt\\_%'"""
)


def objects(connection: Connection, made_by: Callable[[str], list[str]]) -> tuple[Objects, Objects]:
    """The objects of the schema: those that the statements `made_by(schema)` make, and those of the database."""
    found = _described(connection, str(connection.scalar(text("SELECT quote_ident(current_schema())"))))
    with connection.engine.connect().execution_options(**{READ_ONLY: False, SCRATCH: True}) as scratch:
        scratch.execute(text("CREATE TEMPORARY TABLE kkt_buffer_scratch ()"))
        schema = str(scratch.scalar(text("SELECT pg_my_temp_schema()::regnamespace")))
        scratch.execute(text("SET LOCAL search_path = pg_temp"))
        metadata.tables[VERSION_TABLE].create(scratch)
        for sql in made_by(schema):
            scratch.exec_driver_sql(sql.replace("%", "%%"))
        expected = _described(scratch, schema)
        scratch.rollback()
    return expected, {key: sql for key, sql in found.items() if key[0] == "index" or key in expected}


def _described(connection: Connection, schema: str) -> Objects:
    rows = connection.execute(
        _DESCRIBED,
        {
            "schema": schema,
            "tables": [name for name, table in metadata.tables.items() if table.info.get(ONLY_ON) != "sqlite"],
        },
    )
    # Without the name of the schema, and without line breaks.
    quoted, bare = re.escape(schema), re.escape(schema.strip('"'))
    name_of_it = re.compile(rf"(?:{quoted}|pg_temp)\.|(?<=SET search_path TO )'?{bare}'?(?=, )")
    return {(kind, name): re.sub(r"\s+", " ", name_of_it.sub("", sql)) for kind, name, sql in rows}
