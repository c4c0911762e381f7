"""
Power loss: whatever a disk may have kept of what was not synced, no acknowledged receipt is missing.

A real writer is recorded by strace; of its operations disk images are made, and each is opened and looked at. That the
harness would notice is shown by taking away, one by one, what durability stands on. `KKT_BUFFER_PROOF=1` makes 50,000
images, and fails where strace cannot be had.
"""

import itertools
import math
import multiprocessing
import os
import pickle
import random
import shutil
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from alembic import command
from builders import NOON, an_id
from crash.check import examine, known_facts, share
from crash.operations import Sync, Write
from crash.strace import StraceMissingError, record
from crash.writer import EARLY

from kkt_buffer import create_buffer_engine, migrate

DEEP = bool(os.environ.get("KKT_BUFFER_PROOF"))
WORKERS = 2
DATABASE = {"first start": "shop/till/buffer.db", "upgrade": "buffer.db"}
IMAGES = {"first start": 35_000, "upgrade": 15_000} if DEEP else {"first start": 1400, "upgrade": 600}
EACH = 12 if DEEP else 4

pytestmark = pytest.mark.slow


def old_buffer(path):
    """A buffer of the earlier release, in the journal mode that SQLite files have by default."""
    engine = create_buffer_engine(path)
    command.upgrade(migrate._config(engine), "0001")
    with engine.begin() as connection:
        for number in range(60):
            status = ("pending", "syncing", "synced", "failed")[number % 4]
            receipt = (an_id(), NOON, NOON, number, f'{{"n": {number}}}')
            connection.exec_driver_sql(
                "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)"
                " VALUES (?, 'an old till', ?, ?, ?, ?)",
                receipt,
            )
            if status == "failed":
                connection.exec_driver_sql(
                    "INSERT INTO dlq (id, original_receipt_id, failed_at, reason, fiscal_doc, retry_attempts)"
                    " SELECT ?, id, created_at, 'rejected', fiscal_doc, 3 FROM receipts WHERE id = ?",
                    (an_id(), receipt[0]),
                )
            delivered = ", hlc_server_time = 1, synced_at = created_at" if status == "synced" else ""
            connection.exec_driver_sql(
                f"UPDATE receipts SET status = '{status}'{delivered} WHERE id = ?", (receipt[0],)
            )
    engine.dispose()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Records a day, once: what was done, and what a buffer knows from the start."""
    recordings = {}

    def a_day(day, fault=""):
        if (day, fault) not in recordings:
            folder = tmp_path_factory.mktemp("recorded")
            disk, twin = folder / "disk", folder / "twin.db"
            disk.mkdir()
            if day == "upgrade":
                old_buffer(disk / DATABASE[day])
                shutil.copy(disk / DATABASE[day], twin)
            try:
                recording = record(disk, DATABASE[day], day, fault)
            except StraceMissingError as error:
                message = f"NOT PROVEN: that a power loss takes no acknowledged receipt. {error}"
                (pytest.fail if DEEP else pytest.skip)(message)
            recordings[day, fault] = recording, known_facts(twin)
        return recordings[day, fault]

    return a_day


def acknowledged(recording):
    """The moments of acknowledgements, each just after it."""
    return [one.began + 1 for one in recording.acknowledgements]


def hunt(recording, known, moments, most=600):
    """Look for a bad image at these moments; return it, and how many it took."""
    chance = random.Random(1)
    looked = 0
    while looked < most:
        for finding in examine(recording, known, chance.sample(moments, min(12, len(moments))), 6):
            looked += 1
            if finding.complaints:
                return finding, looked
    return None, looked


def assert_noticed(what, recording, known, moments):
    finding, looked = hunt(recording, known, moments)
    assert finding is not None, f"{what}: {looked} images, none of them bad"
    print(f"\n{what}: bad at image {looked}: {str(finding)[:200]}")


@pytest.mark.parametrize("day", DATABASE)
def test_nothing_lost(day, recorded, tmp_path, monkeypatch):
    """Every image opens, is whole, has all that was acknowledged and nothing by halves, and goes on."""
    recording, known = recorded(day)
    (tmp_path / "recording").write_bytes(pickle.dumps((recording, known)))
    chance = random.Random(1)
    crucial = [sync.ended for sync in recording.syncs()] + acknowledged(recording)
    anywhere = [one.began + 1 for one in recording.operations]
    wanted = IMAGES[day] // EACH
    moments = sorted({*crucial, *chance.sample(anywhere, min(wanted, len(anywhere)))})
    for name in [name for name in os.environ if name.startswith("COV")]:
        monkeypatch.delenv(name)  # the workers' coverage is not wanted, it doubles their time
    started = time.monotonic()
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(share, tmp_path / "recording", moments[number::8], EACH) for number in range(8)]
        findings = [finding for one in shares for finding in one.result()]
    bad = [finding for finding in findings if finding.complaints]
    images = len({finding.fingerprint for finding in findings})
    print(
        f"\n{day}: {images} images ({len(findings)} with their moments) of {len(recording.operations)} operations,"
        f" {len(recording.syncs())} syncs, {len(recording.acknowledgements)} acknowledgements: {len(bad)} bad,"
        f" {time.monotonic() - started:.0f} s"
    )
    assert [] == [str(finding) for finding in bad], f"the recording is {tmp_path / 'recording'}"
    assert images >= IMAGES[day]


class TestHarness:
    """What durability stands on is taken away, and the harness notices."""

    @pytest.mark.parametrize("fault", ["synchronous=NORMAL", "folders not synced", EARLY])
    def test_faulty_writer(self, fault, recorded):
        recording, known = recorded("first start", fault)
        assert_noticed(fault, recording, known, acknowledged(recording))

    @pytest.mark.parametrize("day", DATABASE)
    @pytest.mark.parametrize("kind", ["wal", "database", "folder", "journal"])
    def test_class_of_syncs(self, kind, day, recorded):
        """Without the syncs of one kind of files."""
        recording, known = recorded(day)
        syncs = recording.syncs(kind)
        assert syncs
        moments = [one.began + 1 for one in recording.operations]
        if kind == "journal":
            moments = [one for one in moments if one <= syncs[-1].ended + 1000]
        assert_noticed(f"{day}, no syncs of {kind}", recording.without(*syncs), known, moments)
