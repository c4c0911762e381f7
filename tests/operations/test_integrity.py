"""Whether a buffer is whole, and a copy of it while it is in use."""

import contextlib
import sqlite3
import subprocess
import sys
import threading

import predecessor
import pytest
from builders import NOON, Clock, a_receipt, everything, new_receipt, start_python

from kkt_buffer import BufferStorageError, ReceiptBufferError, ReceiptRepository, create_buffer_engine, upgrade

CHECKS = (
    "pages and indexes",
    "references",
    "settings",
    "texts",
    "rules of the tables",
    "dead letters",
    "counts",
    "order of timestamps",
)


def damage(path, *statements):
    """Change a buffer behind its own back: without its triggers and checks."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)


@pytest.fixture
def used(path):
    """A buffer with a receipt of every status."""
    engine = create_buffer_engine(path)
    repository = ReceiptRepository(engine, now=lambda: NOON)
    for status in ("pending", "syncing", "synced", "failed"):
        a_receipt(repository, status)
    engine.dispose()
    return path


def report(path):
    engine = create_buffer_engine(path, read_only=True)
    try:
        return ReceiptRepository(engine).check_integrity()
    finally:
        engine.dispose()


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
                "row 3 of receipts breaks ck_receipts_synced",
            ),
            (
                "UPDATE receipts SET lease_token = 'x' WHERE status = 'pending'",
                "rules of the tables",
                "row 1 of receipts breaks ck_receipts_lease",
            ),
            ("UPDATE receipts SET status = 'pending' WHERE status = 'failed'", "dead letters", "is pending and has an"),
            ("DELETE FROM dlq", "dead letters", "is failed without a dead letter"),
            (
                "UPDATE buffer_state SET synced = 7",
                "counts",
                "synced are counted as 7, and are 1",
            ),
            ("DELETE FROM buffer_state", "counts", "buffer_state has no row"),
            (
                "UPDATE receipts SET hlc_local_time = 5 WHERE rowid = 3",
                "order of timestamps",
                "is not above the one before",
            ),
            ("UPDATE dlq SET original_receipt_id = 'gone'", "references", "row 1 of dlq refers to a row of receipts"),
            ("UPDATE config SET value = 'much' WHERE key = 'lease_seconds'", "settings", "lease_seconds"),
            ("UPDATE receipts SET last_error = CAST(X'41CF' AS TEXT)", "texts", "last_error of receipt"),
            (
                "UPDATE receipts SET retry_count = -1",
                "rules of the tables",
                "row 1 of receipts breaks ck_receipts_retry_count",
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
            " (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, status)"
            " SELECT i, 't', 1, 1, i, '{}', 'failed' FROM n",
        )
        assert len(report(used).findings["dead letters"]) == 100


class TestBackup:
    def test_inside(self, tmp_path, file_repository):
        with file_repository.transaction(), pytest.raises(ReceiptBufferError, match="Nothing was copied"):
            file_repository.backup(tmp_path / "copy.db")
        assert not (tmp_path / "copy.db").exists()

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-gate"])
    def test_onto_itself(self, path, file_repository, suffix):
        with pytest.raises(ValueError, match="belongs to the buffer itself; give another one. Nothing was copied"):
            file_repository.backup(f"{path}{suffix}")

    @pytest.mark.parametrize("target", ["", "/", "\0", ".."])
    def test_no_file(self, file_repository, target):
        with pytest.raises((ValueError, BufferStorageError)):
            file_repository.backup(target)

    @pytest.mark.parametrize("target", [None, 5, b"x"])
    def test_no_path(self, file_repository, target):
        with pytest.raises(TypeError, match="path: expected the path of a file"):
            file_repository.backup(target)

    @pytest.mark.slow
    def test_under_load(self, tmp_path, path):
        """While others insert: each copy is whole, and holds what was acknowledged before it began."""
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine)
        repository.set_config("buffer_capacity", 100_000)
        acknowledged = []
        done = threading.Event()

        def sell():
            while not done.is_set():
                acknowledged.append(repository.insert_receipt(new_receipt()))

        sellers = [threading.Thread(target=sell) for _ in range(4)]
        for seller in sellers:
            seller.start()
        for number in range(10):
            before = set(acknowledged)
            target = tmp_path / f"{number % 2}.db"  # new, and over an older one
            repository.backup(target)
            assert report(target).is_sound
            with contextlib.closing(sqlite3.connect(target)) as db:
                assert before <= {row[0] for row in db.execute("SELECT id FROM receipts")}
        done.set()
        for seller in sellers:
            seller.join()
        engine.dispose()

    @pytest.mark.slow
    def test_killed(self, tmp_path, used):
        """A kill at any moment leaves the old copy or the new one, whole."""
        target = tmp_path / "backup.db"
        engine = create_buffer_engine(used)
        repository = ReceiptRepository(engine)
        repository.set_config("buffer_capacity", 100_000)
        program = """
            import sys
            from kkt_buffer import ReceiptRepository, create_buffer_engine
            repository = ReceiptRepository(create_buffer_engine(sys.argv[1], read_only=True))
            print("ready", flush=True)
            while True:
                repository.backup(sys.argv[2])
        """
        repository.backup(target)
        for number in range(10):
            with start_python(program, used, target, stderr=subprocess.DEVNULL) as child:
                child.stdout.readline()
                repository.insert_receipts([new_receipt() for _ in range(100)])
                threading.Event().wait(number / 100)
                child.kill()
            assert report(target).is_sound
        repository.backup(target)
        assert [] == list(tmp_path.glob(".*unfinished"))
        assert everything(used) == everything(target)
        engine.dispose()


class TestRestore:
    def test_clock_goes_on(self, tmp_path, path):
        """A restored buffer goes on above its latest timestamp, though the clock was set back."""
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine, now=lambda: NOON)
        kept = [a_receipt(repository) for _ in range(3)]
        repository.backup(tmp_path / "backup.db")
        repository.insert_receipt(new_receipt())
        engine.dispose()
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).rename(tmp_path / f"away{suffix}") if path.with_name(
                path.name + suffix
            ).exists() else None
        path.write_bytes((tmp_path / "backup.db").read_bytes())
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine, now=Clock(NOON - 3600))
        assert repository.check_integrity().is_sound
        assert [receipt.id for receipt in kept] == [found.id for found in repository.get_pending_receipts()]
        new = a_receipt(repository)
        latest = kept[-1].hlc_local_time, kept[-1].hlc_logical_counter
        assert (new.hlc_local_time, new.hlc_logical_counter) > latest
        engine.dispose()


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kkt_buffer", *map(str, arguments)], capture_output=True, text=True, check=False
    )


class TestCommands:
    def test_verify(self, used):
        """What was checked is printed, and the exit status says whether all is well."""
        done = command("verify", used)
        assert done.returncode == 0, done.stderr
        for what in (*CHECKS, "SQLite", "schema", "open leases", "settings of a connection"):
            assert what in done.stdout
        assert "synchronous 2" in done.stdout
        assert "1 (each is over after 60 s)" in done.stdout
        assert "The buffer is whole." in done.stdout

    def test_verify_not_whole(self, used):
        damage(used, "DELETE FROM dlq")
        before = used.read_bytes()
        done = command("verify", used)
        assert done.returncode == 1
        assert "is failed without a dead letter" in done.stdout
        assert "trigger trg_guard_capacity is missing" in done.stdout
        assert "The buffer is NOT whole. Nothing was changed. Restore a backup." in done.stdout
        assert before == used.read_bytes()

    def test_verify_nothing(self, tmp_path):
        done = command("verify", tmp_path / "buffer.db")
        assert done.returncode == 1
        assert [] == list(tmp_path.iterdir())

    def test_backup(self, tmp_path, used):
        done = command("backup", used, tmp_path / "copies" / "copy.db")
        assert (0, "") == (done.returncode, done.stderr)
        assert "complete, and on disk" in done.stdout
        assert everything(used) == everything(tmp_path / "copies" / "copy.db")
