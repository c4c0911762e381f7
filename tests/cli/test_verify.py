"""`verify` and `backup` on the command line."""

import subprocess
import sys

from builders import everything
from damage import CHECKS, damage


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
        assert "1 (each expires after 60 s)" in done.stdout
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
