"""Files of the sqlite3 version are adopted: every row is kept, after a backup."""

import contextlib
import os
import pty
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import predecessor
import pytest
from builders import NOON, everything
from predecessor import adopt, driver, receipt, repairs, rows, run
from schema.helpers import HEAD, downgrade_to

from kkt_buffer import (
    BufferStorageError,
    ReceiptRepository,
    SchemaError,
    buffer,
    check,
    current,
    deliver_pending,
    upgrade,
)
from kkt_buffer.sqlite.file import backup


class TestWhole:
    @pytest.mark.parametrize("size", [0, 200])
    @pytest.mark.parametrize("by", ["function", "alembic", "command"])
    def test_nothing_lost(self, tmp_path, size, by, opened):
        """Every row and every value that needed no repair is kept, whoever upgrades."""
        path = predecessor.make(tmp_path / "old.db", size)
        before = {table: rows(path, table) for table in ("receipts", "dlq", "buffer_events", "config")}
        if by == "function":
            buffer.init_buffer_db(path)
            buffer.close_buffer_db()
        elif by == "alembic":
            subprocess.run(
                [Path(sys.executable).with_name("alembic"), "-x", f"db={path}", "upgrade", "head"],
                cwd=Path(__file__).parents[2],
                check=True,
                capture_output=True,
            )
        else:
            subprocess.run([sys.executable, "-m", "kkt_buffer", "upgrade", path], check=True, capture_output=True)
        for table, was in before.items():
            found = rows(path, table)
            assert was.keys() <= found.keys()
            for key, row in was.items():
                changed = {name for name in row if row[name] != found[key][name]}
                assert changed <= {"status", "retry_count", "resolved_at", "resolved_by"}
                if table == "receipts" and changed:
                    assert repairs(path, key)
        engine = opened(path)
        check(engine)
        status = ReceiptRepository(engine).get_buffer_status()
        engine.dispose()
        statuses = [row["status"] for row in rows(path, "receipts").values()]
        open_letters = [row for row in rows(path, "dlq").values() if row["resolved_at"] is None]
        assert size == status.total_receipts
        assert statuses.count("pending") == status.pending
        assert statuses.count("failed") == status.failed == status.dlq_size == len(open_letters)
        assert "syncing" not in statuses

    def test_everything_is_delivered(self, tmp_path, opened):
        """What waited is delivered, in order, and what was given up can be requeued and delivered too."""
        path = predecessor.make(tmp_path / "old.db", 200)
        engine = opened(path)
        upgrade(engine)
        repository = ReceiptRepository(engine)
        sent = []

        def send(receipt):
            sent.append((receipt.hlc_local_time, receipt.hlc_logical_counter))
            return NOON

        while deliver_pending(repository, send).outcomes:
            pass
        assert sorted(sent) == sent
        assert repository.requeue_all(actor="Anna", reason="once more")
        while deliver_pending(repository, send).outcomes:
            pass
        status = repository.get_buffer_status()
        assert (200, 0) == (status.synced, status.dlq_size)
        stamps = [(row["hlc_local_time"], row["hlc_logical_counter"]) for row in rows(path, "receipts").values()]
        new = repository.get_receipt_by_id(repository.insert_receipt({"pos_id": "t", "fiscal_doc": {}}))
        assert (new.hlc_local_time, new.hlc_logical_counter) > max(stamps)
        engine.dispose()

    def test_order_of_rows(self, tmp_path):
        """The order in which the rows were made is kept; other tables may rely on it."""
        path = predecessor.make(tmp_path / "old.db", 50)
        with contextlib.closing(driver.connect(path)) as db:
            db.execute("DELETE FROM receipts WHERE rowid % 7 = 0")
            db.commit()
            before = db.execute("SELECT rowid, id FROM receipts ORDER BY rowid").fetchall()
        adopt(path)
        with contextlib.closing(driver.connect(path)) as db:
            assert before == db.execute("SELECT rowid, id FROM receipts ORDER BY rowid").fetchall()

    @pytest.mark.slow
    def test_large(self, tmp_path, caplog, opened):
        """Twenty thousand receipts."""
        path = predecessor.make(tmp_path / "old.db", 20_000)
        adopt(path)
        engine = opened(path)
        status = ReceiptRepository(engine).get_buffer_status()
        engine.dispose()
        assert status.total_receipts == 20_000
        assert "6 rows of config" in caplog.text
        assert "20000 rows of receipts" in caplog.text
        with contextlib.closing(driver.connect(path)) as db:
            assert ("ok",) == db.execute("PRAGMA integrity_check").fetchone()

    def test_once(self, old):
        """What was taken over is a buffer like any other: nothing is done again."""
        adopt(old)
        before = everything(old)
        adopt(old)
        assert before == everything(old)

    def test_parts(self, old):
        """Tables of the predecessor that are not there do not matter."""
        run(old, receipt(status="failed"), "DROP VIEW v_recent_events", "DROP TABLE dlq")
        run(old, "DROP TRIGGER trg_receipt_added", "DROP TRIGGER trg_receipt_synced", "DROP TABLE buffer_events")
        adopt(old)
        assert rows(old, "receipts")["r"]["status"] == "pending"

    def test_in_memory(self, opened):
        """A test's own predecessor in memory is taken over too; there is nothing to back up."""
        engine = opened(":memory:")
        with engine.begin() as connection:
            for statement in predecessor.statements():
                connection.exec_driver_sql(statement)
        upgrade(engine)
        check(engine)
        engine.dispose()

    def test_settings(self, old):
        """A shop's settings stay, and what was not there gets its default."""
        run(old, "UPDATE config SET value = '700' WHERE key = 'buffer_capacity'")
        adopt(old)
        found = {key: row["value"] for key, row in rows(old, "config").items()}
        assert ("700", "Ромашка", "60") == (found["buffer_capacity"], found["shop"], found["lease_seconds"])


class TestBackup:
    def test_beside_itself(self, old, caplog):
        """The file as it was is kept beside it, for its owner alone, and the log says where."""
        run(old, receipt(status="syncing"))
        before = everything(old)
        adopt(old)
        (copy,) = old.parent.glob("old.db.before-adoption-*")
        assert str(copy) in caplog.text
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert before == everything(copy)

    def test_back(self, old):
        """The backup is a file like the first: it is taken over in the same way."""
        run(old, receipt(status="syncing"))
        adopt(old)
        (copy,) = old.parent.glob("old.db.before-adoption-*")
        again = shutil.copy(copy, old.with_name("again.db"))
        adopt(again)
        same = [rows(path, "receipts") for path in (old, again)]
        assert same[0] == same[1]

    def test_no_room(self, old, monkeypatch):
        """Without a backup nothing is changed."""
        run(old, receipt())
        before = everything(old)
        in_the_way = old.with_name("a file where a folder should be")
        in_the_way.touch()
        copy = in_the_way / "copy.db"
        monkeypatch.setattr("kkt_buffer.sqlite.file.backup", lambda database, engine, _: backup(database, engine, copy))
        with pytest.raises(BufferStorageError, match="the backup .* cannot be used: .*Nothing was written"):
            adopt(old)
        assert before == everything(old)

    def test_unfinished(self, old):
        """What a kill left of an earlier copy is taken away."""
        unfinished = old.with_name(f".{old.name}.before-adoption-20260301-120000.unfinished")
        unfinished.touch()
        adopt(old)
        assert not unfinished.exists()

    def test_fails_later(self, old, monkeypatch, opened):
        """An adoption that fails at its end leaves the file as it was, and says so."""
        run(old, receipt(), "CREATE TRIGGER trg_guard_capacity AFTER INSERT ON loyalty BEGIN SELECT 1; END")
        before = everything(old)
        engine = opened(old)
        with pytest.raises(
            SchemaError, match="rolled back; the database is as it was. trigger trg_guard_capacity already"
        ):
            upgrade(engine)
        engine.dispose()
        assert before == everything(old)
        assert [] == list(old.parent.glob("*before-adoption*"))


class TestRefused:
    def test_status(self, old):
        """Who may only look says what the file is, and what to run."""
        done = subprocess.run(
            [sys.executable, "-m", "kkt_buffer", "status", old], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert f"the schema of the sqlite3 version where this release needs schema {HEAD}" in done.stderr

    def test_not_now(self, old):
        before = everything(old)
        with pytest.raises(SchemaError, match="the schema of the sqlite3 version"):
            buffer.init_buffer_db(old, upgrade=False)
        assert before == everything(old)

    def test_down(self, old, opened):
        """What was taken over goes no further down than to the first schema: it holds receipts."""
        run(old, receipt())
        adopt(old)
        engine = opened(old)
        downgrade_to(engine, "0001")
        assert current(engine) == "0001"
        with pytest.raises(Exception, match="refusing to drop the buffer: it holds 1 receipts"):
            downgrade_to(engine, "base")
        upgrade(engine)
        check(engine)
        engine.dispose()


def test_progress(tmp_path):
    """On a terminal the upgrade says how far it is."""
    path = predecessor.make(tmp_path / "old.db", 200)
    leader, follower = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "kkt_buffer", "upgrade", path], stderr=follower, check=False)
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(leader, 4096):
            said += chunk
    os.close(leader)
    assert done.returncode == 0
    assert b"adopting receipts: 200 of 200 (100 %)" in said
    assert b"backup, pages: " in said
