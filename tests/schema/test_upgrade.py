"""An upgrade arrives at the schema of the models, in one transaction, beside whatever else is in the file."""

import contextlib
import logging
import shutil
import sys

import pytest
from alembic import command
from builders import run_python
from predecessor import driver
from schema.helpers import HEAD, objects, structure
from sqlalchemy import inspect, text

from kkt_buffer import (
    BufferBusyError,
    SchemaError,
    check,
    current,
    metadata,
    migrate,
    upgrade,
)
from kkt_buffer.backend import READ_ONLY
from kkt_buffer.columns import ONLY_ON
from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.drift import differences
from kkt_buffer.migrate import server_statements
from kkt_buffer.sqlite.schema import SQLITE_TRIGGERS, SQLITE_VIEWS


class TestUpgrade:
    def test_is_what_the_models_say(self, memory_engine, opened):
        """The migrations arrive at what the models and `schema` make by themselves, object by object."""
        modelled = opened(":memory:")
        with modelled.begin() as connection:
            here = [table for table in metadata.sorted_tables if table.info.get(ONLY_ON) != "postgresql"]
            metadata.create_all(connection, tables=here)
            for sql in (*SQLITE_VIEWS.values(), *SQLITE_TRIGGERS.values()):
                connection.exec_driver_sql(sql)
        assert structure(modelled) == structure(memory_engine)
        with modelled.connect() as connection:
            assert [] == differences(connection, server_statements)
        modelled.dispose()

    def test_twice(self, engine, monkeypatch):
        """On a database that is up to date nothing is done, and Alembic is not even imported."""
        monkeypatch.setitem(sys.modules, "alembic", None)
        upgrade(engine)
        assert current(engine) == migrate.revisions()[-1]

    def test_defaults(self, engine):
        """The settings of the first migration are those that the code falls back to."""
        with engine.connect() as connection:
            rows = dict(list(connection.execute(text("SELECT key, value FROM config"))))
        defaults = {key: str(rule.default) for key, rule in CONFIG_RULES.items()}
        assert {"version": "1.0.0", "release": migrate.release()} | defaults == rows

    def test_logging_is_left_alone(self, tmp_path):
        """A library does not configure its host's logging, nor print."""
        program = """
            import logging, sys
            logging.basicConfig(level=logging.ERROR, format="host %(message)s")
            before = list(logging.root.handlers)
            import kkt_buffer
            kkt_buffer.upgrade(kkt_buffer.create_buffer_engine(sys.argv[1]))
            assert logging.root.handlers == before
            assert logging.getLogger("host").isEnabledFor(logging.ERROR)
        """
        assert run_python(program, tmp_path / "buffer.db").stdout == ""

    # Runs `upgrade` in a host that logs everything; prints what came from Alembic, and what from us.
    LOGGING_HOST = """
        import logging, sys
        lines = []
        class Handler(logging.Handler):
            def emit(self, record):
                lines.append((record.name.partition(".")[0], record.getMessage()))
        logging.basicConfig(level=logging.DEBUG, handlers=[Handler()])
        for name in ("alembic", "alembic.runtime.migration"):
            logging.getLogger(name).setLevel(logging.DEBUG)
        import kkt_buffer
        engine = kkt_buffer.create_buffer_engine(sys.argv[1])
        try:
            kkt_buffer.check(engine)  # refused: there is no schema yet
        except kkt_buffer.SchemaError:
            kkt_buffer.upgrade(engine)
        engine.dispose()
        print(*(message for name, message in lines if name == "alembic"), sep="|")
        print(*(message for name, message in lines if name == "kkt_buffer" and "schema" in message))
        logging.getLogger("alembic.runtime.migration").info("of the host")
        print(lines[-1][1])
    """

    def test_alembic_is_silent(self, tmp_path):
        """A host that logs everything reads one line of ours, none of Alembic's, and its own Alembic as before."""
        done = run_python(self.LOGGING_HOST, tmp_path / "buffer.db")
        assert ["", f"upgraded the schema from none to {HEAD}", "of the host"] == done.stdout.splitlines()

    @pytest.mark.parametrize("options", [{"shop": 1}, {READ_ONLY: True}])
    def test_engine_with_options(self, path, tmp_path, opened, options):
        """An engine with execution options of the host, of a read-only one too, is upgraded like any other."""
        engine = opened(tmp_path / "new.db")
        upgrade(engine.execution_options(**options))
        check(engine)
        # In the file itself, so that a copy without the WAL has the schema.
        copy = shutil.copy(tmp_path / "new.db", tmp_path / "copy.db")
        assert current(opened(copy)) == HEAD

    def test_all_or_nothing(self, tmp_path, monkeypatch, opened):
        """A migration that fails leaves the database as it was, without even a version table."""
        engine = opened(tmp_path / "buffer.db")
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE buffer_counts (host TEXT)"))
        failed = f"the upgrade to schema {HEAD} failed and was rolled back; .*buffer_counts already exists"
        with pytest.raises(SchemaError, match=failed):
            upgrade(engine)
        assert list(objects(engine)) == ["buffer_counts"]

    def test_beside_a_host(self, tmp_path, opened):
        """The application's own Alembic version and tables in the same database are not touched, nor minded."""
        engine = opened(tmp_path / "buffer.db")
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE alembic_version (version_num TEXT)"))
            connection.execute(text("INSERT INTO alembic_version VALUES ('f00d')"))
            connection.execute(text("CREATE TABLE goods (id INTEGER PRIMARY KEY, name TEXT)"))
        upgrade(engine)
        check(engine)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "f00d"

    def test_foreign_keys(self, path, file_engine, caplog):
        """A reference that was broken before is told, and does not stand in the way."""
        with file_engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
            connection.execute(text("CREATE TABLE host (receipt_id TEXT REFERENCES receipts (id))"))
            connection.execute(text("INSERT INTO host VALUES ('gone')"))
            connection.execute(text("DELETE FROM kkt_buffer_version"))
            connection.execute(text("DROP VIEW v_buffer_status"))
            for table in ("buffer_state", "config", "buffer_events", "dlq", "receipts"):
                connection.execute(text(f"DROP TABLE {table}"))
            connection.commit()
        file_engine.dispose()
        with caplog.at_level(logging.WARNING, logger="kkt_buffer.migrations"):
            upgrade(file_engine)
        assert "foreign keys were violated before the migration" in caplog.text


class TestLocked:
    """Another process has the file locked; it may be upgrading it."""

    @pytest.fixture
    def locked(self, tmp_path, opened):
        """A new buffer that is locked, and how to unlock it."""
        engine = opened(tmp_path / "buffer.db", busy_timeout=0.05)
        with contextlib.closing(driver.connect(tmp_path / "buffer.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield engine, other
        engine.dispose()

    def test_waits(self, locked, caplog, monkeypatch):
        engine, other = locked
        rolled_back = []

        def run(*arguments):
            if "waiting for the process" in caplog.text and not rolled_back:
                rolled_back.append(other.execute("ROLLBACK"))
            original(*arguments)

        original = command.upgrade
        monkeypatch.setattr(command, "upgrade", run)
        upgrade(engine)
        assert rolled_back
        check(engine)

    def test_another_was_first(self, tmp_path, opened, caplog, monkeypatch):
        """What another process has done while this one waited is not reported as its own work."""
        engine = opened(tmp_path / "buffer.db")

        def run(config, target):
            original(migrate.alembic_config(opened(tmp_path / "buffer.db")), target)
            original(config, target)

        original = command.upgrade
        monkeypatch.setattr(command, "upgrade", run)
        with caplog.at_level(logging.INFO, logger="kkt_buffer"):
            upgrade(engine)
        assert "upgraded the schema" not in caplog.text
        check(engine)

    def test_gives_up(self, locked, monkeypatch):
        engine, _ = locked
        monkeypatch.setattr(migrate, "UPGRADE_TIMEOUT_SECONDS", 0)
        with pytest.raises(BufferBusyError, match="kept"):
            upgrade(engine)


def test_broken_references_are_refused(tmp_path, monkeypatch, opened):
    """A migration that would break a reference is rolled back."""
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    (versions.parent / "env.py").symlink_to(migrate.SCRIPTS / "env.py")
    (versions / "0001_bad.py").write_text(
        """
from alembic import op
revision, down_revision = "0001", None
def upgrade():
    op.execute("CREATE TABLE child (id INTEGER REFERENCES parent (id))")
    op.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    op.execute("INSERT INTO child VALUES (1)")
"""
    )
    monkeypatch.setattr(migrate, "SCRIPTS", tmp_path / "migrations")
    engine = opened(tmp_path / "buffer.db")
    with pytest.raises(SchemaError, match="failed and was rolled back; .*the migration would break foreign keys"):
        upgrade(engine)
    assert inspect(engine).get_table_names() == []
