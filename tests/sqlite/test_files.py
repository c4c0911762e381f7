"""New files and the folders that they need; what is refused."""

import fcntl
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from builders import a_receipt, run_python
from sqlalchemy import text

from kkt_buffer import (
    BufferDamagedError,
    BufferStorageError,
    ReceiptRepository,
    check,
    upgrade,
)

COUNT = text("SELECT COUNT(*) FROM receipts")


class TestNewFile:
    def test_owner_only(self, tmp_path, open_engine):
        """Receipts are personal data: the file and all beside it are the owner's alone, whatever the umask."""
        before = os.umask(0)
        try:
            path = tmp_path / "shop" / "till" / "buffer.db"
            with open_engine(path).begin() as connection:
                connection.exec_driver_sql("CREATE TABLE t (x)")
                files = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        finally:
            os.umask(before)
        assert dict.fromkeys(["buffer.db", "buffer.db-wal", "buffer.db-shm", "buffer.db-gate"], 0o600) == files

    def test_folders_are_synced(self, tmp_path, monkeypatch, open_engine):
        """The names of the file and of its new folders are on disk before anything is acknowledged."""
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        open_engine(tmp_path / "shop" / "till" / "buffer.db")
        assert {str(tmp_path / "shop" / "till"), str(tmp_path / "shop"), str(tmp_path)} <= set(synced)

    def test_just_made_by_another(self, tmp_path, migrated_file, open_engine):
        """Another process may have made and filled the file while this one waited at the gate: it is kept."""
        path = tmp_path / "buffer.db"
        with open(f"{path}-gate", "w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)

            def made():
                shutil.copy(migrated_file, path)
                fcntl.flock(gate, fcntl.LOCK_UN)

            other = threading.Timer(0.2, made)
            other.start()
            engine = open_engine(path)
            other.join()
        check(engine)

    def test_used_file_is_not_synced(self, path, monkeypatch, open_engine):
        """A file that has been in use has its name on disk."""
        monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("nothing to sync"))
        open_engine(path)

    def test_relative(self, tmp_path, monkeypatch, open_engine):
        """A relative path means the folder of this moment."""
        monkeypatch.chdir(tmp_path)
        relative = open_engine("buffer.db")
        monkeypatch.chdir("/")
        upgrade(relative)
        assert (tmp_path / "buffer.db").stat().st_size > 0

    @pytest.mark.parametrize("name", ["till 1?.db", "100%.db", "касса#1.db", "a'b.db"])
    def test_strange_names(self, tmp_path, name, open_engine):
        """A path is a path, whatever characters are in it."""
        own = open_engine(tmp_path / name)
        upgrade(own)
        assert (tmp_path / name).stat().st_size > 0

    def test_symbolic_link(self, path, tmp_path, open_engine):
        """A link is followed, so that everybody queues at the same gate."""
        link = tmp_path / "link.db"
        link.symlink_to(path)
        with open_engine(link).begin() as connection:
            connection.execute(COUNT)
        assert not Path(f"{link}-gate").exists()

    def test_url(self, tmp_path, open_engine):
        path = tmp_path / "buffer.db"
        own = open_engine(f"sqlite:///{path}")
        assert str(path) == own.url.database


class TestRefused:
    @pytest.mark.parametrize(
        "path",
        ["", "  ", "a\0b", b"buffer.db", "mysql://localhost/x", "sqlite+aiosqlite:///x", "sqlite:///x?mode=ro"],
    )
    def test_no_path(self, path, tmp_path, monkeypatch, open_engine):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"path_or_url: expected (the|a) path"):
            open_engine(path)
        assert list(tmp_path.iterdir()) == []

    def test_no_path_at_all(self, open_engine):
        with pytest.raises(TypeError):
            open_engine(17)

    def test_folder(self, tmp_path, open_engine):
        with pytest.raises(BufferStorageError, match="is a folder; give the path of a file in it"):
            open_engine(tmp_path)

    def test_pipe(self, tmp_path, open_engine):
        """A pipe would keep us waiting for ever."""
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", "/dev/null"):
            with pytest.raises(BufferStorageError, match="is a device or a pipe, not a file"):
                open_engine(path)

    def test_below_a_file(self, path, open_engine):
        with pytest.raises(BufferStorageError, match="cannot be used: (Not a directory|File exists)"):
            open_engine(path / "buffer.db")

    def test_name_too_long(self, tmp_path, open_engine):
        with pytest.raises(BufferStorageError, match="cannot be used: File name too long"):
            open_engine(tmp_path / ("x" * 300))

    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("content", [b"xy", b"not a database\n" * 500, b"SQLite format 3\0" + b"\xff" * 5000])
    def test_no_database(self, tmp_path, content, read_only, open_engine):
        """A file of another kind is refused and left as it is."""
        path = tmp_path / "letter.txt"
        path.write_bytes(content)
        with pytest.raises(BufferDamagedError, match="the file is not an SQLite database"):
            open_engine(path, read_only=read_only)
        assert content == path.read_bytes()

    def test_damaged(self, path, open_engine):
        """A database whose first page is damaged is refused and left as it is."""
        content = bytearray(path.read_bytes())
        content[100:400] = b"\xff" * 300
        path.write_bytes(content)
        with pytest.raises(BufferDamagedError, match="SQLite found it damaged .* restore a backup"):
            open_engine(path)
        assert content == path.read_bytes()

    def test_damaged_table(self, path, clock, open_engine):
        """Damage that is found later refuses the operation that met it."""
        own = open_engine(path)
        for _ in range(20):
            a_receipt(ReceiptRepository(own, now=clock), fiscal_doc={"text": "x" * 2000})
        own.dispose()
        content = bytearray(path.read_bytes())
        at = content.rindex(b"x" * 100) // 4096 * 4096
        content[at : at + 4096] = b"\xff" * 4096
        path.write_bytes(content)
        with pytest.raises(BufferDamagedError, match="SQLite found it damaged"):
            ReceiptRepository(open_engine(path)).get_pending_receipts()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
    @pytest.mark.parametrize(("mode", "folder_mode"), [(0o600, 0o755), (0o600, 0o700), (0o644, 0o755)])
    def test_unreadable(self, path, tmp_path_factory, mode, folder_mode):
        """A file that this user may not write is named, with what to check."""
        folder = tmp_path_factory.getbasetemp().parent
        for parent in [path.parent, path.parent.parent, folder, folder.parent]:
            parent.chmod(0o755)
        path.chmod(mode)
        path.parent.chmod(folder_mode)
        program = """
            import os, sys
            import kkt_buffer
            os.setuid(65534)
            try:
                kkt_buffer.create_buffer_engine(sys.argv[1])
            except kkt_buffer.BufferStorageError as error:
                print(error)
        """
        assert re.search("Permission denied|cannot be opened|read-only here", run_python(program, path).stdout)
