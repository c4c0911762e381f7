"""Adoption keeps the tables, views, triggers and columns of other programs."""

import contextlib

import predecessor
import pytest
from builders import everything
from predecessor import adopt, driver, letter, receipt, rows, run

from kkt_buffer import (
    ReceiptRepository,
    SchemaError,
)


class TestOthers:
    def test_untouched(self, tmp_path, opened):
        """Tables, views, indexes and triggers that are not ours are the same afterwards, and work."""
        path = predecessor.make(tmp_path / "old.db", 20)
        names = ("pos_sessions", "cash_transactions", "loyalty", "v_turnover", "v_recent_events", "shop_points")

        def others():
            with contextlib.closing(driver.connect(path)) as db:
                found = db.execute("SELECT name, sql FROM sqlite_master").fetchall()
                data = [db.execute(f"SELECT * FROM {name}").fetchall() for name in (*names[:4],)]
                return {name: sql for name, sql in found if name in (*names, "idx_cash_receipt")}, data

        before = others()
        assert len(before[0]) == len(names) + 1
        adopt(path)
        assert before == others()
        engine = opened(path)
        ReceiptRepository(engine).insert_receipt({"pos_id": "till-1", "fiscal_doc": {}})
        engine.dispose()
        assert len(rows(path, "loyalty")) == 21
        with contextlib.closing(driver.connect(path)) as db:
            newest = db.execute("SELECT event_type, event_time FROM v_recent_events LIMIT 1").fetchone()
            db.execute("PRAGMA foreign_keys = ON")
            assert [] == db.execute("PRAGMA foreign_key_check").fetchall()
        assert newest[0] == "receipt_added"

    def test_our_old_indexes_go(self, old):
        adopt(old)
        with contextlib.closing(driver.connect(old)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        gone = {"idx_receipts_created_at", "idx_receipts_retry", "idx_dlq_failed_at", "idx_events_timestamp"}
        assert names.isdisjoint(gone)

    def test_broken_references(self, tmp_path, caplog):
        """References of the shop's own that were broken before stay what they are, and do not stand in the way."""
        path = predecessor.make(tmp_path / "old.db", 5)
        run(path, "INSERT INTO cash_transactions (receipt_id, amount) VALUES ('gone', 1)")
        run(path, letter("also gone"))
        adopt(path)
        assert "foreign keys were violated before" in caplog.text
        assert [row["amount"] for row in rows(path, "cash_transactions").values()].count(1) == 1

    def test_columns_of_the_shop(self, old, caplog, opened):
        """Columns that a shop has added to a table of ours are kept as they were defined, and work."""
        for column in (
            '"shift no" INTEGER NOT NULL DEFAULT 7',
            "cashier TEXT NOT NULL DEFAULT 'Иванова, А.' COLLATE NOCASE",
            "[length] INTEGER GENERATED ALWAYS AS (length(fiscal_doc)) VIRTUAL",
        ):
            run(old, f"ALTER TABLE receipts ADD COLUMN {column}")
        run(
            old,
            receipt(),
            "CREATE TABLE lengths (n INTEGER)",
            "CREATE TRIGGER shop_length AFTER INSERT ON receipts BEGIN INSERT INTO lengths VALUES (NEW.length); END",
        )
        adopt(old)
        engine = opened(old)
        ReceiptRepository(engine).insert_receipt({"pos_id": "t", "fiscal_doc": "{}"})
        engine.dispose()
        found = list(rows(old, "receipts").values())
        assert [7, 7] == [row["shift no"] for row in found]
        assert ["Иванова, А."] * 2 == [row["cashier"] for row in found]
        assert 2 in rows(old, "lengths")
        assert "kept the column shift no of receipts, which another program has added" in caplog.text

    def test_stored_column(self, tmp_path):
        """What SQLite cannot add again as it was is kept as a plain column, with its values."""
        ddl = "email TEXT UNIQUE, -- a comment, with a comma\n    pos_id TEXT NOT NULL"
        path = tmp_path / "old.db"
        with contextlib.closing(driver.connect(path)) as db:
            db.executescript(predecessor.DDL.replace("pos_id TEXT NOT NULL", ddl, 1))
        run(path, receipt(), "UPDATE receipts SET email = 'a@b'")
        adopt(path)
        assert rows(path, "receipts")["r"]["email"] == "a@b"

    def test_unique_index(self, old, caplog):
        """An index of the shop's own goes, and where it was a rule, the log says so."""
        run(old, "CREATE UNIQUE INDEX shop_unique ON receipts (pos_id, created_at)")
        adopt(old)
        assert "dropped the unique index shop_unique" in caplog.text

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (
                "ALTER TABLE receipts ADD COLUMN next_attempt_at TEXT",
                "duplicate column name: next_attempt_at. The object",
            ),
            (
                "ALTER TABLE receipts ADD COLUMN changed_at TEXT",
                "duplicate column name: changed_at. The object with this name",
            ),
            ("CREATE TABLE buffer_counts (a)", "buffer_counts already exists. The object with this name is not part"),
            (
                "ALTER TABLE dlq DROP COLUMN last_error",
                "table dlq is not that of the sqlite3 version: it has no column",
            ),
        ],
    )
    def test_names_of_ours(self, old, change, told):
        """What has a name of ours stands in the way; it is named, and nothing is changed, nor left beside the file."""
        run(old, receipt(), change)
        before = everything(old)
        with pytest.raises(SchemaError, match=told):
            adopt(old)
        assert before == everything(old)
        assert [] == list(old.parent.glob("*before-adoption*"))

    def test_ids_of_events(self, old, opened):
        """An id of an event is never given twice, even if the latest events were deleted."""
        run(old, receipt(), receipt(id="s", hlc_logical_counter=1), "DELETE FROM buffer_events")
        adopt(old)
        engine = opened(old)
        assert ReceiptRepository(engine).log_event("circuit_opened") == 3
        engine.dispose()

    def test_another_receipts_table(self, tmp_path):
        """A table of the same name that is not the predecessor's is not taken for it."""
        path = tmp_path / "shop.db"
        run(path, "CREATE TABLE receipts (id INTEGER PRIMARY KEY, total INTEGER)", "INSERT INTO receipts VALUES (1, 5)")
        with pytest.raises(SchemaError, match="failed and was rolled back; .*receipts already exists"):
            adopt(path)
        assert {1: {"id": 1, "total": 5}} == rows(path, "receipts")
        assert [] == list(tmp_path.glob("*before-adoption*"))
