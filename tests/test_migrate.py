"""How the schema comes, is recognised, and goes."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import a_receipt, everything, run_python
from sqlalchemy import inspect, text
from sqlalchemy.schema import CreateIndex, CreateTable

from kkt_buffer import (
    Base,
    ReceiptRepository,
    SchemaError,
    check,
    create_buffer_engine,
    current,
    migrate,
    upgrade,
)
from kkt_buffer.models import CONFIG_RULES
from kkt_buffer.schema import SQLITE_TRIGGERS, SQLITE_VIEWS

ROOT = Path(__file__).parents[1]


def alembic(*arguments, cwd=ROOT, **environment):
    """Run the `alembic` of this environment in the checkout."""
    return subprocess.run(
        [Path(sys.executable).with_name("alembic"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
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


def schema(path):
    engine = create_buffer_engine(path)
    try:
        return objects(engine)
    finally:
        engine.dispose()


def plain(sql):
    sql = re.sub(r"\s+", " ", str(sql)).replace('"', "").strip()
    return clauses(sql) if sql.startswith("CREATE TABLE") else sql


def clauses(sql):
    """Columns and constraints of a table, each by itself: ADD COLUMN puts them into another order."""
    head, _, body = sql.partition("(")
    found, depth = [""], 0
    for part in re.split(r"([(),])", body.removesuffix(")")):
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "," and not depth:
            found.append("")
        else:
            found[-1] += part
    return {head, *(piece.strip() for clause in found for piece in re.split(r" (?=CONSTRAINT )", clause))}


class TestUpgrade:
    def test_is_what_the_models_say(self, engine):
        """The migrations arrive at the schema of the models and of `schema`, object by object."""
        expected = {}
        for table in Base.metadata.tables.values():
            expected[table.name] = plain(CreateTable(table).compile(engine))
            expected |= {index.name: plain(CreateIndex(index).compile(engine)) for index in table.indexes}
        expected |= {name: plain(sql) for name, sql in {**SQLITE_TRIGGERS, **SQLITE_VIEWS}.items()}
        found = objects(engine)
        del found["kkt_buffer_version"]
        assert expected == found

    def test_twice(self, engine, monkeypatch):
        """On a database that is up to date nothing is done, and Alembic is not even imported."""
        monkeypatch.setitem(sys.modules, "alembic", None)
        upgrade(engine)
        assert current(engine) == migrate.revisions()[-1]

    def test_defaults(self, engine):
        """The settings of the first migration are those that the code falls back to."""
        with engine.connect() as connection:
            rows = dict(list(connection.execute(text("SELECT key, value FROM config"))))
        assert {"version": "1.0.0"} | {key: str(rule.default) for key, rule in CONFIG_RULES.items()} == rows

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

    def test_all_or_nothing(self, tmp_path, monkeypatch):
        """A migration that fails leaves the database as it was, without even a version table."""
        engine = create_buffer_engine(tmp_path / "buffer.db")
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE buffer_counts (host TEXT)"))
        with pytest.raises(Exception, match="buffer_counts already exists"):
            upgrade(engine)
        assert list(objects(engine)) == ["buffer_counts"]

    def test_beside_a_host(self, tmp_path):
        """The application's own Alembic version and tables in the same database are not touched, nor minded."""
        engine = create_buffer_engine(tmp_path / "buffer.db")
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
            for table in ("buffer_counts", "config", "buffer_events", "dlq", "receipts"):
                connection.execute(text(f"DROP TABLE {table}"))
            connection.commit()
        file_engine.dispose()
        with caplog.at_level(logging.WARNING, logger="kkt_buffer.migrations"):
            upgrade(file_engine)
        assert "foreign keys were violated before the migration" in caplog.text


class TestCurrent:
    def test_nothing(self, tmp_path):
        assert current(create_buffer_engine(tmp_path / "buffer.db")) is None

    def test_empty_version_table(self, engine):
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM kkt_buffer_version"))
        assert current(engine) is None

    @pytest.mark.parametrize("entry", [current, upgrade, check, migrate.require])
    def test_newer(self, path, file_engine, entry):
        """A database of a newer release is refused by every entry point, and not touched."""
        with file_engine.begin() as connection:
            connection.execute(text("UPDATE kkt_buffer_version SET version_num = '9999'"))
        before = everything(path)
        with pytest.raises(SchemaError, match="schema 9999, which a newer release made.* Nothing was touched"):
            entry(file_engine)
        assert before == everything(path)

    def test_revisions(self):
        """The numbers of the files are Alembic's own revisions, in one line, the last of them its head."""
        from alembic.script import ScriptDirectory  # noqa: PLC0415

        scripts = ScriptDirectory(str(migrate.SCRIPTS))
        assert list(migrate.revisions()) == [script.revision for script in scripts.walk_revisions()][::-1]
        assert migrate.revisions()[-1] == scripts.get_current_head()


class TestCheck:
    def test_clean(self, engine):
        check(engine)

    def test_drift(self, engine):
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE receipts ADD COLUMN colour TEXT"))
        with pytest.raises(SchemaError, match=r"not that of this release: .*colour"):
            check(engine)

    def test_not_migrated(self, tmp_path):
        with pytest.raises(SchemaError, match="has no schema .*python -m kkt_buffer upgrade PATH"):
            check(create_buffer_engine(tmp_path / "buffer.db"))

    def test_old(self, engine, monkeypatch):
        monkeypatch.setattr(migrate, "revisions", lambda: ("0001", "0002", "9999"))
        with pytest.raises(SchemaError, match=r"has the old schema \d+ where this release needs 9999"):
            check(engine)


class TestAlembic:
    def test_up_check_down(self, tmp_path):
        """The three commands work in a checkout, make the folder, and leave nothing of ours behind."""
        path = tmp_path / "shop" / "buffer.db"
        for command in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
            done = alembic("-x", f"db={path}", *command)
            assert done.returncode == 0, done.stdout
            assert "Warning" not in done.stdout
        assert not [line for line in everything(path) if "receipt" in line]

    def test_which_database(self, tmp_path):
        """`-x db=` comes first, then BUFFER_DB_PATH, then alembic.ini."""
        (tmp_path / "alembic.ini").write_text((ROOT / "alembic.ini").read_text().replace("%(here)s", str(ROOT)))
        expected = tmp_path / "x.db", tmp_path / "environment.db", tmp_path / "data" / "buffer.db"
        alembic("-x", f"db={expected[0]}", "upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH=str(expected[1]))
        assert [True, False, False] == [path.exists() for path in expected]
        alembic("upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH=str(expected[1]))
        assert [True, True, False] == [path.exists() for path in expected]
        alembic("upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH="")
        assert [True, True, True] == [path.exists() for path in expected]

    def test_url(self, tmp_path):
        assert alembic("-x", f"db=sqlite:///{tmp_path}/buffer.db", "upgrade", "head").returncode == 0
        assert (tmp_path / "buffer.db").exists()

    @pytest.mark.parametrize("target", ["{folder}", "postgresql://localhost/shop"])
    def test_refused(self, tmp_path, target):
        """A target that cannot be used is told in one line."""
        done = alembic("-x", f"db={target.format(folder=tmp_path)}", "upgrade", "head")
        assert done.returncode != 0
        assert "Traceback" not in done.stdout
        assert re.search(r"(FAILED:|ERROR) .*(is a folder|expected a path)", done.stdout)

    def test_offline(self, tmp_path):
        """A script of SQL would not be one transaction: refused."""
        done = alembic("-x", f"db={tmp_path}/buffer.db", "upgrade", "head", "--sql")
        assert "FAILED: a script of SQL cannot migrate SQLite safely" in done.stdout

    @pytest.mark.parametrize("status", ["pending", "synced", "failed"])
    def test_downgrade_with_receipts(self, path, status):
        """A buffer that holds receipts is not taken away."""
        engine = create_buffer_engine(path)
        a_receipt(ReceiptRepository(engine), status)
        engine.dispose()
        before = everything(path)
        done = alembic("-x", f"db={path}", "downgrade", "base")
        assert "refusing to drop the buffer: it holds 1 receipts. Nothing was changed" in done.stdout
        assert before == everything(path)

    def test_up_down_up(self, path):
        """Going down and up again arrives at the same schema."""
        before = schema(path)
        for command in (["downgrade", "base"], ["upgrade", "head"]):
            assert alembic("-x", f"db={path}", *command).returncode == 0
        assert before == schema(path)


def test_broken_references_are_refused(tmp_path, monkeypatch):
    """A migration that would break a reference is rolled back."""
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    (versions.parent / "env.py").write_text((migrate.SCRIPTS / "env.py").read_text())
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
    engine = create_buffer_engine(tmp_path / "buffer.db")
    with pytest.raises(Exception, match="the migration would break foreign keys"):
        upgrade(engine)
    assert inspect(engine).get_table_names() == []
