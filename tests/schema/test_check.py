"""`check` and `alembic check` find every difference from the models and `sqlite.schema`."""

import contextlib

import pytest
from alembic import command
from alembic.util import CommandError
from predecessor import driver
from schema.helpers import HEAD
from sqlalchemy import text

from kkt_buffer import (
    SchemaError,
    check,
    migrate,
)

# A change of each kind of object, and the message about it.
TAMPERED = {
    "a column less": ("ALTER TABLE dlq DROP COLUMN last_error", "table dlq lacks .*last_error TEXT"),
    "a table less": ("DROP TABLE buffer_state", "table buffer_state is missing"),
    "a check": (
        ("receipts", "retry_count >= 0", "retry_count >= -1"),
        r"table receipts lacks .*CHECK \(retry_count >= 0\)",
    ),
    "a default": (("receipts", "DEFAULT 0", "DEFAULT 1"), "table receipts lacks .*retry_count INTEGER DEFAULT 0"),
    "a foreign key": (
        ("dlq", "REFERENCES receipts (id)", "REFERENCES receipts (id) ON DELETE CASCADE"),
        r"table dlq lacks .*FOREIGN KEY\(original_receipt_id\)",
    ),
    "a trigger": (
        ("trg_guard_capacity", "'Buffer full'", "'full'"),
        "trigger trg_guard_capacity differs",
    ),
    "a trigger less": ("DROP TRIGGER trg_guard_undelivered", "trigger trg_guard_undelivered is missing"),
    "a view": (("v_buffer_status", "100.0", "10.0"), "view v_buffer_status differs"),
    "an index": (("idx_receipts_hlc", "hlc_logical_counter", "id"), "index idx_receipts_hlc differs"),
    "an index more": ("CREATE INDEX mine ON receipts (pos_id)", "index mine is not part of the buffer"),
    "a partial index": (
        ("idx_receipts_synced", "'synced'", "'failed'"),
        "index idx_receipts_synced differs",
    ),
    "a full index": (
        ("idx_receipts_held", " WHERE held_at IS NOT NULL", ""),
        "index idx_receipts_held differs",
    ),
    "a table's options": (("buffer_state", " STRICT", ""), "table buffer_state lacks STRICT"),
    "the version table": (
        ("kkt_buffer_version", "VARCHAR(32)", "TEXT"),
        r"table kkt_buffer_version lacks version_num VARCHAR\(32\) NOT NULL",
    ),
    "a unique index": (("idx_dlq_open", "UNIQUE ", ""), "index idx_dlq_open differs"),
}


class TestCheck:
    def test_clean(self, engine):
        check(engine)

    @pytest.fixture(params=TAMPERED)
    def tampered(self, request, path):
        """A buffer that is not as it should be, and how."""
        change, told = TAMPERED[request.param]
        with contextlib.closing(driver.connect(path, isolation_level=None)) as db:
            if isinstance(change, str):
                db.execute(change)
            else:
                name, old, new = change
                db.execute("PRAGMA writable_schema = ON")
                changed = db.execute(
                    "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ? AND instr(sql, ?)",
                    (old, new, name, old),
                )
                assert changed.rowcount == 1
        return path, told

    def test_drift(self, tampered, opened):
        """Every kind of object is compared, and what differs is named."""
        path, told = tampered
        engine = opened(path)
        with pytest.raises(SchemaError, match=f"not that of this release: the {told}"):
            check(engine)
        engine.dispose()

    def test_drift_by_alembic(self, tampered, opened):
        """So does `alembic check`."""
        path, _ = tampered
        engine = opened(path)
        with pytest.raises(CommandError, match="New upgrade operations detected"):
            command.check(migrate.alembic_config(engine))
        engine.dispose()

    @pytest.mark.parametrize("change", [TAMPERED["a column less"][0], TAMPERED["a table less"][0]])
    def test_advice(self, path, opened, change):
        """A backup is restored if a table or a column is missing; nothing else that differs needs one."""
        for statement, advice in (("CREATE INDEX mine ON dlq (reason)", "Undo what"), (change, "restore a backup")):
            with contextlib.closing(driver.connect(path, isolation_level=None)) as db:
                db.execute(statement)
            with pytest.raises(SchemaError, match=f"Nothing was changed. .*{advice}"):
                check(opened(path))

    def test_of_others(self, path, file_engine):
        """Other tables, views, triggers and columns are not ours to judge, on our tables either."""
        with file_engine.begin() as connection:
            connection.execute(text("CREATE TABLE goods (id INTEGER PRIMARY KEY)"))
            connection.execute(text("CREATE INDEX idx_goods ON goods (id)"))
            connection.execute(text("CREATE VIEW v_shop AS SELECT pos_id FROM receipts"))
            connection.execute(text("CREATE TRIGGER shop AFTER INSERT ON receipts BEGIN SELECT 1; END"))
            connection.execute(text("ALTER TABLE receipts ADD COLUMN cashier TEXT"))
        check(file_engine)
        command.check(migrate.alembic_config(file_engine))

    def test_not_migrated(self, tmp_path, opened):
        with pytest.raises(SchemaError, match="has no tables of a buffer .*kkt-buffer upgrade PATH"):
            check(opened(tmp_path / "buffer.db"))

    def test_old(self, engine, monkeypatch):
        monkeypatch.setattr(migrate, "revisions", lambda: ("0001", HEAD, "9999"))
        with pytest.raises(SchemaError, match=r"has the old schema \d+ where this release needs schema 9999"):
            check(engine)
