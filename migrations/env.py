"""
Run the migrations: all of them in one transaction, on a separate connection.

The database is given by `alembic -x db=PATH_OR_URL …`, else by BUFFER_DB_PATH, else by `sqlalchemy.url` in alembic.ini.
From a program, `kkt_buffer.upgrade(engine)` passes its engine.
"""

import logging
import os
from collections.abc import Mapping
from logging.config import fileConfig
from typing import Any

from alembic import context
from alembic.operations.ops import DowngradeOps, ExecuteSQLOp, MigrationScript, UpgradeOps
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from kkt_buffer.backend import backend_of
from kkt_buffer.columns import ONLY_ON
from kkt_buffer.drift import Difference, differences
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import ReceiptBufferError
from kkt_buffer.migrate import RELEASE_KEY, current, release, server_statements
from kkt_buffer.models import VERSION_TABLE, metadata

logger = logging.getLogger("kkt_buffer.migrations")


def _is_ours(name: str | None, kind: str, parents: Mapping[Any, str | None]) -> bool:
    """Whether a table or column belongs to the buffer, and not to a host application or another program."""
    table = name if kind == "table" else parents.get("table_name")
    if kind == "column" and table in metadata.tables:
        return str(name) in metadata.tables[str(table)].columns
    return table is None or table in metadata.tables


def _is_here(item: Any, _name: str | None, kind: str, *_: object) -> bool:  # noqa: ANN401 (of any kind)
    """Whether this engine has a table at all."""
    return kind != "table" or item.info.get(ONLY_ON) in {None, context.get_bind().dialect.name}


def _none(*_: object) -> bool:
    """False for everything: Alembic misreads types and partial indexes of PostgreSQL. `drift` compares them."""
    return False


def _add_what_autogenerate_misses(ctx: Any, _revision: Any, directives: list[MigrationScript]) -> None:  # noqa: ANN401
    """Add the differences of triggers, views, checks and partial indexes, for `alembic check` and new migrations."""
    [script] = directives
    [up], [down] = script.upgrade_ops_list, script.downgrade_ops_list
    found_already = str(up.as_diffs())
    for difference in differences(ctx.connection, server_statements):
        if difference.kind == "table" and not difference.constraints and f"'{difference.name}'" in found_already:
            continue  # only its columns differ, and autogenerate has found that
        if difference.kind == "table" or f"'{difference.name}'" not in found_already:
            _add(difference, up, down)


def _add(difference: Difference, up: UpgradeOps, down: DowngradeOps) -> None:
    kind, name, expected, found = difference
    if kind == "table":
        up.ops.append(ExecuteSQLOp(f"-- write this by hand: {difference}"))
        return
    drop = f"DROP {kind.upper()} {name}"
    up.ops += [ExecuteSQLOp(sql) for sql in (drop if found else None, expected) if sql]
    # At the beginning: a trigger may use a column that a later step drops.
    down.ops[:0] = [ExecuteSQLOp(sql) for sql in (drop if expected else None, found) if sql]


def _note_release(connection: Connection, unix_time: str) -> None:
    """Record the release that made this schema; an older release names it when it refuses the database."""
    if inspect(connection).has_table("config"):
        connection.execute(
            text(
                f"INSERT INTO config (key, value, updated_at) VALUES (:key, :value, {unix_time})"
                " ON CONFLICT (key) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at"
                " WHERE config.value <> excluded.value"
            ),
            {"key": RELEASE_KEY, "value": release()},
        )


def _migrate(engine: Engine) -> None:
    current(engine)  # raises if a newer release made the database
    steps: list[object] = []
    backend = backend_of(engine)
    with backend.migrating(engine) as connection:
        context.configure(
            connection=connection,
            target_metadata=metadata,
            version_table=VERSION_TABLE,
            include_name=_none if backend.is_server else _is_ours,
            include_object=_none if backend.is_server else _is_here,
            transactional_ddl=True,
            transaction_per_migration=False,
            compare_server_default=True,
            process_revision_directives=_add_what_autogenerate_misses,
            on_version_apply=lambda step, **_: steps.append(step),
        )
        with context.begin_transaction():
            before = backend.violations(connection)
            if before:
                logger.warning("foreign keys were violated before the migration: %s", sorted(before, key=str))
            context.run_migrations()
            if steps:
                _note_release(connection, backend.unix_time)
            broken = backend.violations(connection) - before
            if broken:
                raise CommandError(f"the migration would break foreign keys: {sorted(broken, key=str)}; rolled back")
    # Read by `kkt_buffer.upgrade`: another process may have run the migrations while this one waited.
    context.config.attributes["has_migrated"] = bool(steps)


def _run() -> None:
    engine = context.config.attributes.get("engine")
    if engine is not None:
        _migrate(engine)
        return
    # Configure logging only for the command line: in a program that is up to the host.
    if context.config.config_file_name is not None:
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    target = (
        context.get_x_argument(as_dictionary=True).get("db")
        or os.environ.get("BUFFER_DB_PATH")
        or context.config.get_main_option("sqlalchemy.url", "")
    )
    try:
        engine = create_buffer_engine(target)
        try:
            _migrate(engine)
        finally:
            engine.dispose()
    except (ReceiptBufferError, SQLAlchemyError, ValueError) as error:
        raise CommandError(str(error)) from error


if context.is_offline_mode():
    raise CommandError("a script of SQL cannot migrate SQLite safely; run the upgrade against the database itself")
_run()
