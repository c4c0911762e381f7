"""
Bits that flip in the file. SQLite has no checksums, so each document has a digest.

`KKT_BUFFER_PROOF=1` flips two thousand of each kind.
"""

import random
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from builders import PROOF, Clock, a_receipt, new_receipt

from kkt_buffer import ReceiptBufferError, ReceiptRepository, create_buffer_engine

ROUNDS = 2000 if PROOF else 100
WINDOW = 40  # bytes of a document that stand together in the file, wherever a page ends


@pytest.fixture(scope="module")
def sample(migrated_file, tmp_path_factory):
    """The bytes of a buffer, and the documents in it: of each status, some of more than a page, one completed."""
    path = Path(shutil.copy(migrated_file, tmp_path_factory.mktemp("sample") / "buffer.db"))
    engine = create_buffer_engine(path)
    repository = ReceiptRepository(engine, now=Clock())
    chance = random.Random(1)
    documents = {}
    for status in ("pending", "synced", "syncing") * 4:
        receipt = a_receipt(repository, status, fiscal_doc={"text": chance.randbytes(chance.choice((300, 5000))).hex()})
        documents[receipt.id] = receipt.fiscal_doc
    held = repository.insert_receipt(new_receipt(fiscal_doc={"text": chance.randbytes(300).hex()}), hold=True)
    repository.update_receipt_fiscal_doc(held, {"fiscalSign": 3141592653})
    documents[held] = repository.get_receipt_by_id(held).fiscal_doc
    engine.dispose()
    return path.read_bytes(), documents


@pytest.fixture
def file():
    """In memory where that can be, as hundreds of files need no disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder) / "buffer.db"


def flipped(data, position, bit):
    damaged = bytearray(data)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


class Reading:
    """What a buffer serves as intact, and whether damage is told: by an error, by `is_intact` or by a check."""

    def __init__(self, file, data, ids):
        file.write_bytes(data)
        self.served, self.is_told = {}, False
        try:
            engine = create_buffer_engine(file, read_only=True)
        except ReceiptBufferError:
            self.is_told = True
            return
        repository = ReceiptRepository(engine)
        for receipt_id in ids:
            try:
                receipt = repository.get_receipt_by_id(receipt_id)
            except ReceiptBufferError:
                self.is_told = True
            else:
                if receipt is not None and receipt.is_intact:
                    self.served[receipt_id] = receipt.fiscal_doc
        try:
            self.problems = repository.check_integrity().findings
        except ReceiptBufferError:
            self.problems = {"file": ("refused",)}
        self.is_told |= any(self.problems.values())
        engine.dispose()


@pytest.mark.slow
class TestFlippedBits:
    def test_in_a_document(self, sample, file):
        """A bit that flips in a document is found: the receipt is not intact, and the check names it."""
        data, documents = sample
        chance = random.Random()
        for _ in range(ROUNDS):
            receipt_id, document = chance.choice(list(documents.items()))
            position = -1
            while position < 0:  # a window may lie on two pages
                start = chance.randrange(len(document) - WINDOW)
                position = data.find(document[start : start + WINDOW].encode())
            reading = Reading(file, flipped(data, position + chance.randrange(WINDOW), chance.randrange(8)), documents)
            assert documents.keys() - {receipt_id} == reading.served.keys()
            assert f"the document of receipt {receipt_id} differs from its digest" in reading.problems["documents"]

    def test_anywhere(self, sample, file):
        """Wherever a bit flips, a document is served as it was stored, or the damage is told."""
        data, documents = sample
        chance = random.Random()
        told = 0
        for _ in range(ROUNDS):
            position, bit = chance.randrange(len(data)), chance.randrange(8)
            reading = Reading(file, flipped(data, position, bit), documents)
            assert reading.served.items() <= documents.items(), (position, bit)
            assert reading.is_told or reading.served == documents, (position, bit)
            told += reading.is_told
        print(f"{ROUNDS} flipped bits: {told} told, {ROUNDS - told} in what is not used")
        assert told

    def test_would_be_found(self, sample, file, monkeypatch):
        """The same rounds do find a buffer that compares no digests."""
        monkeypatch.setattr("kkt_buffer.models.is_intact", lambda document, digest: True)
        monkeypatch.setattr("kkt_buffer.operations.integrity.is_intact", lambda document, digest: True)
        with pytest.raises(AssertionError):
            self.test_anywhere(sample, file)


def test_memory(file_repository):
    """The check reads a file of any size in little memory."""
    file_repository.set_config("buffer_capacity", 1000)
    for _ in range(10):
        file_repository.insert_receipts(new_receipt(fiscal_doc={"text": "x" * 20_000}) for _ in range(100))
    tracemalloc.start()
    try:
        assert file_repository.check_integrity().is_sound
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # of 20 MB of documents
    finally:
        tracemalloc.stop()
