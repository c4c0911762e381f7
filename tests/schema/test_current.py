"""Each entry point knows the revision of a database, and no operation works on another one."""

import re

import pytest
from builders import a_receipt, everything
from operations_table import OPERATIONS, Known
from schema.helpers import alembic, upgrade_to
from sqlalchemy import text

from kkt_buffer import (
    ReceiptRepository,
    SchemaError,
    buffer,
    check,
    current,
    migrate,
    upgrade,
)


class TestCurrent:
    def test_nothing(self, tmp_path, opened):
        assert current(opened(tmp_path / "buffer.db")) is None

    def test_empty_version_table(self, engine):
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM kkt_buffer_version"))
        assert current(engine) is None

    @pytest.fixture
    def newer(self, path, opened):
        """A buffer that a later release has migrated."""
        engine = opened(path)
        with engine.begin() as connection:
            connection.execute(text("UPDATE kkt_buffer_version SET version_num = '9999'"))
            connection.execute(text("UPDATE config SET value = '2.7.0' WHERE key = 'release'"))
        engine.dispose()
        return path

    @pytest.fixture
    def older(self, tmp_path, opened):
        """A buffer that an earlier release has made."""
        path = tmp_path / "older.db"
        engine = opened(path)
        upgrade_to(engine, "0001")
        engine.dispose()
        return path

    @pytest.fixture
    def empty(self, tmp_path, opened):
        """A file that was never upgraded."""
        path = tmp_path / "empty.db"
        opened(path).dispose()
        return path

    NEWER = r"schema 9999, made by kkt-buffer 2.7.0; this is kkt-buffer \S+, which knows .* Nothing was changed"

    @pytest.mark.parametrize("entry", [current, upgrade, check, migrate.require])
    def test_newer(self, newer, entry, opened):
        """A database of a newer release is refused by every entry point, says whose it is, and is not touched."""
        before = everything(newer)
        engine = opened(newer)
        with pytest.raises(SchemaError, match=self.NEWER):
            entry(engine)
        engine.dispose()
        assert before == everything(newer)

    @pytest.mark.parametrize("options", [{}, {"upgrade": True}, {"upgrade": False}])
    def test_newer_by_function(self, newer, options):
        before = everything(newer)
        with pytest.raises(SchemaError, match=self.NEWER):
            buffer.init_buffer_db(newer, **options)
        assert before == everything(newer)

    @pytest.mark.parametrize("step", [["upgrade", "head"], ["downgrade", "base"], ["check"]])
    def test_newer_by_alembic(self, newer, step):
        before = everything(newer)
        done = alembic("-x", f"db={newer}", *step)
        assert done.returncode != 0
        assert re.search(self.NEWER, done.stdout)
        assert "Traceback" not in done.stdout
        assert before == everything(newer)

    def test_newer_without_a_name(self, newer, opened):
        """Whatever a later release has made of `config`, its schema is refused."""
        engine = opened(newer)
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE config RENAME TO settings"))
        with pytest.raises(SchemaError, match="schema 9999, made by a newer release"):
            current(engine)

    OLDER = "has the old schema 0001 .* Run `kkt-buffer upgrade PATH`"
    EMPTY = "has no tables of a buffer .* Run `kkt-buffer upgrade PATH`"

    @pytest.mark.parametrize(("fixture", "told"), [("newer", NEWER), ("older", OLDER), ("empty", EMPTY)])
    def test_operations(self, request, fixture, told, opened):
        """No operation works on the schema of another release, be it the first one of a service."""
        path = request.getfixturevalue(fixture)
        before = everything(path)
        engine = opened(path)
        repository = ReceiptRepository(engine)
        for operation in [*OPERATIONS.values(), *OPERATIONS.values()]:
            with pytest.raises(SchemaError, match=told):
                operation.call(repository, Known.nothing())
        engine.dispose()
        assert before == everything(path)

    def test_upgraded_meanwhile(self, older, opened):
        """A repository that was refused goes on as soon as somebody has upgraded."""
        repository = ReceiptRepository(opened(older))
        with pytest.raises(SchemaError, match=self.OLDER):
            a_receipt(repository)
        upgrade(opened(older))
        assert a_receipt(repository)

    def test_not_now(self, older):
        """A service that was told not to upgrade says what to run, and leaves the file alone."""
        before = everything(older)
        with pytest.raises(SchemaError, match=self.OLDER):
            buffer.init_buffer_db(older, upgrade=False)
        assert before == everything(older)
        buffer.init_buffer_db(older)
        buffer.init_buffer_db(older, upgrade=False)
        buffer.close_buffer_db()

    def test_revisions(self):
        """The numbers of the files are Alembic's own revisions, in one line, the last of them its head."""
        from alembic.script import ScriptDirectory  # noqa: PLC0415

        scripts = ScriptDirectory(str(migrate.SCRIPTS))
        assert list(migrate.revisions()) == [script.revision for script in scripts.walk_revisions()][::-1]
        assert migrate.revisions()[-1] == scripts.get_current_head()
