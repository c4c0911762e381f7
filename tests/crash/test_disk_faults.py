"""
A disk that is full, fails, or turns read-only under a buffer in use: no receipt is acknowledged that is not stored.

The faults are real where the machine lets them be: a small tmpfs, strace between SQLite and the kernel, a remount.
"""

import contextlib
import os
import shutil
import sqlite3
import subprocess

import pytest
from builders import PROOF, an_id, new_receipt, run_python, start_python, unproven
from sqlalchemy import text

from kkt_buffer import (
    BufferStorageError,
    ReceiptBufferError,
    ReceiptRepository,
    buffer,
    create_buffer_engine,
    upgrade,
)

# Stores the receipts whose ids come in by the standard input, and answers each. `sys.argv[2]` is what is wrong with it.
SERVICE = """
import sys
import kkt_buffer.sqlite.database as layer
from kkt_buffer import ReceiptBufferError, ReceiptRepository, create_buffer_engine

path, fault = sys.argv[1:]
if fault == "does not sync":
    layer.DURABLE = tuple(p._replace(value=0, reads=0) if p.name == "synchronous" else p for p in layer.DURABLE)
repository = ReceiptRepository(create_buffer_engine(path))
repository.get_buffer_status()
print("ready", flush=True)
for line in sys.stdin:
    try:
        repository.insert_receipt(
            {"id": line.strip(), "pos_id": "till-1", "fiscal_doc": {"text": "x" * 3000}}, exist_ok=True
        )
        answer = "kept"
    except ReceiptBufferError as error:
        answer = " ".join(f"{type(error).__name__}: {error}".split())
    print("kept" if fault == "acknowledges early" else answer, flush=True)
"""


def stored(path):
    """The ids that another process finds."""
    program = (
        "import sqlite3, sys; print(*(r[0] for r in sqlite3.connect(sys.argv[1]).execute('SELECT id FROM receipts')))"
    )
    return run_python(program, path).stdout.split()


class Service:
    """A process that stores receipts, and what it said of each."""

    def __init__(self, stack, path, fault="nothing"):
        self.path = path
        self.process = stack.enter_context(start_python(SERVICE, path, fault, stdin=-1))
        stack.callback(self.process.kill)
        assert self.process.stdout.readline() == "ready\n"
        self.kept, self.refused = [], {}

    def insert(self, receipt_id=None):
        receipt_id = receipt_id or an_id()
        self.process.stdin.write(f"{receipt_id}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer == "kept":
            self.kept.append(receipt_id)
            self.refused.pop(receipt_id, None)
        else:
            self.refused[receipt_id] = answer

    def check(self):
        """What was acknowledged is there, once; what is there without that was refused, which a caller may repeat."""
        found = stored(self.path)
        assert set(self.kept) <= set(found)
        assert len(set(found)) == len(found)
        assert set(found) <= {*self.kept, *self.refused}

    def repeat(self):
        """When the fault is over, what was refused can be repeated, by the same process."""
        for receipt_id in list(self.refused):
            self.insert(receipt_id)
        assert {} == self.refused
        self.check()
        assert sorted(self.kept) == sorted(stored(self.path))


@contextlib.contextmanager
def injected(process, faults, log):
    """Make system calls of a running process fail; yields a function that counts how many did."""
    if not shutil.which("strace"):
        unproven("I/O errors: there is no strace")
    calls = ",".join({fault.partition(":")[0].replace("+", ",") for fault in faults})
    options = [f"--inject={fault.replace('+fdatasync', ',fdatasync')}" for fault in faults]
    tracer = subprocess.Popen(
        ["strace", "-f", "-o", log, "-p", str(process.pid), "-e", f"trace={calls}", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    said = tracer.stderr.readline()
    try:
        if "attached" not in said:
            unproven(f"I/O errors: strace is not permitted ({said.strip()})")
        yield lambda: log.read_text().count("(INJECTED)")
    finally:
        tracer.terminate()
        tracer.communicate()


SYNC = "fsync+fdatasync"
FOR_GOOD = (
    "pwrite64:error=EIO",
    "pwrite64:error=ENOSPC",
    "pwrite64:error=EDQUOT",
    "pwrite64:error=EROFS",
    f"{SYNC}:error=EIO",
    f"{SYNC}:error=ENOSPC",
)
NOW_AND_THEN = (
    "pwrite64:error=EIO:when=3+97",
    "pwrite64:error=ENOSPC:when=10+101",
    "pread64:error=EIO:when=1+2",
    f"{SYNC}:error=EIO:when=1+2",
    f"{SYNC}:error=EIO:when=2+5",
    *(f"pwrite64:error=EIO:when={number}" for number in range(1, 25) if PROOF),
    *(f"{SYNC}:error=EIO:when={number}" for number in range(1, 9) if PROOF),
)


@pytest.mark.slow
class TestErrors:
    """Errors of the kernel, at the system calls that SQLite makes."""

    def go_through(self, path, tmp_path, fault, service_fault="nothing", inserts=30):
        log = tmp_path / "strace.log"
        with contextlib.ExitStack() as stack:
            service = Service(stack, path, service_fault)
            service.insert()
            with injected(service.process, [fault], log) as met:
                for _ in range(inserts):
                    service.insert()
                refused = dict(service.refused)
                assert met()
            service.check()
            service.repeat()
            service.insert()
            service.repeat()
        print(f"{fault}: {met()} calls failed, {len(refused)} of {inserts} inserts refused")
        return refused

    @pytest.mark.parametrize("fault", FOR_GOOD)
    def test_for_good(self, path, tmp_path, fault):
        """While nothing can be written or synced, nothing is acknowledged; then the service goes on by itself."""
        refused = self.go_through(path, tmp_path, fault, inserts=10)
        assert len(refused) == 10
        for message in refused.values():
            assert message.startswith("BufferStorageError:")
            assert "This operation was not stored; what was acknowledged before is safe." in message

    @pytest.mark.parametrize("fault", NOW_AND_THEN)
    def test_now_and_then(self, path, tmp_path, fault):
        """A call that fails in between, in a commit or a checkpoint, takes no other receipt with it."""
        refused = self.go_through(path, tmp_path, fault)
        assert len(refused) < 30
        assert all(message.startswith("BufferStorageError:") for message in refused.values())

    @pytest.mark.parametrize(
        ("service_fault", "fault"),
        [("acknowledges early", "pwrite64:error=EIO"), ("does not sync", f"{SYNC}:error=EIO")],
    )
    def test_would_be_found(self, path, tmp_path, service_fault, fault):
        """A service that acknowledges before it has stored, or that never syncs, does not pass."""
        with pytest.raises(AssertionError):
            self.go_through(path, tmp_path, fault, service_fault, inserts=10)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        unproven(f"a full disk, a read-only mount: this user may not mount ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """Leave no room on a file system."""
    with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(b"x" * 512)


class TestFullDisk:
    @pytest.fixture
    def repository(self, small_disk, path):
        engine = create_buffer_engine(shutil.copy(path, small_disk / "buffer.db"))
        repository = ReceiptRepository(engine)
        repository.set_config("buffer_capacity", 10_000)
        yield repository
        engine.dispose()

    def fill_up(self, repository):
        """Insert until the disk is full. Returns what was acknowledged."""
        kept = []
        with pytest.raises(BufferStorageError, match="the disk is full .* Make room and try again; no restart"):
            while True:
                kept.append(repository.insert_receipt(new_receipt(fiscal_doc={"text": "x" * 5000})))
        return kept

    @pytest.mark.parametrize("by", ["itself", "others"])
    def test_insert(self, repository, small_disk, by):
        """A disk that the buffer or somebody else fills: refused, readable, and at work again when there is room."""
        kept = [repository.insert_receipt(new_receipt())]
        if by == "others":
            fill(small_disk)
        kept += self.fill_up(repository)
        assert sorted(kept) == sorted(stored(small_disk / "buffer.db"))
        assert len(kept) == repository.get_buffer_status().pending
        with pytest.raises(BufferStorageError, match="the disk is full"):
            repository.insert_receipts([new_receipt(fiscal_doc={"text": "x" * 5000})] * 2)
        (small_disk / "ballast").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
        kept += [repository.insert_receipt(new_receipt(fiscal_doc={"text": "x" * 5000})) for _ in range(50)]
        assert sorted(kept) == sorted(stored(small_disk / "buffer.db"))
        print(f"filled by {by}: {len(kept) - 50} kept before, 50 after")

    def test_restart(self, repository, small_disk, open_engine):
        """A service that is started again on the disk that it has filled finds all that it acknowledged."""
        kept = self.fill_up(repository)
        repository.close()
        with contextlib.closing(open_engine(small_disk / "buffer.db").raw_connection()) as other:
            assert len(kept) == other.cursor().execute("SELECT COUNT(*) FROM receipts").fetchone()[0]
        assert len(kept) == repository.get_buffer_status().pending

    def test_no_room_to_open(self, repository, small_disk):
        """Without room for a WAL a buffer is refused with the reason, and not touched; with room it is opened."""
        repository.insert_receipt(new_receipt())
        repository.close()
        fill(small_disk)
        with pytest.raises(BufferStorageError, match="disk") as refusal:
            repository.get_buffer_status()
        print(refusal.value)
        (small_disk / "ballast").unlink()
        assert repository.get_buffer_status().pending == 1

    def test_new(self, small_disk):
        """A new buffer for which there is no room is refused; with room, the same call succeeds."""
        fill(small_disk)
        with pytest.raises(ReceiptBufferError, match="disk") as refusal:
            buffer.init_buffer_db(small_disk / "buffer.db")
        print(refusal.value)
        (small_disk / "ballast").unlink()
        buffer.init_buffer_db(small_disk / "buffer.db")
        try:
            buffer.insert_receipt(new_receipt())
        finally:
            buffer.close_buffer_db()

    @pytest.mark.parametrize("room", range(0, 40 if PROOF else 12, 1 if PROOF else 3))
    def test_upgrade(self, small_disk, tmp_path, room):
        """An upgrade that the disk has no room for leaves nothing half made: with room, the next one succeeds."""
        engine = create_buffer_engine(small_disk / "buffer.db")
        try:
            fill(small_disk)
            os.truncate(small_disk / "ballast", (small_disk / "ballast").stat().st_size - room * 16_384)
            with contextlib.suppress(ReceiptBufferError):
                upgrade(engine)
            (small_disk / "ballast").unlink()
            upgrade(engine)
            ReceiptRepository(engine).insert_receipt(new_receipt())
        finally:
            engine.dispose()


class TestFileSizeLimit:
    def test_limit(self, path):
        """A limit on the size of files (`ulimit -f`) is an I/O error; without it the same process goes on."""
        program = """
            import resource, sys
            from kkt_buffer import BufferStorageError, ReceiptRepository, create_buffer_engine
            repository = ReceiptRepository(create_buffer_engine(sys.argv[1]))
            repository.set_config("buffer_capacity", 10_000)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
            receipt = {"pos_id": "till-1", "fiscal_doc": {"text": "x" * 3000}}
            kept = []
            try:
                while True:
                    kept.append(repository.insert_receipt(receipt))
            except BufferStorageError as error:
                assert "This operation was not stored" in str(error), error
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            kept += [repository.insert_receipt(receipt) for _ in range(20)]
            print(*kept)
        """
        kept = run_python(program, path).stdout.split()
        assert len(kept) > 20
        assert sorted(kept) == sorted(stored(path))


class TestReadOnly:
    def test_mount(self, small_disk, path):
        """A file system that became read-only refuses; the engine goes on when it can be written again."""
        engine = create_buffer_engine(shutil.copy(path, small_disk / "buffer.db"))
        repository = ReceiptRepository(engine)
        kept = [repository.insert_receipt(new_receipt())]
        engine.dispose()  # the kernel does not remount while files are open for writing
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(BufferStorageError, match=r"[Rr]ead-only|cannot be opened"):
            repository.insert_receipt(new_receipt())
        with pytest.raises(BufferStorageError, match=r"[Rr]ead-only|cannot be opened|cannot be used"):
            create_buffer_engine(small_disk / "other.db")
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        kept.append(repository.insert_receipt(new_receipt()))
        engine.dispose()
        assert sorted(kept) == sorted(stored(small_disk / "buffer.db"))

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
    def test_folder(self, path, tmp_path_factory):
        """So does a folder in which nothing can be made any more, when the files beside the database are not there."""
        for folder in [*path.parents[:4]]:
            folder.chmod(0o755)
        for file in path.parent.iterdir():
            os.chown(file, 65534, 65534)
        os.chown(path.parent, 65534, 65534)
        program = """
            import os, sys
            from kkt_buffer import BufferStorageError, ReceiptRepository, create_buffer_engine
            os.setuid(65534)
            folder = os.path.dirname(sys.argv[1])
            engine = create_buffer_engine(sys.argv[1])
            repository = ReceiptRepository(engine)
            receipt = {"pos_id": "till-1", "fiscal_doc": "{}"}
            kept = [repository.insert_receipt(receipt)]
            os.chmod(folder, 0o555)
            kept.append(repository.insert_receipt(receipt))  # the files are open
            engine.dispose()
            try:
                kept.append(repository.insert_receipt(receipt))
            except BufferStorageError as error:
                print(error, file=sys.stderr)
            os.chmod(folder, 0o755)
            kept.append(repository.insert_receipt(receipt))
            print(*kept)
        """
        done = run_python(program, path)
        assert sorted(done.stdout.split()) == sorted(stored(path))
        assert "Check" in done.stderr or len(done.stdout.split()) == 4


OWN = text("INSERT INTO own VALUES (zeroblob(1000000))")


class TestRolledBackBySqlite:
    """On a full disk SQLite may roll the whole transaction back, while the program believes to be inside it."""

    @pytest.fixture
    def full(self, path):
        """A repository whose database may grow by little; its one connection keeps that limit."""
        engine = create_buffer_engine(path, pool_size=1)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE own (x)"))
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 3}")
        yield ReceiptRepository(engine)
        engine.dispose()

    def test_driver_acknowledges(self, tmp_path):
        """The driver alone: the first row is gone, the last one is stored without being asked, commit() succeeds."""
        with contextlib.closing(sqlite3.connect(tmp_path / "plain.db", isolation_level=None)) as connection:
            connection.execute("CREATE TABLE own (x)")
            connection.execute("PRAGMA max_page_count = 5")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO own VALUES ('first')")
            with pytest.raises(sqlite3.OperationalError, match="full"):
                connection.execute("INSERT INTO own VALUES (zeroblob(1000000))")
            connection.execute("INSERT INTO own VALUES ('last')")
            connection.commit()
            assert [("last",)] == connection.execute("SELECT x FROM own").fetchall()

    def test_not_acknowledged(self, full):
        """The commit raises, and the buffer goes on."""
        with pytest.raises(BufferStorageError, match="had to roll the transaction back"):
            with full.transaction() as session:
                full.insert_receipt(new_receipt())
                with contextlib.suppress(BufferStorageError):
                    session.execute(OWN)
        assert full.get_buffer_status().pending == 0
        full.insert_receipt(new_receipt())
        assert full.get_buffer_status().pending == 1

    @pytest.mark.parametrize("nested", [False, True])
    def test_nothing_stored(self, full, nested):
        """What the program did after it inside the same block is not stored either, and every error is ours."""
        with pytest.raises(BufferStorageError, match="roll the transaction back"):
            with full.transaction() as session:
                full.insert_receipt(new_receipt())
                with contextlib.suppress(ReceiptBufferError):
                    with full.transaction() if nested else contextlib.nullcontext():
                        session.execute(OWN)
                full.insert_receipt(new_receipt())
        assert full.get_buffer_status().pending == 0

    @pytest.mark.parametrize("room", range(30 if PROOF else 12))
    def test_any_room(self, full, room):
        """Wherever the room ends inside a batch, it is stored whole or not at all."""
        with full.transaction() as session:
            pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar()
        with full.transaction() as session:
            session.connection().exec_driver_sql(f"PRAGMA max_page_count = {pages + room}")
        batch = [new_receipt(fiscal_doc={"text": "x" * 3000}) for _ in range(5)]
        try:
            kept = full.insert_receipts(batch)
        except BufferStorageError:
            kept = []
        assert len(kept) == full.get_buffer_status().pending == len(full.get_pending_receipts())
