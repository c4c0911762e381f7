"""The model of the disk by itself: what a sync covers, what a crash may leave, and what a recording refuses."""

import pytest
from crash.disk import Disk
from crash.images import CORNERS, draw
from crash.operations import Inode, Naming, Recording, Sync, Truncate, Write
from crash.strace import Parser, UnknownOperationError, _escaped

FILE = 1


def a_disk(*operations, moment=1000, content=b"", named=True):
    """A folder with one file, after these operations."""
    entries = {"f": FILE} if named else {}
    inodes = {0: Inode(0, "", entries=entries), FILE: Inode(FILE, "f", content)}
    disk = Disk(Recording("f", inodes, list(operations)))
    disk.advance(moment)
    return disk


def contents(disk, seeds=400):
    """All that the file is in any image; None where it is not there."""
    return {draw(disk, seed).get("f") for seed in range(seeds)}


class TestSync:
    def test_covers(self):
        """What had ended before it began."""
        disk = a_disk(Write(1, 2, 1, FILE, 0, b"one"), Sync(3, 4, 1, FILE))
        assert contents(disk) == {b"one"}

    def test_not_ended(self):
        """A sync that has not ended covers nothing for certain."""
        disk = a_disk(Write(1, 2, 1, FILE, 0, b"one"), Sync(3, 4, 1, FILE), moment=4)
        assert contents(disk) >= {b"", b"one"}

    def test_write_not_ended(self):
        """Nor is a write covered that had not ended when the sync began."""
        disk = a_disk(Write(1, 4, 1, FILE, 0, b"one"), Sync(3, 5, 2, FILE))
        assert contents(disk) >= {b"", b"one"}

    def test_other_file(self):
        """Syncing a file does nothing for its name."""
        made = Naming(1, 2, 1, 0, {"f": FILE})
        disk = a_disk(made, Write(3, 4, 1, FILE, 0, b"one"), Sync(5, 6, 1, FILE), named=False)
        assert contents(disk) == {None, b"one"}
        disk = a_disk(made, Write(3, 4, 1, FILE, 0, b"one"), Sync(5, 6, 1, FILE), Sync(7, 8, 1, 0), named=False)
        assert contents(disk) == {b"one"}

    def test_order(self):
        """What is certain stays behind what is not, if that began before it."""
        slow, quick = Write(1, 6, 1, FILE, 0, b"aa"), Write(2, 3, 2, FILE, 1, b"bb")
        assert contents(a_disk(slow, quick, Sync(4, 5, 2, FILE))) >= {b"\0bb", b"abb"}


class TestImage:
    def test_corners(self):
        """Nothing or all."""
        disk = a_disk(Write(1, 2, 1, FILE, 0, b"new"), Naming(3, 4, 1, 0, {"f": None}), content=b"old")
        corners = [draw(disk, seed) for seed in range(CORNERS)]
        assert [{"f": b"old"}, {}, {}, {"f": b"new"}] == corners

    def test_torn(self):
        """A write is torn at sectors, wherever it begins, and nowhere else."""
        found = contents(a_disk(Write(1, 2, 1, FILE, 500, b"n" * 600), content=b"o" * 1200))
        sectors = {(one[500:512], one[512:1024], one[1024:1100]) for one in found}
        whole = {tuple(text * size for text, size in zip(texts, (12, 512, 76), strict=True)) for texts in EIGHT}
        assert whole == sectors

    def test_reordered(self):
        """The later of two writes may be the first on disk."""
        first, second = Write(1, 2, 1, FILE, 0, b"aa"), Write(3, 4, 1, FILE, 1, b"bb")
        assert contents(a_disk(first, second)) >= {b"", b"aa", b"\0bb", b"abb", b"aab"}

    def test_size(self):
        """A file may have its new size without its new data, and the old size after it was cut."""
        assert contents(a_disk(Write(1, 2, 1, FILE, 0, b"one"))) >= {b"", b"one", b"\0\0\0"}
        assert contents(a_disk(Truncate(1, 2, 1, FILE, 1), content=b"one")) == {b"one", b"o"}

    def test_names(self):
        """Each change of a folder is there or not."""
        inodes = {0: Inode(0, "", entries={"f": 1}), 1: Inode(1, "f", b"old"), 2: Inode(2, "f", b"new")}
        changes = [Naming(1, 2, 1, 0, {"f": None}), Naming(3, 4, 1, 0, {"f": 2})]
        disk = Disk(Recording("f", inodes, changes))
        disk.advance(9)
        assert contents(disk) == {b"old", None, b"new"}

    def test_repeated(self):
        """The same seed gives the same image."""
        disk = a_disk(*(Write(2 * n, 2 * n + 1, 1, FILE, 300 * n, b"x" * 700) for n in range(9)))
        assert [draw(disk, seed) for seed in range(50)] == [draw(disk, seed) for seed in range(50)]


EIGHT = [(a, b, c) for a in (b"o", b"n") for b in (b"o", b"n") for c in (b"o", b"n")]


class TestParser:
    @pytest.fixture
    def parse(self, tmp_path):
        """Read what strace would say; `F` and `D` stand for the file and its folder."""
        folder = tmp_path / "disk"
        folder.mkdir()
        (folder / "f").write_bytes(b"old")

        def parse(*lines):
            recording = Recording("f")
            parser = Parser(folder, tmp_path / "acknowledged", recording)
            names = {"F": _escaped(str(folder / "f")), "D": _escaped(str(folder)), "B": "\\x62"}
            opened = '9 openat(AT_FDCWD<>, "{F}", O_RDWR) = 3<{F}>'
            parser.parse([line.format(**names) + "\n" for line in (opened, *lines)])
            return recording

        return parse

    def test_operations(self, parse):
        """Each call, with its moments."""
        recording = parse(
            '9 pwrite64(3<{F}>, "{B}{B}", 2, 7) = 2',
            "9 ftruncate(3<{F}>, 5) = 0",
            "9 fdatasync(3<{F}>) = 0",
            '9 rename("{F}", "{D}\\x2f{B}") = 0',
            '9 unlink("{D}\\x2f{B}") = 0',
            '9 mkdir("{F}", 0777) = -1 EEXIST (File exists)',
        )
        expected = [
            Write(2, 3, 9, 1, 7, b"bb"),
            Truncate(4, 5, 9, 1, 5),
            Sync(6, 7, 9, 1),
            Naming(8, 9, 9, 0, {"b": 1, "f": None}),
            Naming(10, 11, 9, 0, {"b": None}),
        ]
        assert expected == recording.operations
        assert recording.inodes[1].content == b"old"

    def test_unfinished(self, parse):
        """A call that another thread cuts in two begins and ends where it does."""
        recording = parse(
            "9 fsync(3<{F}> <unfinished ...>",
            '8 pwrite64(3<{F}>, "{B}", 1, 0) = 1',
            "9 <... fsync resumed>) = 0",
        )
        assert [Sync(2, 7, 9, 1), Write(4, 5, 8, 1, 0, b"b")] == recording.operations

    @pytest.mark.parametrize(
        "line",
        [
            "9 fallocate(3<{F}>, 0, 0, 4096) = 0",
            "strace: out of its depth",
            '9 write(3<{F}>, "{B}", 1) = 1',
            '9 pwrite64(3<{F}>, "{B}"..., 2, 7) = 2',
            '9 pwrite64(3<{F}>, "{B}", 1, 7) = -1 ENOSPC (No space left on device)',
            "9 fsync(3<{F}>) = -1 EIO (Input/output error)",
            "9 fsync(3<{F}> <unfinished ...>",
            "9 copy_file_range(4</etc/passwd>, NULL, 3<{F}>, NULL, 10, 0) = 10",
            "9 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3<{F}>, 0) = 0x7f8df2b4d000",
            "9 dup(3<{F}>) = 4<{F}>",
            "9 fcntl(3<{F}>, F_DUPFD_CLOEXEC, 0) = 4<{F}>",
            '9 unlinkat(4<{D}>, "{B}", 0) = 0',
            '9 link("{F}", "{D}{B}") = 0',
            '9 symlink("{F}", "/elsewhere") = 0',
            '9 truncate("{F}", 0) = 0',
            '9 open("{F}", O_RDWR) = 4<{F}>',
            "9 ioctl(3<{F}>, FICLONE, 4) = 0",
            "9 vfork() = 10",
            "9 clone(child_stack=NULL, flags=SIGCHLD) = 10",
            "9 io_uring_setup(8, 0x7f) = 4",
        ],
    )
    def test_unknown(self, line, parse):
        """A recording of something that the model does not know fails."""
        with pytest.raises(UnknownOperationError):
            parse(line)
