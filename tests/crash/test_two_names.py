"""
One file under two names: a hard link, a file or a folder mounted at a second place, a symbolic link.

SQLite puts the WAL beside the name by which a file was opened. Processes that open one file under two names have two
WALs, and overwrite what the other one has acknowledged.
"""

import contextlib
import os
import shutil
import subprocess
import time

import pytest
from builders import a_receipt, run_python, start_python, unproven
from damage import report
from sqlalchemy import event

from kkt_buffer import BufferStorageError, ReceiptRepository

INSERTS = 150
# Opens the buffer and inserts; prints the id of each acknowledged receipt, or why the buffer was refused.
SELL = """
import sys
from kkt_buffer import BufferStorageError, ReceiptRepository, create_buffer_engine

print("ready", flush=True)
sys.stdin.readline()
try:
    repository = ReceiptRepository(create_buffer_engine(sys.argv[1]))
    for _ in range(int(sys.argv[2])):
        print("kept", repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"}), flush=True)
except BufferStorageError as error:
    print("refused", error)
"""

MEASURED = dict(os.environ)  # no other test opens a file that is mounted by itself


def sold(*names):
    """What processes that sell at one moment print, one process for each name of the buffer."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(start_python(SELL, name, INSERTS, stdin=-1, stderr=-3, env=MEASURED)) for name in names
        ]
        assert all(process.stdout.readline() == "ready\n" for process in processes)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [process.stdout.read().splitlines() for process in processes]


def ids(path):
    program = """
        import sys
        from kkt_buffer import create_buffer_engine
        with create_buffer_engine(sys.argv[1]).connect() as connection:
            print(*connection.exec_driver_sql("SELECT id FROM receipts").scalars(), sep="\\n")
    """
    return set(run_python(program, path).stdout.split())


@contextlib.contextmanager
def mounted(source, target):
    """`source` at a second place, by `mount --bind`."""
    done = subprocess.run(["mount", "--bind", source, target], capture_output=True, text=True, check=False)
    if done.returncode:
        unproven(f"a second mount of a buffer needs root, here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.fixture
def roomy(path, open_engine):
    """A buffer with room for all that is sold, that nobody has open."""
    engine = open_engine(path)
    ReceiptRepository(engine).set_config("buffer_capacity", 100_000)
    engine.dispose()
    return path


@pytest.fixture
def shop(tmp_path):
    """An empty folder, and a file in it whose name has a space."""
    folder = tmp_path / "a shop"
    folder.mkdir()
    (folder / "buffer.db").touch()
    return folder


class TestTwoNames:
    def test_hard_link(self, roomy, shop):
        """A file with two names is refused under both, before anything is written."""
        second = shop / "second.db"
        os.link(roomy, second)
        told = sold(roomy, second)
        assert [1, 1] == [len(lines) for lines in told], "what one process acknowledges is lost by the other"
        for [line] in told:
            assert line.startswith("refused")
            assert "has 2 names (hard links)" in line
        second.unlink()
        [lines] = sold(roomy)
        assert {line.removeprefix("kept ") for line in lines} == ids(roomy)

    def test_mounted_file(self, roomy, shop):
        """A file that was mounted alone is refused, and nothing that was acknowledged under its real name is lost."""
        with mounted(roomy, shop / "buffer.db"):
            real, other = sold(roomy, shop / "buffer.db")
        acknowledged = {line.removeprefix("kept ") for line in (*real, *other) if line.startswith("kept")}
        assert acknowledged == ids(roomy)
        assert len(acknowledged) == INSERTS
        assert "is mounted by itself" in other[0]
        assert "Mount its folder instead" in other[0]
        assert ["buffer.db"] == [file.name for file in shop.iterdir()]

    def test_mounted_folder(self, roomy, shop):
        """A folder that was mounted as a whole has one WAL and one gate: everything is kept."""
        with mounted(roomy.parent, shop):
            told = sold(roomy, shop / roomy.name)
        acknowledged = {line.removeprefix("kept ") for lines in told for line in lines if line.startswith("kept")}
        assert len(acknowledged) == 2 * INSERTS
        assert acknowledged == ids(roomy)

    def test_reading(self, used, shop, open_engine):
        """A monitor does not read a second name either: what is in the WAL would be missing."""
        os.link(used, shop / "second.db")
        with pytest.raises(BufferStorageError, match=r"has 2 names .*Nothing was opened.*remove the other name"):
            open_engine(shop / "second.db", read_only=True)


class TestBackup:
    """A copy onto the buffer itself would replace it: refused, under whatever name."""

    def refused(self, repository, target):
        with pytest.raises(ValueError, match=r"belongs to the buffer itself; give another one. Nothing was copied"):
            repository.backup(target)

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-gate", "-journal"])
    def test_mounted_folder(self, path, shop, file_repository, suffix):
        receipt = a_receipt(file_repository)
        with mounted(path.parent, shop):
            self.refused(file_repository, shop / f"{path.name}{suffix}")
        assert {receipt.id} == ids(path)

    def test_hard_link(self, path, shop, file_repository):
        """The file has been linked since it was opened."""
        a_receipt(file_repository)
        os.link(path, shop / "second.db")
        self.refused(file_repository, shop / "second.db")

    def test_symbolic_link(self, path, shop, file_repository):
        (shop / "link.db").symlink_to(path)
        (shop / "folder").symlink_to(path.parent)
        for target in (shop / "link.db", shop / "folder" / path.name, shop / "folder" / f"{path.name}-gate"):
            self.refused(file_repository, target)


# A backup that stops in the middle, tells so, and waits.
HALF = """
import sys
from sqlalchemy import event
from kkt_buffer import ReceiptRepository, create_buffer_engine

engine = create_buffer_engine(sys.argv[1], read_only=True)

@event.listens_for(engine, "before_cursor_execute")
def stop(connection, cursor, statement, *_):
    if "page_count" in statement:
        print("in the middle", flush=True)
        sys.stdin.read()

ReceiptRepository(engine).backup(sys.argv[2])
"""


@contextlib.contextmanager
def half_a_backup(path, target):
    """A process in the middle of a backup; killed at the end of the block."""
    with start_python(HALF, path, target, stdin=-1) as process:
        assert process.stdout.readline() == "in the middle\n"
        try:
            yield
        finally:
            process.kill()


class TestOverlapping:
    def test_killed(self, used, tmp_path, file_engine, file_repository):
        """Two backups to one path at one moment: a kill of the second does not ruin what the first one completes."""
        target = tmp_path / "copies" / "copy.db"

        def second(_connection, _cursor, statement, *_):
            if "page_count" in statement:
                with half_a_backup(used, target):
                    pass

        event.listen(file_engine, "before_cursor_execute", second)
        file_repository.backup(target)
        assert target.stat().st_size
        assert report(target).is_sound

    def test_second_completes(self, used, tmp_path, file_repository):
        """The other way about: a backup that ends while another is half done is whole."""
        target = tmp_path / "copies" / "copy.db"
        with half_a_backup(used, target):
            file_repository.backup(target)
            assert report(target).is_sound
        assert report(target).is_sound

    def test_left_behind(self, used, tmp_path, file_repository):
        """What a killed backup left is removed by a later one; what another one is writing at this moment is not."""
        target = tmp_path / "copies" / "copy.db"
        with half_a_backup(used, target):
            pass
        [left] = target.parent.iterdir()
        hours_ago = time.time() - 2 * 3600
        shutil.copy(used, target.with_name("other.db"))
        with half_a_backup(used, target):
            os.utime(left, (hours_ago, hours_ago))
            file_repository.backup(target)
            assert not left.exists()
            assert 3 == len(list(target.parent.iterdir()))
