"""How often an insert waits for the disk, and what for: a count, so it is the same on every machine."""

import shutil
import subprocess
import sys

import pytest
import wal
from builders import unmeasured, unproven

# Syncs of two files of its own mark where the inserts begin and end.
PROGRAM = """
import os, sys
from pathlib import Path
from samples import a_document_of
from kkt_buffer import ReceiptRepository, create_buffer_engine

def mark(name):
    with Path(name).open("w") as file:
        os.fsync(file.fileno())

engine = create_buffer_engine(sys.argv[1])
repository = ReceiptRepository(engine)
repository.set_config("buffer_capacity", 2000)
receipt = {"pos_id": "till-1", "fiscal_doc": a_document_of(2048)}
mark("begin")
for _ in range(1000):
    repository.insert_receipt(receipt)
mark("end")
engine.dispose()
"""


@pytest.fixture
def lines(path, tmp_path):
    """What strace tells of 1,000 inserts, between the two marks."""
    if not shutil.which("strace"):
        unproven("the number of syncs: there is no strace")
    log = tmp_path / "log"
    command = wal.strace("pwrite64,fsync,fdatasync", log=log)
    environment = unmeasured() | {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, path], cwd=tmp_path, env=environment, check=False, timeout=120
    )
    if done.returncode:
        unproven("the number of syncs: strace is not permitted")
    found = log.read_text().splitlines()
    begin, end = (next(i for i, line in enumerate(found) if f"/{mark}>" in line) for mark in ("begin", "end"))
    return found[begin + 1 : end]


def test_insert_receipt(lines, path):
    """
    One sync for each of 1,000 commits, and three for each checkpoint, of which there is one in some nine commits.

    tests/README.md says what each of them is for.
    """
    found = wal.syncs(lines, path)
    checkpoints = found[wal.CHECKPOINT]
    print(f"1,000 inserts: {found.total()} syncs. " + "; ".join(f"{kind} {n}" for kind, n in found.items()))
    assert found[wal.COMMIT] == 1000
    assert found[wal.BEFORE_CHECKPOINT] == checkpoints
    assert abs(found[wal.RESTART] - checkpoints) <= 1
    assert found[wal.OTHER] == 0
    assert found.total() <= 1350
