"""What `check_integrity` finds in a file that was damaged behind the back of its guards."""

import contextlib
import sqlite3

import predecessor
import pytest
from builders import everything, new_receipt
from damage import CHECKS, damage, report

from kkt_buffer import ReceiptRepository, create_buffer_engine, upgrade


class TestCheckIntegrity:
    def test_sound(self, used):
        before = everything(used)
        found = report(used)
        assert dict.fromkeys(CHECKS, ()) == found.findings
        assert (found.is_sound, str(found)) == (True, "")
        assert before == everything(used)

    @pytest.mark.parametrize(
        ("statement", "what", "told"),
        [
            (
                "UPDATE receipts SET synced_at = NULL WHERE status = 'synced'",
                "rules of the tables",
                "a row of receipts breaks ck_receipts_synced: ",
            ),
            (
                "UPDATE receipts SET lease_token = 'x' WHERE status = 'pending'",
                "rules of the tables",
                "a row of receipts breaks ck_receipts_lease: ",
            ),
            ("UPDATE receipts SET status = 'pending' WHERE status = 'failed'", "dead letters", "is pending and has an"),
            ("DELETE FROM dlq", "dead letters", "is failed without a dead letter"),
            (
                "UPDATE buffer_state SET synced = 7",
                "counts",
                "synced are counted as 7, and are 1",
            ),
            ("DELETE FROM buffer_state", "counts", "the row of counts is missing"),
            ("UPDATE buffer_state SET hlc_local_time = 5", "counts", "the last timestamp is below that of receipt"),
            (
                "UPDATE receipts SET hlc_local_time = 5 WHERE rowid = 3",
                "order of timestamps",
                "is not above the one before",
            ),
            ("UPDATE receipts SET fiscal_doc = '{}' WHERE rowid = 3", "documents", "differs from its digest"),
            ("UPDATE receipts SET fiscal_doc = CAST(X'7BCF7D' AS TEXT)", "documents", "differs from its digest"),
            ("UPDATE receipts SET digest = 'x' WHERE status = 'synced'", "documents", "differs from its digest"),
            ("UPDATE dlq SET original_receipt_id = 'gone'", "references", "row 1 of dlq refers to a row of receipts"),
            ("UPDATE config SET value = 'much' WHERE key = 'lease_seconds'", "settings", "lease_seconds"),
            ("UPDATE receipts SET last_error = CAST(X'41CF' AS TEXT)", "texts", "last_error of receipt"),
            (
                "UPDATE receipts SET retry_count = -1",
                "rules of the tables",
                "a row of receipts breaks ck_receipts_retry_count: ",
            ),
        ],
    )
    def test_each(self, used, statement, what, told):
        """Each invariant is looked at, and what breaks it is named."""
        damage(used, statement)
        found = report(used)
        assert not found.is_sound
        assert told in "; ".join(found.findings[what])
        assert f"{what}: " in str(found)

    def test_damaged_page(self, used):
        """A damaged page is named."""
        with contextlib.closing(sqlite3.connect(used)) as db:
            page_size = db.execute("PRAGMA page_size").fetchone()[0]
            page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'idx_receipts_hlc'").fetchone()[0]
        with used.open("r+b") as file:
            file.seek((page - 1) * page_size)
            file.write(b"\xa5" * page_size)
        before = used.read_bytes()
        assert f"page {page}" in "; ".join(report(used).findings["pages and indexes"]).lower()
        assert before == used.read_bytes()

    def test_adopted(self, tmp_path):
        """What was taken over may have timestamps in any order; what came later may not."""
        path = predecessor.make(tmp_path / "old.db", 3)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE receipts SET hlc_local_time = 5")
            db.commit()
        engine = create_buffer_engine(path)
        upgrade(engine)
        repository = ReceiptRepository(engine)
        repository.insert_receipts([new_receipt(), new_receipt()])
        assert repository.check_integrity().is_sound
        engine.dispose()
        damage(path, "UPDATE receipts SET hlc_local_time = 5, hlc_logical_counter = 0 WHERE rowid = 5")
        assert len(report(path).findings["order of timestamps"]) == 1

    def test_many(self, used):
        """A hundred problems of a kind are told."""
        damage(used, "DELETE FROM receipts", "DELETE FROM dlq")
        damage(
            used,
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 150) INSERT INTO receipts"
            " (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, status, digest)"
            " SELECT i, 't', 1, 1, i, '{}', 'failed', 'x' FROM n",
        )
        found = report(used).findings
        assert (100, 100) == (len(found["dead letters"]), len(found["documents"]))
