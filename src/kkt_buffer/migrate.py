"""
Bringing a database to the schema of this release: `upgrade`, `current`, `check`.

The scripts are those that `alembic upgrade` runs in a checkout. Alembic itself is imported only when there is
something to do.
"""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from kkt_buffer.engine import READ_ONLY
from kkt_buffer.errors import SchemaError

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "kkt_buffer_version"

_PACKAGE = Path(__file__).parent
# A wheel carries the scripts inside the package; a checkout has them at its top.
SCRIPTS = next(folder for folder in (_PACKAGE / "migrations", _PACKAGE.parents[1] / "migrations") if folder.is_dir())


def revisions() -> tuple[str, ...]:
    """The revisions that this release knows, oldest first. The files are numbered, so none needs to be read."""
    names = (re.match(r"\d{4}(?=_\w+\.py$)", path.name) for path in (SCRIPTS / "versions").iterdir())
    return tuple(sorted(name.group() for name in names if name))


def upgrade(engine: Engine) -> None:
    """
    Bring the database to the schema of this release: all of it, or nothing. Safe when several processes do it at once.

    Raises `SchemaError` if a newer release made the database, or if the upgrade fails; it is as it was then.
    """
    if current(engine) == revisions()[-1]:
        return
    from alembic import command  # noqa: PLC0415 (costs as much as all of SQLAlchemy, and is rarely needed)
    from alembic.util import CommandError  # noqa: PLC0415

    try:
        command.upgrade(_config(engine), "head")
    except (CommandError, SQLAlchemyError) as error:
        reason = getattr(error, "orig", None) or error  # the driver's own words, without SQLAlchemy's many lines
        raise SchemaError(
            f"the upgrade to schema {revisions()[-1]} failed and was rolled back; the database is as it was. {reason}"
        ) from error


def current(engine: Engine) -> str | None:
    """
    The revision of the database; None if it has no schema of ours.

    Raises `SchemaError` if this release does not know the revision.
    """
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        if not inspect(connection).has_table(VERSION_TABLE):
            return None
        revision = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 (our own constant)
    if revision is not None and revision not in revisions():
        raise SchemaError(
            f"the database has schema {revision}, which a newer release made; this one knows up to {revisions()[-1]}. "
            "Nothing was touched. Install the newer release of kkt-buffer."
        )
    return None if revision is None else str(revision)


def require(engine: Engine) -> None:
    """Raise `SchemaError` unless the database has the schema of this release."""
    found = current(engine)
    if found != revisions()[-1]:
        raise SchemaError(
            f"the database has {'no schema' if found is None else f'the old schema {found}'} where this release needs "
            f"{revisions()[-1]}. Nothing was touched. Run `python -m kkt_buffer upgrade PATH`, or `upgrade(engine)`."
        )


def check(engine: Engine) -> None:
    """Raise `SchemaError` if the schema differs from what the models say, as `alembic check` does."""
    from alembic import command  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    require(engine)
    try:
        command.check(_config(engine))
    except CommandError as error:
        raise SchemaError(f"the schema of the database is not that of this release: {error}") from error


def _config(engine: Engine) -> "Config":
    from alembic.config import Config  # noqa: PLC0415

    config = Config(stdout=io.StringIO())  # a library prints nothing
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.attributes["engine"] = engine
    return config
