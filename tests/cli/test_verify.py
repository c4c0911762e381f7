"""`verify` and `backup` on the command line."""

import subprocess
import sys

import pytest
from builders import another_program, everything, fill, shown
from damage import CHECKS, damage


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kkt_buffer", *map(str, arguments)], capture_output=True, text=True, check=False
    )


class TestCommands:
    def test_verify(self, used):
        """What was checked is printed, and the exit status says whether all is well."""
        done = command("verify", used)
        assert (0, "") == (done.returncode, done.stderr)
        for what in (*CHECKS, "SQLite", "schema", "open leases", "settings of a connection"):
            assert what in done.stdout
        assert "synchronous 2" in done.stdout
        assert "1 (each expires after 60 s)" in done.stdout
        assert "The buffer is whole." in done.stdout

    def test_verify_server(self, server_buffer):
        """The same of a server, with the settings on which the durability of a commit depends."""
        fill(server_buffer)
        done = command("verify", server_buffer)
        assert (0, "") == (done.returncode, done.stderr)
        for what in ("PostgreSQL", "schema", "safety of commits", "counts", "documents", "open leases", "fsync on"):
            assert what in done.stdout
        assert f"buffer                   | {shown(server_buffer)}" in done.stdout
        assert "The buffer is whole." in done.stdout

    @pytest.mark.parametrize(
        ("change", "status", "told"),
        [
            ("DROP TRIGGER trg_guard_acknowledged ON receipts", 3, "trigger trg_guard_acknowledged is missing"),
            ("CREATE INDEX mine ON receipts (pos_id)", 3, "the index mine is not part of the buffer"),
            ("UPDATE config SET value = 'much' WHERE key = 'lease_seconds'", 3, "lease_seconds is 'much'"),
            ("ALTER TABLE dlq DISABLE TRIGGER USER; DELETE FROM dlq", 1, "is failed without a dead letter"),
        ],
    )
    def test_verify_server_differs(self, server_buffer, change, status, told):
        """What differs is told apart from what is damaged, as on a file."""
        fill(server_buffer)
        with another_program(server_buffer) as db:
            db.execute(change)
        before = everything(server_buffer)
        done = command("verify", server_buffer)
        assert status == done.returncode, done.stdout + done.stderr
        assert told in done.stdout
        assert before == everything(server_buffer)

    def test_verify_not_whole(self, used):
        damage(used, "DELETE FROM dlq")
        before = used.read_bytes()
        done = command("verify", used)
        assert done.returncode == 1
        assert "is failed without a dead letter" in done.stdout
        assert "trigger trg_guard_capacity is missing" in done.stdout
        assert "The buffer is DAMAGED. Nothing was changed. Restore a backup." in done.stdout
        assert before == used.read_bytes()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("CREATE INDEX mine ON receipts (pos_id)", "the index mine is not part of the buffer"),
            ("DROP TRIGGER trg_guard_capacity", "the trigger trg_guard_capacity is missing"),
            ("DROP VIEW v_buffer_status; CREATE VIEW v_buffer_status AS SELECT 1", "v_buffer_status differs"),
            (
                """
                INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)
                VALUES ('a', 'till-1', 5, 5, 0, '{}')
                """,
                "receipt a has a timestamp that is not above the one before it",
            ),
            ("UPDATE config SET value = 'much' WHERE key = 'lease_seconds'", "lease_seconds is 'much'"),
        ],
    )
    def test_verify_differs(self, used, change, told):
        """What an old program or a hand has changed without harm to a receipt: nobody is told to restore anything."""
        with another_program(used) as db:
            db.executescript(change)
        done = command("verify", used)
        assert 3 == done.returncode, done.stderr
        assert told in done.stdout
        assert "NOTHING TO RESTORE" in done.stdout
        assert "Restore a backup" not in done.stdout

    @pytest.mark.parametrize("change", ["DROP TABLE buffer_state", "ALTER TABLE dlq DROP COLUMN last_error"])
    def test_verify_table_missing(self, used, change):
        """Without a table or a column nothing can go on."""
        with another_program(used) as db:
            db.executescript(f"DROP VIEW v_buffer_status; {change}")
        done = command("verify", used)
        assert 1 == done.returncode
        assert "The buffer is DAMAGED" in done.stdout

    def test_verify_damaged_page(self, used):
        """Where not even the schema can be compared, that is damage, and it is told."""
        content = bytearray(used.read_bytes())
        content[4096:] = b"\xa5" * (len(content) - 4096)
        used.write_bytes(content)
        done = command("verify", used)
        assert 1 == done.returncode, done.stdout

    def test_verify_nothing(self, tmp_path):
        done = command("verify", tmp_path / "buffer.db")
        assert done.returncode == 1
        assert [] == list(tmp_path.iterdir())

    def test_backup(self, tmp_path, used):
        done = command("backup", used, tmp_path / "copies" / "copy.db")
        assert (0, "") == (done.returncode, done.stderr)
        assert "complete, and on disk" in done.stdout
        assert everything(used) == everything(tmp_path / "copies" / "copy.db")
