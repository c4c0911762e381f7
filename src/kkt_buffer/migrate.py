"""
The schema of a database: `upgrade` it to this release, read its `current` revision, `check` it object by object.

The migration scripts are the same ones that `alembic upgrade` runs in a checkout. Alembic is imported only when a
migration has to run.
"""

import importlib.metadata
import io
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from kkt_buffer.backend import READ_ONLY, backend_of
from kkt_buffer.errors import BufferBusyError, SchemaError
from kkt_buffer.models import VERSION_TABLE

if TYPE_CHECKING:
    from alembic.config import Config

    from kkt_buffer.drift import Difference

logger = logging.getLogger(__name__)

RELEASE_KEY = "release"  # key in `config`: the release that last migrated the database

# Another process may be upgrading the same file, and a large one takes minutes.
UPGRADE_TIMEOUT_SECONDS = 300

_PACKAGE = Path(__file__).parent
# In a wheel the scripts are inside the package; in a checkout they are in the top folder.
SCRIPTS = next(folder for folder in (_PACKAGE / "migrations", _PACKAGE.parents[1] / "migrations") if folder.is_dir())


def revisions() -> tuple[str, ...]:
    """The revisions that this release knows, oldest first. The file names contain them, so no file is read."""
    names = (re.match(r"\d{4}(?=_\w+\.py$)", path.name) for path in (SCRIPTS / "versions").iterdir())
    return tuple(sorted(name.group() for name in names if name))


def upgrade(engine: Engine) -> None:
    """
    Bring the database to the schema of this release: all of it, or nothing. Safe when several processes do it at once.

    A file of the hand-written `sqlite3` version is adopted, after a backup is made in the same folder.

    Raises `SchemaError` if a newer release made the database, or if the upgrade fails; the database is unchanged then.
    """
    found = current(engine)
    if found == revisions()[-1]:
        return
    with _silent_alembic():
        has_migrated = _upgrade(engine)
    if has_migrated:
        logger.info("upgraded the schema from %s to %s", found or "none", revisions()[-1])
    backend_of(engine).upgraded(engine)


def _upgrade(engine: Engine) -> bool:
    """Run the missing migrations; False if another process has run them meanwhile."""
    from alembic import command  # noqa: PLC0415 (costs as much as all of SQLAlchemy, and is rarely needed)
    from alembic.util import CommandError  # noqa: PLC0415

    config = alembic_config(engine)
    deadline = time.monotonic() + UPGRADE_TIMEOUT_SECONDS
    while True:
        try:
            command.upgrade(config, "head")
        except BufferBusyError:
            if time.monotonic() > deadline:
                raise
            logger.warning("waiting for the process that has the database locked; it may be running an upgrade")
        except (CommandError, SQLAlchemyError, backend_of(engine).driver.Error) as error:
            reason = str(getattr(error, "orig", None) or error)  # without the lines that SQLAlchemy adds
            if re.search("already exists|duplicate column name", reason):
                reason += ". The object with this name is not part of the buffer: rename it, and upgrade again."
            raise SchemaError(
                f"the upgrade to schema {revisions()[-1]} failed and was rolled back; the database is as it was. "
                f"{reason}"
            ) from error
        else:
            return bool(config.attributes["has_migrated"])


def current(engine: Engine) -> str | None:
    """
    The revision of the database; None if it was never migrated by this package.

    Raises `SchemaError` if this release does not know the revision.
    """
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        inspector = inspect(connection)
        # On a server, a later schema of search_path may have a buffer too.
        if not inspector.has_table(VERSION_TABLE, schema=inspector.default_schema_name):
            return None
        revision = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 (our own constant)
        if revision is not None and revision not in revisions():
            raise SchemaError(
                f"the database has schema {revision}, made by {_release_of(connection)}; this is kkt-buffer "
                f"{release()}, which knows schemas up to {revisions()[-1]}. Nothing was changed. Install that release "
                "or a newer one."
            )
    return None if revision is None else str(revision)


def release() -> str:
    """The version of this package."""
    return importlib.metadata.version("kkt-buffer")


def _release_of(connection: Connection) -> str:
    try:
        found = connection.scalar(text("SELECT value FROM config WHERE key = :key"), {"key": RELEASE_KEY})
    except (SchemaError, SQLAlchemyError):  # a later release may have changed that table
        found = None
    return f"kkt-buffer {found}" if found else "a newer release"


def require(engine: Engine) -> None:
    """Raise `SchemaError` unless the database has the schema of this release."""
    found = current(engine)
    if found != revisions()[-1]:
        what = "no tables of a buffer" if found is None else f"the old schema {found}"
        if found is None and stage(engine) != "none":
            what = f"the schema of {stage(engine)}"
        raise SchemaError(
            f"{backend_of(engine)} has {what} where this release needs schema {revisions()[-1]}. Nothing was changed. "
            "Run `kkt-buffer upgrade PATH` (PATH may be a URL), or `upgrade(engine)`."
        )


def stage(engine: Engine) -> str:
    """The schema of the database for messages: its revision, "the sqlite3 version", or "none"."""
    found = current(engine)
    if found is not None:
        return found
    with _silent_alembic():
        from alembic.util import load_python_file  # noqa: PLC0415 (rarely needed)
    is_predecessor = load_python_file(SCRIPTS, "adoption.py").is_predecessor
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        return "the sqlite3 version" if is_predecessor(connection) else "none"


def differences(engine: Engine) -> "list[Difference]":
    """Every table, index, view and trigger that differs from the models or `schema`. Raises `SchemaError`."""
    from kkt_buffer import drift  # noqa: PLC0415 (rarely needed)

    require(engine)
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        return drift.differences(connection, server_statements)


def server_statements(schema: str) -> list[str]:
    """The statements by which the migrations, all of them, make a schema with this name on a server."""
    with _silent_alembic():
        from alembic.util import load_python_file  # noqa: PLC0415 (rarely needed)
    scripts = [load_python_file(path.parent, path.name) for path in sorted((SCRIPTS / "versions").glob("[0-9]*.py"))]
    return [
        sql for script in scripts if hasattr(script, "server_statements") for sql in script.server_statements(schema)
    ]


def check(engine: Engine) -> None:
    """Raise `SchemaError` if a table, index, view or trigger differs from the models or `schema`; names them all."""
    if found := differences(engine):
        advice = "Undo what was changed by hand: drop an index that was added, create again what is missing."
        if any(difference.is_damage for difference in found):
            advice = "Stop every program that uses it, keep a copy of all its files, and restore a backup."
        raise SchemaError(
            "the schema of the database is not that of this release: " + "; ".join(map(str, found)) + ". Nothing was "
            f"changed. {advice}"
        )


def alembic_config(engine: Engine) -> "Config":
    """The Alembic configuration that runs the migrations of this package on this engine."""
    from alembic.config import Config  # noqa: PLC0415

    config = Config(stdout=io.StringIO())  # a library prints nothing
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.attributes["engine"] = engine
    return config


# The loggers that Alembic uses while it is imported and while it upgrades.
_ALEMBIC_LOGGERS = ("alembic.runtime.migration", "alembic.runtime.plugins")


class _Silence(threading.local):
    """A log filter, switched on per thread: the host application may use Alembic in other threads."""

    on = False

    def filter(self, _record: logging.LogRecord) -> bool:
        return not self.on


_silence = _Silence()


@contextmanager
def _silent_alembic() -> Iterator[None]:
    """Keep Alembic's messages out of the log of the host application."""
    for name in _ALEMBIC_LOGGERS:
        logging.getLogger(name).addFilter(_silence)
    _silence.on = True
    try:
        yield
    finally:
        _silence.on = False
