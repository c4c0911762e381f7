"""The shift that `kkt-buffer demo` plays."""

import json
import logging
import multiprocessing
import os
import re
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from builders import a_receipt, an_id, open_files, run_python

from kkt_buffer import BufferFullError, ReceiptRepository, demo
from kkt_buffer.cli import main

# Counts by status, and open dead letters, as any other program would find them.
COUNT = """
    import json, sqlite3, sys
    buffer = sqlite3.connect(sys.argv[1])
    counts = dict(buffer.execute("SELECT status, COUNT(*) FROM receipts GROUP BY status"))
    [counts["open"]] = buffer.execute("SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL").fetchone()
    print(json.dumps(counts))
"""


def counts(path):
    return json.loads(run_python(COUNT, path).stdout)


def rows(path, query):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def column(path, query):
    return [value for (value,) in rows(path, query)]


def stored_ids(path):
    return set(column(path, "SELECT id FROM receipts"))


def to_sell(count):
    """What the demo's till puts into the buffer."""
    documents = demo.sample_receipts(count)
    return [{"id": an_id(), "pos_id": demo.TILL, "fiscal_doc": document} for document in documents]


class TestDemo:
    @pytest.fixture
    def said(self):
        return []

    @pytest.fixture
    def no_kills(self, monkeypatch):
        """The till sells all it has, the first worker nothing, and nobody waits for leases."""

        def until_killed(work, arguments, count):
            reported = []
            if work is demo._sell:
                work(*arguments, reported.append)
            return reported

        monkeypatch.setattr(demo, "_until_killed", until_killed)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def test_twice(self, tmp_path, monkeypatch, capfd):
        """The whole story, with its real kills, twice on one file; what it tells is what the file then holds."""
        monkeypatch.setattr(demo, "LEASE_SECONDS", 1)
        path = tmp_path / "shop" / "demo.db"
        for shift, target in enumerate((str(path), f"sqlite:///{path}"), start=1):
            assert 0 == main(["demo", target])
            out, err = capfd.readouterr()
            assert "" == err
            [sold] = re.findall(r"After (\d+) receipts its process is killed with SIGKILL", out)
            assert 40 <= int(sold) <= 60
            assert f"all {sold} acknowledged receipts are there, none is missing" in out
            assert "finishes the shift with 60 receipts" in out
            assert "tries to deliver: DeliveryUnavailable: no route to the operator." in out
            assert "All 60 receipts are released, and no attempt is counted" in out
            [(received, held)] = re.findall(
                r"The operator has (\d+) when the worker is killed with SIGKILL; it had leased (\d+) more", out
            )
            assert 20 <= int(received) <= 60
            assert "in 1 s (here; usually 300) its leases are over" in out
            [delivered] = re.findall(r"Another worker delivers (\d+); one is rejected, and becomes a dead letter", out)
            assert int(held) == int(delivered) + 1
            assert "requeues it: 1 more delivered" in out
            [twice] = re.findall(r"The operator has all of them, (\d) of them twice", out)
            assert 60 + int(twice) == int(received) + int(delivered) + 1
            assert re.search(rf"^buffer +\| {target}$", out, re.MULTILINE)
            assert re.search(rf"^synced +\| {60 * shift}$", out, re.MULTILINE)
            assert re.search(r"^failed +\| 0  \(open dead letters: 0\)$", out, re.MULTILINE)
            assert {"synced": 60 * shift, "open": 0} == counts(path)
        assert [("300",)] == rows(path, "SELECT value FROM config WHERE key = 'lease_seconds'")

        # What the file itself has to tell of both shifts.
        events = "SELECT event_type, COUNT(*) FROM buffer_events WHERE event_type LIKE 'receipt%' GROUP BY event_type"
        expected = {"receipt_added": 120, "receipt_failed": 2, "receipt_requeued": 2, "receipt_synced": 120}
        assert expected == dict(rows(path, events))
        assert [0] == column(path, "SELECT DISTINCT retry_count FROM receipts")
        letter = ("rejected by the operator: DeliveryRejected: unknown tax rate", "requeued", "Anna, support")
        assert [letter] * 2 == rows(path, "SELECT reason, resolution, resolved_by FROM dlq")
        # In the order in which they were made, but for the two that were requeued.
        others = "NOT IN (SELECT original_receipt_id FROM dlq)"
        made = f"SELECT id FROM receipts WHERE id {others} ORDER BY hlc_local_time, hlc_logical_counter"
        synced = f"SELECT receipt_id FROM buffer_events WHERE event_type = 'receipt_synced' AND receipt_id {others}"
        assert column(path, made) == column(path, f"{synced} ORDER BY id")

    def test_all_that_waits(self, file_repository, path, said, no_kills):
        """Receipts that an earlier run has left are told of, and leave with the others."""
        for _ in range(3):
            a_receipt(file_repository, pos_id=demo.TILL)
        demo.run(str(path), said.append)
        assert "   3 receipts of an earlier run are still waiting in it." in said
        assert "6. Another worker delivers 62; one is rejected, and becomes a dead letter." in said
        assert {"synced": 63, "open": 0} == counts(path)

    def test_nothing_waits(self, path, said, no_kills):
        """An empty buffer is not worth a word; without a kill nothing is sent twice."""
        demo.run(str(path), said.append)
        assert [] == [line for line in said if "earlier run" in line]
        assert "   The operator has all of them, 0 of them twice" in said[-1]
        assert [] == open_files(path)

    def test_missing(self, path, said, monkeypatch):
        """A receipt that was acknowledged and is not there ends the demo: it proves, it does not play."""
        lost = an_id()
        monkeypatch.setattr(demo, "_until_killed", lambda work, arguments, count: [lost])
        with pytest.raises(RuntimeError, match=rf"^1 acknowledged receipts are not in the buffer: \['{lost}'\]$"):
            demo.run(str(path), said.append)
        assert [] == [line for line in said if "none is missing" in line]
        assert [] == open_files(path)

    def test_left(self, file_engine, path, said, no_kills):
        """A receipt that somebody else keeps is not delivered in the end, and that is told as what it is."""
        a_receipt(ReceiptRepository(file_engine), "syncing", pos_id=demo.TILL)
        file_engine.dispose()
        with pytest.raises(RuntimeError, match="^the buffer should be empty, but 1 receipts are waiting$"):
            demo.run(str(path), said.append)
        assert [] == [line for line in said if "has all of them" in line]
        assert [] == open_files(path)

    def test_no_room(self, file_engine, file_repository, path, said):
        file_repository.set_config("buffer_capacity", 59)
        file_engine.dispose()
        with pytest.raises(BufferFullError) as caught:
            demo.run(str(path), said.append)
        assert (0, 59, 60) == (caught.value.undelivered, caught.value.capacity, caught.value.wanted)
        assert [] == open_files(path)


class TestTill:
    @pytest.fixture
    def receipts(self):
        return to_sell(3)

    def test_acknowledges(self, path, receipts):
        """The till names each receipt that is on disk, in its order, and leaves nothing open."""
        acknowledged = []
        demo._sell(str(path), receipts, acknowledged.append)
        assert [receipt["id"] for receipt in receipts] == acknowledged
        assert set(acknowledged) == stored_ids(path)
        assert [] == open_files(path)

    def test_again(self, path, receipts):
        """A till that is not sure whether a receipt went in repeats it: it is acknowledged, and stored once."""
        acknowledged = []
        for _ in range(2):
            demo._sell(str(path), receipts, acknowledged.append)
        assert [receipt["id"] for receipt in receipts] * 2 == acknowledged
        assert {"pending": 3, "open": 0} == counts(path)

    def test_on_disk_first(self, path, receipts):
        """When the till hears of a receipt it is on disk; what comes after it is not yet."""
        seen = []
        demo._sell(str(path), receipts, lambda receipt_id: seen.append((receipt_id, stored_ids(path))))
        ids = [receipt["id"] for receipt in receipts]
        assert [(receipt_id, set(ids[: place + 1])) for place, receipt_id in enumerate(ids)] == seen

    def test_nobody_hears(self, path, receipts):
        """A till whose customer has gone away stops, and leaves nothing open."""

        def acknowledge(receipt_id):
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            demo._sell(str(path), receipts, acknowledge)
        assert {receipts[0]["id"]} == stored_ids(path)
        assert [] == open_files(path)


class TestWorker:
    @pytest.fixture
    def waiting(self, path):
        """Three receipts, in the order in which they were sold."""
        sold = []
        demo._sell(str(path), to_sell(3), sold.append)
        return sold

    def test_delivers(self, path, waiting):
        """The operator has each receipt before the buffer knows, in the order of the sales."""
        received = []
        before = int(time.time())
        demo._work(str(path), received.append)
        assert waiting == received
        assert {"synced": 3, "open": 0} == counts(path)
        times = column(path, "SELECT hlc_server_time FROM receipts")
        assert before <= min(times) <= max(times) <= int(time.time())
        assert [] == open_files(path)

    def test_stopped(self, path, waiting):
        """A worker that is told to stop hands back what it has, and leaves nothing open."""
        received = []

        def receive(receipt_id):
            if received:
                raise KeyboardInterrupt
            received.append(receipt_id)

        with pytest.raises(KeyboardInterrupt):
            demo._work(str(path), receive)
        assert waiting[:1] == received
        assert {"synced": 1, "pending": 2, "open": 0} == counts(path)
        assert [] == open_files(path)


class TestUntilKilled:
    def test_killed(self, file_repository, file_engine, path):
        """A kill in the middle of the work: nothing is missing that was acknowledged, and the rest was not sold."""
        file_repository.set_config("buffer_capacity", 500)
        file_engine.dispose()
        acknowledged = demo._until_killed(demo._sell, (str(path), to_sell(500)), demo.KILL_AFTER)
        assert demo.KILL_AFTER <= len(acknowledged)
        assert set(acknowledged) <= stored_ids(path)
        assert len(stored_ids(path)) < 500
        assert [] == multiprocessing.active_children()

    def test_too_late(self, path, monkeypatch):
        """Work that has come to its end before the kill falls has reported everything."""

        def kill(pid, number):
            assert signal.SIGKILL == number
            [process] = multiprocessing.active_children()
            assert process.pid == pid
            process.join()

        monkeypatch.setattr(os, "kill", kill)
        receipts = to_sell(10)
        acknowledged = demo._until_killed(demo._sell, (str(path), receipts), 5)
        assert [receipt["id"] for receipt in receipts] == acknowledged
        assert set(acknowledged) == stored_ids(path)

    def test_too_little(self, path):
        """Work that reports less than the count is not killed."""
        receipts = to_sell(2)
        acknowledged = demo._until_killed(demo._sell, (str(path), receipts), 3)
        assert [receipt["id"] for receipt in receipts] == acknowledged

    def test_failed(self, tmp_path):
        """Work that fails in its process is told as such, and not taken for a kill."""
        with pytest.raises(RuntimeError, match="the process failed before it could be killed, with status 1"):
            demo._until_killed(demo._sell, (str(tmp_path), to_sell(1)), 1)

    def test_quietly(self, caplog):
        """The work has its arguments, and warnings that the parent has given are not repeated."""
        called = []
        with caplog.at_level(logging.WARNING, logger="kkt_buffer"):
            demo._quietly(lambda *arguments: called.append(arguments), "buffer.db", 3)
            logging.getLogger("kkt_buffer.sqlite.engine").warning("said already")
            logging.getLogger("kkt_buffer.sqlite.engine").error("news")
        assert [("buffer.db", 3)] == called
        assert ["news"] == caplog.messages
