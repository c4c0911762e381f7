"""
Power loss: whatever a disk may have kept of what was not synced, no acknowledged receipt is missing.

A real writer is recorded by strace; of its operations disk images are made, and each is opened and looked at. That the
harness would notice is shown by taking away, one by one, what durability stands on. `KKT_BUFFER_PROOF=1` makes 50,000
images, and fails where strace cannot be had.
"""

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
from crash import removals
from crash.check import examine, judge, known_facts, share
from crash.operations import Naming, Truncate, Write
from crash.strace import StraceMissingError, record
from crash.writer import EARLY

from kkt_buffer import create_buffer_engine, migrate

DEEP = bool(os.environ.get("KKT_BUFFER_PROOF"))
WORKERS = 2
DATABASE = {"first start": "shop/till/buffer.db", "upgrade": "buffer.db"}
IMAGES = {"first start": 35_000, "upgrade": 15_000} if DEEP else {"first start": 350, "upgrade": 150}
EACH = 15 if DEEP else 2  # at one moment
ORDINARY = 13 if DEEP else 4  # there may be fewer: so many are counted on
KINDS = {"wal", "database", "folder", "journal"}
PARTS = 8

pytestmark = pytest.mark.slow


def old_buffer(path):
    """A buffer of the earlier release, in the journal mode that SQLite files have by default."""
    engine = create_buffer_engine(path)
    command.upgrade(migrate.alembic_config(engine), "0001")
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


def not_proven(error, *, deep):
    message = f"NOT PROVEN: that a power loss takes no acknowledged receipt. {error}"
    (pytest.fail if deep else pytest.skip)(message)


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
                not_proven(error, deep=DEEP)
            recordings[day, fault] = recording, known_facts(twin)
        return recordings[day, fault]

    return a_day


def moments_of(recording, ordinary):
    """The ends of all syncs, when most is pending; all acknowledgements, when most is promised; and others."""
    chance = random.Random(1)
    crucial = [sync.ended for sync in recording.syncs()] + [one.began + 1 for one in recording.acknowledgements]
    anywhere = [one.began + 1 for one in recording.operations]
    return sorted({*crucial, *chance.sample(anywhere, min(ordinary, len(anywhere)))})


def hunt(recording, known, removal, most=600):
    """Leave the syncs out and look for a bad image; returns it, and how many it took."""
    chance = random.Random(1)
    without = recording.without(*removal.syncs)
    looked = 0
    while looked < most:
        for finding in examine(without, known, chance.sample(removal.moments, min(12, len(removal.moments))), 6):
            looked += 1
            if finding.complaints:
                return finding, looked
    return None, looked


def assert_noticed(what, recording, known, removal, most=600):
    """An image is bad without those syncs; with them, at the same moment, none is."""
    finding, looked = hunt(recording, known, removal, most)
    assert finding is not None, f"{what}: {looked} images, and none of them bad"
    if removal.syncs:
        assert [] == [str(one) for one in examine(recording, known, [finding.moment], 6) if one.complaints]
    print(f"\n{what}: bad is image {looked}: {str(finding)[:160]}")


class TestPowerLoss:
    @pytest.mark.parametrize("day", DATABASE)
    def test_nothing_lost(self, day, recorded, tmp_path, monkeypatch):
        """Every image opens, is whole, has all that was acknowledged and nothing by halves, and goes on."""
        recording, known = recorded(day)
        saved = tmp_path / "recording"
        saved.write_bytes(pickle.dumps((recording, known)))
        moments = moments_of(recording, IMAGES[day] // ORDINARY)
        for name in [name for name in os.environ if name.startswith("COV")]:
            monkeypatch.delenv(name)  # measuring the workers' coverage would double their time
        started = time.monotonic()
        size = len(moments) // 16 + 1
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            shares = [
                pool.submit(share, saved, moments[first : first + size], EACH) for first in range(0, len(moments), size)
            ]
            findings = [finding for one in shares for finding in one.result()]
        bad = [f"python -m crash.repeat {saved} {one}" for one in findings if one.complaints]
        images = len({one.fingerprint for one in findings})
        print(
            f"\n{day}: {images:,} images, {len(findings):,} with what was acknowledged by then, of"
            f" {len(recording.operations):,} operations, {len(recording.syncs())} syncs,"
            f" {len(recording.acknowledgements)} acknowledgements: {len(bad)} bad, {time.monotonic() - started:.0f} s"
        )
        assert [] == bad
        assert images >= IMAGES[day]


class TestNoticed:
    """What durability stands on is taken away, and an image is bad."""

    @pytest.mark.parametrize("fault", ["synchronous=NORMAL", "folders not synced", EARLY])
    def test_writer(self, fault, recorded):
        """A writer that does one thing wrong."""
        recording, known = recorded("first start", fault)
        moments = [one.began + 1 for one in recording.acknowledgements]
        assert_noticed(fault, recording, known, removals.Removal([], moments))

    @pytest.mark.parametrize(
        ("day", "kind"),
        # The upgrade changes one sector through its journal, which cannot be torn: it would do without.
        [(day, kind) for day in DATABASE for kind in ("wal", "database", "folder")] + [("first start", "journal")],
    )
    def test_kind(self, day, kind, recorded):
        """No sync of one kind of files."""
        recording, known = recorded(day)
        assert_noticed(f"{day}, {kind} not synced", recording, known, removals.of_kind(recording, kind))

    def test_no_other_kind(self, recorded):
        """Those are all the kinds that are ever synced."""
        recording, _ = recorded("first start")
        assert {recording.inodes[sync.inode].kind for sync in recording.syncs()} == KINDS

    @pytest.mark.parametrize("part", range(PARTS))
    def test_one_commit(self, part, recorded):
        """One single sync of the WAL that an acknowledgement stands on: each of them in its turn."""
        recording, known = recorded("first start")
        commits = removals.wal_commits(recording)
        assert len(commits) > 80
        for removal in commits[part::PARTS]:
            assert_noticed("a single sync of the WAL", recording, known, removal, most=30)

    def test_checkpoint(self, recorded):
        """The last sync of the WAL before a checkpoint, which SQLite calls twice: each pair in its turn."""
        recording, known = recorded("first start")
        pairs = removals.wal_checkpoints(recording)
        assert len(pairs) > 5
        for removal in pairs:
            assert_noticed("before a checkpoint", recording, known, removal)

    def test_header(self, recorded):
        """The syncs of new headers over an old WAL; older frames would count again."""
        recording, known = recorded("first start")
        assert_noticed("header", recording, known, removals.wal_headers(recording))


class TestRecording:
    @pytest.mark.parametrize("deep", [False, True])
    def test_no_strace(self, deep, tmp_path, monkeypatch):
        """Without strace the run says what was not proven; where a proof is asked for, it fails."""
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(StraceMissingError, match="no strace on the path") as missing:
            record(tmp_path, "buffer.db", "first start")
        refusal = pytest.fail.Exception if deep else pytest.skip.Exception
        with pytest.raises(refusal, match="NOT PROVEN"):
            not_proven(missing.value, deep=deep)

    def test_whole_day(self, recorded):
        """The day has what there is to lose: threads, checkpoints, a WAL begun anew, cut and deleted, a journal."""
        recording, _ = recorded("first start")
        files = {kind: {one.number for one in recording.inodes.values() if one.kind == kind} for kind in KINDS}
        wal = [one for one in recording.operations if isinstance(one, Write | Truncate) and one.inode in files["wal"]]
        assert len(recording.syncs("database")) > 5
        assert len([one for one in wal if isinstance(one, Write) and one.offset == 0]) > 5
        assert any(isinstance(one, Truncate) for one in wal)
        assert len({one.thread for one in recording.acknowledgements}) > 3
        gone = [one for one in recording.operations if isinstance(one, Naming) and None in one.entries.values()]
        assert len(gone) >= len(files["wal"] | files["journal"])
        assert any(one.ended > one.began + 1 for one in recording.operations)


TAMPERED = {
    "UPDATE receipts SET last_error = 'x' WHERE rowid = (SELECT MIN(rowid) FROM receipts)": "acknowledged was",
    "DROP TRIGGER trg_guard_acknowledged; UPDATE receipts SET hlc_local_time = hlc_local_time + 1"
    " WHERE rowid = (SELECT MIN(rowid) FROM receipts)": "HLC",
    "INSERT INTO buffer_events (event_type, receipt_id, timestamp) SELECT event_type, receipt_id, timestamp"
    " FROM buffer_events WHERE receipt_id IS NOT NULL LIMIT 1": "acknowledged was",
    "INSERT INTO buffer_events (event_type, timestamp) VALUES ('sync_started', 1)": "acknowledged was [None]",
    "UPDATE buffer_state SET pending = pending + 1": "count of pending",
    "UPDATE buffer_state SET hlc_local_time = hlc_local_time - 1": "greatest HLC",
    "UPDATE config SET value = '3' WHERE key = 'buffer_capacity'": "Buffer full",
    "DELETE FROM config WHERE key = 'lease_seconds'": "acknowledged was",
    "DROP TRIGGER trg_receipt_synced": "trg_receipt_synced",
    "DROP INDEX idx_receipts_hlc": "idx_receipts_hlc",
    "PRAGMA user_version = 1": None,
}


class TestJudge:
    @pytest.fixture
    def buffer_file(self, tmp_path):
        path = tmp_path / "buffer.db"
        old_buffer(path)
        known_facts(path)
        return path

    @pytest.mark.parametrize("statement", TAMPERED)
    def test_tampered(self, statement, buffer_file):
        """What is not as it should be is seen, and what does not matter is not."""
        facts = known_facts(buffer_file)
        connection = sqlite3.connect(buffer_file)
        connection.executescript(statement)
        connection.commit()
        connection.close()
        complaints = "; ".join(judge(buffer_file, facts, []))
        if TAMPERED[statement] is None:
            assert complaints == ""
        else:
            assert TAMPERED[statement] in complaints

    def test_half(self, buffer_file):
        """Of a transaction that was under way, all is there or nothing."""
        facts = known_facts(buffer_file)
        here, missing = {"config:buffer_capacity": "200"}, {"config:shop": "Ромашка"}
        older = facts | {"config:buffer_capacity": "100"}
        assert [] == judge(buffer_file, older, [[here], [missing]])
        complaint, *_ = judge(buffer_file, older, [[here | missing]])
        assert complaint.startswith("half of a transaction")
