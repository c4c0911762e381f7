"""
The objects of the schema, as the server describes them: those of the database, and those that this release expects.

The expected ones are created as temporary objects and described by the same queries, so that nothing is kept twice.
"""

import re

from sqlalchemy import Connection, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from kkt_buffer.backend import READ_ONLY, Objects
from kkt_buffer.columns import MORE_COLUMNS, ONLY_ON, WHERE
from kkt_buffer.models import metadata
from kkt_buffer.postgresql.schema import FUNCTIONS, VIEWS, statements

TABLES = [table for table in metadata.sorted_tables if table.info.get(ONLY_ON, "postgresql") == "postgresql"]

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
WHERE relname = ANY (:views) AND relkind = 'v'
UNION ALL
SELECT 'function', proname::text, pg_get_functiondef(pg_proc.oid) FROM pg_proc JOIN here ON pronamespace = here.oid
WHERE proname = ANY (:functions)"""
)


def objects(connection: Connection) -> tuple[Objects, Objects]:
    """The objects of the schema, expected and found."""
    schema = connection.scalar(text("SELECT quote_ident(current_schema())"))
    found = _described(connection, str(schema))
    with connection.engine.connect().execution_options(**{READ_ONLY: False}) as scratch:
        expected = _expected(scratch)
        scratch.rollback()
    return expected, {
        (kind, name): sql for (kind, name), sql in found.items() if kind == "index" or (kind, name) in expected
    }


def _expected(connection: Connection) -> Objects:
    connection.execute(text("CREATE TEMPORARY TABLE kkt_buffer_scratch ()"))
    schema = str(connection.scalar(text("SELECT pg_my_temp_schema()::regnamespace")))
    connection.execute(text("SET LOCAL search_path = pg_temp"))
    for sql in (*tables(), *statements(schema)):
        connection.exec_driver_sql(sql.replace("%", "%%"))
    return _described(connection, schema)


def tables() -> list[str]:
    """The statements that create the tables and their indexes."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    created = []
    for table in TABLES:
        created.append(str(CreateTable(table).compile(dialect=dialect)))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            sql = str(CreateIndex(index).compile(dialect=dialect))
            more, where = index.info.get(MORE_COLUMNS, ()), index.info.get(WHERE)
            created.append(
                sql[:-1] + "".join(f", {name}" for name in more) + ")" + (f" WHERE {where}" if where else "")
            )
    return created


def _described(connection: Connection, schema: str) -> Objects:
    rows = connection.execute(
        _DESCRIBED,
        {
            "schema": schema,
            "tables": [table.name for table in TABLES],
            "views": list(VIEWS),
            "functions": list(FUNCTIONS),
        },
    )
    # Without the name of the schema, and without line breaks.
    quoted, bare = re.escape(schema), re.escape(schema.strip('"'))
    name_of_it = re.compile(rf"(?:{quoted}|pg_temp)\.|(?<=SET search_path TO )'?{bare}'?(?=, )")
    return {(kind, name): re.sub(r"\s+", " ", name_of_it.sub("", sql)) for kind, name, sql in rows}
