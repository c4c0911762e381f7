"""
Files of random and damaged bytes: only documented errors come out, and a file that is refused is not changed.

`KKT_BUFFER_PROOF=1` tries ten thousand files instead of two hundred.
"""

import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from builders import NOON, PROOF, a_receipt, new_receipt

from kkt_buffer import ReceiptBufferError, ReceiptRepository, buffer, create_buffer_engine

FILES = 10_000 if PROOF else 200


def flip(chance, data):
    for _ in range(chance.choice((1, 1, 8, 100))):
        data[chance.randrange(len(data))] = chance.randrange(256)


def flip_bit(chance, data):
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def truncate(chance, data):
    del data[chance.choice((0, 1, 15, 16, 99, 100, 511, 512, 4095, 4096, chance.randrange(len(data)))) :]


def cut_pages(chance, data):
    del data[chance.randrange(len(data) // 4096) * 4096 :]


def zero_page(chance, data):
    at = chance.randrange(len(data) // 4096) * 4096
    data[at : at + 4096] = bytes(4096)


def swap_pages(chance, data):
    one, other = (chance.randrange(len(data) // 4096) * 4096 for _ in range(2))
    data[one : one + 4096], data[other : other + 4096] = data[other : other + 4096], data[one : one + 4096]


def header(chance, data):
    data[chance.randrange(100)] = chance.choice((0, 1, 2, 255, chance.randrange(256)))


def first_page(chance, data):
    for _ in range(chance.choice((1, 5))):
        data[100 + chance.randrange(3996)] = chance.randrange(256)


def page_headers(chance, data):
    at = chance.randrange(len(data) // 4096) * 4096
    data[at + chance.randrange(12)] = chance.randrange(256)


def garbage(chance, data):
    data[:] = chance.randbytes(chance.choice((1, 100, 4096, 20_000)))


def garbage_behind(chance, data):
    data[16:] = chance.randbytes(len(data) - 16)


def grow(chance, data):
    data += chance.randbytes(chance.choice((1, 4096)))


def text_in_place(chance, data):
    """Not the structure but what is written in it: names, SQL of the schema, statuses, numbers."""
    for word in chance.sample(
        (b"pending", b"synced", b"receipts", b"CREATE", b"TRIGGER", b"buffer_capacity", b"0001"), 2
    ):
        at = data.find(word, chance.randrange(len(data)))
        if at >= 0:
            data[at : at + len(word)] = chance.randbytes(len(word))


MUTATIONS = (
    flip,
    flip_bit,
    truncate,
    cut_pages,
    zero_page,
    swap_pages,
    header,
    first_page,
    page_headers,
    garbage,
    garbage_behind,
    grow,
    text_in_place,
)


@pytest.fixture(scope="module")
def sample(migrated_file, tmp_path_factory):
    """The bytes of a buffer with receipts of every status, dead letters and events; and of a WAL that belongs to it."""
    path = Path(shutil.copy(migrated_file, tmp_path_factory.mktemp("sample") / "buffer.db"))
    engine = create_buffer_engine(path)
    repository = ReceiptRepository(engine, now=lambda: NOON)
    for status in ("pending", "failed", "synced") * 5:
        a_receipt(repository, status, fiscal_doc={"text": "x" * 700})
    engine.dispose()
    clean = path.read_bytes()
    a_receipt(repository, "failed")
    a_receipt(repository, "synced")
    wal = Path(f"{path}-wal").read_bytes()
    engine.dispose()
    return clean, wal


@pytest.fixture
def folder(tmp_path):
    """In memory where that can be, as thousands of files need no disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.mark.slow
class TestFiles:
    def use(self, path):
        """Open the file and do everything that a service does. Returns what kind of end it had."""
        first = None

        def attempt(operation):
            nonlocal first
            try:
                return operation()
            except ReceiptBufferError as error:
                first = first or error

        try:
            engine = buffer.init_buffer_db(path)
        except ReceiptBufferError:
            return "refused"
        repository = ReceiptRepository(engine, now=lambda: NOON + 400)
        ids = [receipt.id for receipt in attempt(repository.get_pending_receipts) or ()]
        operations = [
            buffer.get_buffer_status,
            buffer.list_dead_letters,
            buffer.get_events,
            lambda: buffer.get_config("buffer_capacity"),
            lambda: [receipt.to_dict() for receipt in repository.get_pending_receipts()],
            lambda: repository.get_receipts_due(2**40),
            lambda: buffer.insert_receipt(new_receipt()),
            lambda: buffer.insert_receipts([new_receipt()] * 2),
            lambda: repository.claim_pending(2),
            lambda: buffer.mark_synced(ids[0], NOON) if ids else None,
            lambda: buffer.move_to_dlq(ids[1], "fuzz") if ids[1:] else None,
            lambda: repository.requeue_all(actor="a", reason="b"),
            repository.prune,
        ]
        for operation in operations:
            attempt(operation)
        buffer.close_buffer_db()
        return "worked" if first is None else "partly"

    def go(self, folder, sample, number):
        """
        One case: mutate, use, and compare a file that was refused.

        Returns what kind of end it had, and what is wrong with that.
        """
        chance = random.Random(number)
        database, wal = bytearray(sample[0]), bytearray(sample[1])
        with_wal = chance.random() < 0.3
        target = wal if with_wal and chance.random() < 0.6 else database
        names = []
        for mutation in chance.sample(MUTATIONS, chance.choice((1, 1, 1, 2))):
            if len(target) >= 8192:
                mutation(chance, target)
                names.append(mutation.__name__)
        path = folder / f"{number}.db"
        path.write_bytes(database)
        if with_wal:
            Path(f"{path}-wal").write_bytes(wal)
        wrong = None
        try:
            end = self.use(path)
        except Exception as error:  # noqa: BLE001 (what comes out is what is looked for)
            end, wrong = "another error", f"{type(error).__name__}: {error}"[:150]
        finally:
            buffer.close_buffer_db()
        if end == "refused" and not with_wal and path.read_bytes() != database:
            end = "changed"
        for file in folder.glob(f"{number}.db*"):
            file.unlink()
        return end, wrong and f"case {number}, {' + '.join(names)}: {wrong}"

    def tally(self, folder, sample, files):
        began = time.monotonic()
        cases = [self.go(folder, sample, number) for number in range(files)]
        ends = Counter(end for end, _ in cases)
        print(f"{files} files, {(time.monotonic() - began) / files * 1000:.1f} ms each: {dict(ends)}")
        return ends, [wrong for _, wrong in cases if wrong]

    def test_mutated(self, sample, folder):
        """
        A damaged file is used as far as it goes, or refused and left as it is; nothing crashes or hangs.

        Only documented errors come out.
        """
        ends, wrong = self.tally(folder, sample, FILES)
        assert [] == wrong
        assert ends["changed"] == 0
        assert all(ends[end] for end in ("refused", "partly", "worked"))

    @pytest.mark.parametrize("fault", ["changed", "another error"])
    def test_would_be_found(self, sample, folder, monkeypatch, fault):
        """The same check does find an opening that repairs what it refuses, or that lets other errors out."""
        init = buffer.init_buffer_db

        def wrong(path):
            try:
                return init(path)
            except ReceiptBufferError as error:
                if fault == "another error":
                    raise KeyError(str(error)) from error
                path.write_bytes(b"repaired")
                raise

        monkeypatch.setattr(buffer, "init_buffer_db", wrong)
        assert self.tally(folder, sample, 20)[0][fault]
