"""The shift that `kkt-buffer demo` plays."""

import json
import multiprocessing
import os
import re
import signal
import sys

import pytest
from builders import a_receipt, another_program, open_files, run_python

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
    with another_program(path) as connection:
        return connection.execute(query).fetchall()


def column(path, query):
    return [value for (value,) in rows(path, query)]


class TestDemo:
    @pytest.fixture(autouse=True)
    def short_leases(self, monkeypatch):
        monkeypatch.setattr(demo, "LEASE_SECONDS", 1)

    @pytest.fixture
    def said(self):
        return []

    def test_twice(self, tmp_path, capfd):
        """The whole story, with its real kills, twice on one file; what it tells is what the file then holds."""
        path = tmp_path / "shop" / "demo.db"
        for shift, target in enumerate((str(path), f"sqlite:///{path}"), start=1):
            assert 0 == main(["demo", target])
            out, err = capfd.readouterr()
            assert "" == err  # nor do the processes of the demo repeat a warning
            assert "earlier run" not in out
            [sold] = re.findall(r"After (\d+) receipts its process is killed with SIGKILL", out)
            assert 40 <= int(sold) <= 60
            assert f"all {sold} acknowledged receipts are there, none is missing" in out
            assert "finishes the shift with 60 receipts" in out
            assert "tries to deliver: DeliveryUnavailable: no route to the OFD." in out
            assert "All 60 receipts are released, and no attempt is counted" in out
            [(received, held)] = re.findall(
                r"The OFD has (\d+) when the worker is killed with SIGKILL; it had leased (\d+) more", out
            )
            assert 20 <= int(received) <= 60
            assert "in 1 s (here; usually 60) its leases expire" in out
            [delivered] = re.findall(r"Another worker delivers (\d+); one is rejected, and becomes a dead letter", out)
            assert int(held) == int(delivered) + 1
            assert "requeues it: 1 more delivered" in out
            [twice] = re.findall(r"The OFD has all of them, (\d) of them twice", out)
            assert 60 + int(twice) == int(received) + int(delivered) + 1
            assert re.search(rf"^buffer +\| {target}$", out, re.MULTILINE)
            assert re.search(rf"^synced +\| {60 * shift}$", out, re.MULTILINE)
            assert re.search(r"^failed +\| 0  \(open dead letters: 0\)$", out, re.MULTILINE)
            assert {"synced": 60 * shift, "open": 0} == counts(path)
        assert [("60",)] == rows(path, "SELECT value FROM config WHERE key = 'lease_seconds'")

        # What the file itself has to tell of both shifts.
        events = "SELECT event_type, COUNT(*) FROM buffer_events WHERE event_type LIKE 'receipt%' GROUP BY event_type"
        expected = {"receipt_added": 120, "receipt_failed": 2, "receipt_requeued": 2, "receipt_synced": 120}
        assert expected == dict(rows(path, events))
        assert [0] == column(path, "SELECT DISTINCT retry_count FROM receipts")
        letter = ("rejected by the OFD: DeliveryRejected: unknown tax rate", "requeued", "Anna, support")
        assert [letter] * 2 == rows(path, "SELECT reason, resolution, resolved_by FROM dlq")
        # In the order in which they were made, but for the two that were requeued.
        others = "NOT IN (SELECT original_receipt_id FROM dlq)"
        made = f"SELECT id FROM receipts WHERE id {others} ORDER BY hlc_local_time, hlc_logical_counter"
        synced = f"SELECT receipt_id FROM buffer_events WHERE event_type = 'receipt_synced' AND receipt_id {others}"
        assert column(path, made) == column(path, f"{synced} ORDER BY id")

    @pytest.mark.slow
    def test_all_that_waits(self, file_repository, path, said):
        """Receipts that an earlier run has left are told of, and leave with the others."""
        for _ in range(3):
            a_receipt(file_repository, pos_id=demo.TILL)
        demo.run(str(path), said.append)
        assert "   3 receipts of an earlier run are still waiting in it." in said
        assert {"synced": 63, "open": 0} == counts(path)

    def test_killed_too_late(self, path, said, monkeypatch):
        """A till that has sold everything before the kill has acknowledged everything."""
        kill, kills = os.kill, []

        def late(pid, number):
            if not kills:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            kills.append(number)
            kill(pid, number)

        monkeypatch.setattr(os, "kill", late)
        demo.run(str(path), said.append)
        assert f"3. A new process checks: all {demo.RECEIPTS_PER_SHIFT} acknowledged receipts are there" in "\n".join(
            said
        )
        assert [signal.SIGKILL] * 2 == kills
        assert {"synced": demo.RECEIPTS_PER_SHIFT, "open": 0} == counts(path)
        assert [] == multiprocessing.active_children()
        assert [] == open_files(path)

    def test_broken_till(self, path, said, monkeypatch):
        """A process that fails by itself is told as such, and not taken for a kill."""
        monkeypatch.setattr(demo, "RECEIPTS_PER_SHIFT", 2)
        multiprocessing.set_executable("/bin/false")
        try:
            with pytest.raises(RuntimeError, match="the process failed before it could be killed, with status 1"):
                demo.run(str(path), said.append)
        finally:
            multiprocessing.set_executable(sys.executable)
        assert [] == open_files(path)

    def test_missing(self, path, said, monkeypatch):
        """A receipt that was acknowledged and is not there ends the demo: it proves, it does not play."""
        monkeypatch.setattr(ReceiptRepository, "get_receipt_by_id", lambda self, receipt_id: None)
        with pytest.raises(RuntimeError, match=r"^\d+ acknowledged receipts are not in the buffer: \['"):
            demo.run(str(path), said.append)
        assert [] == [line for line in said if "none is missing" in line]
        assert [] == open_files(path)

    @pytest.mark.slow
    def test_left(self, file_engine, path, said):
        """A receipt that somebody else keeps is not delivered in the end, and that is told as what it is."""
        repository = ReceiptRepository(file_engine)
        repository.set_config("lease_seconds", 3600)
        a_receipt(repository, "syncing", pos_id=demo.TILL)
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
