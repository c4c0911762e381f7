"""
How the migrations run: every step in one transaction, on a connection of its own.

`alembic -x db=PATH_OR_URL …` names the database; without it BUFFER_DB_PATH does, then `sqlalchemy.url` in
alembic.ini. From a program, `kkt_buffer.upgrade(engine)` passes its engine.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from logging.config import fileConfig
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import ReceiptBufferError
from kkt_buffer.migrate import VERSION_TABLE
from kkt_buffer.models import Base
from kkt_buffer.schema import buffer_counts

logger = logging.getLogger("kkt_buffer.migrations")

# `schema` adds the counters to the tables of the models.
OUR_TABLES = {*Base.metadata.tables, buffer_counts.name}

# Autogenerate cannot compare these, and says so each time.
EXPRESSION_INDEXES = ("idx_receipts_status", "idx_receipts_pos_id")


def _is_ours(name: str | None, kind: str, parents: Mapping[Any, str | None]) -> bool:
    """A host application may keep its tables in the same database; they are no business of ours."""
    table = name if kind == "table" else parents.get("table_name")
    return table is None or table in OUR_TABLES


def _violations(connection: Connection) -> set[tuple[object, ...]]:
    return {tuple(row) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")}


def _migrate(engine: Engine) -> None:
    with engine.connect() as connection:
        # A connection of its own, thrown away afterwards: with foreign keys on, rebuilding a table deletes the rows
        # that refer to it, and the setting cannot be changed inside a transaction.
        connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
        connection.detach()
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            version_table=VERSION_TABLE,
            include_name=_is_ours,
            render_as_batch=True,
            transactional_ddl=True,
            transaction_per_migration=False,
        )
        with context.begin_transaction():
            before = _violations(connection)
            if before:
                logger.warning("foreign keys were violated before the migration: %s", sorted(before, key=str))
            with warnings.catch_warnings():
                for index in EXPRESSION_INDEXES:
                    warnings.filterwarnings("ignore", f"(?s).*expression-based index '?{index}'?", Warning)
                context.run_migrations()
            broken = _violations(connection) - before
            if broken:
                raise CommandError(f"the migration would break foreign keys: {sorted(broken, key=str)}; rolled back")


def _run() -> None:
    engine = context.config.attributes.get("engine")
    if engine is not None:
        _migrate(engine)
        return
    # From the command line: only here is logging ours to configure.
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
