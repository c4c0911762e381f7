"""The day that `kkt-buffer demo` plays."""

import json
import multiprocessing
import re
import sys
import tempfile
from multiprocessing import resource_tracker

import pytest
from builders import a_receipt, another_program, open_files, run_python

from kkt_buffer import BufferFullError, ReceiptRepository, demo
from kkt_buffer.cli import main

SALES = len(demo.TILLS) * demo.SALES

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


@pytest.fixture(autouse=True)
def short_leases(monkeypatch):
    monkeypatch.setitem(demo.SETTINGS, "lease_seconds", 1)


@pytest.fixture
def said():
    return []


@pytest.fixture
def operate(path):
    """Runs a command of an operator, like a shell."""

    def run(*words):
        assert 0 == main(words)

    return run


@pytest.mark.slow
class TestDay:
    def test_whole(self, tmp_path, capfd):
        """The whole story, with its real kills; what it tells is what the file then holds."""
        path = tmp_path / "shop" / "demo.db"
        assert 0 == main(["demo", str(path)])
        out, err = capfd.readouterr()
        assert "" == err  # nor do the processes of the demo repeat a warning
        [sold] = re.findall(r"After (\d+) sales of demo-till-1 its process is killed with SIGKILL", out)
        assert demo.KILL_TILL_AFTER <= int(sold) <= demo.SALES
        assert "opened its circuit" in out
        assert re.search(r"It has \d+ when the worker is killed with SIGKILL, with \d+ leased", out)
        assert "rejected by the OFD: DeliveryRejected: unknown tax rate" in out
        assert "1 of 1 receipts requeued" in out
        assert "on SIGTERM the worker ends, with status 0" in out
        assert f"{SALES} sales: each was printed once, and the OFD has all of them" in out
        assert re.search(rf"^synced +\| {SALES}$", out, re.MULTILINE)
        assert {"synced": SALES, "open": 0} == counts(path)
        # The settings are as they were.
        settings = "SELECT key, value FROM config WHERE key LIKE 'circuit%' OR key = 'lease_seconds' ORDER BY key"
        expected = [("circuit_breaker_threshold", "5"), ("circuit_breaker_timeout", "60"), ("lease_seconds", "60")]
        assert expected == rows(path, settings)
        events = dict(rows(path, "SELECT event_type, COUNT(*) FROM buffer_events GROUP BY event_type"))
        for fact in ("added", "completed", "synced"):
            assert SALES == events[f"receipt_{fact}"]
        assert 1 == events["receipt_failed"] == events["receipt_requeued"]
        assert 1 == events["circuit_opened"] == events["circuit_closed"]
        # An outage counts no attempt; each document has the number of its print.
        assert [(0,)] == rows(path, "SELECT DISTINCT retry_count FROM receipts")
        numbers = "SELECT COUNT(DISTINCT json_extract(fiscal_doc, '$.fiscalDocumentNumber')) FROM receipts"
        assert [(demo.SALES,)] == rows(path, numbers)
        assert [("requeued", "Anna")] == rows(path, "SELECT resolution, resolved_by FROM dlq")

    def test_all_that_waits(self, file_repository, path, said, operate):
        """Receipts that an earlier run has left are delivered with the others."""
        for _ in range(3):
            a_receipt(file_repository, pos_id=demo.TILLS[0], fiscal_doc=demo.plain_receipt(0))
        demo.run(str(path), operate, said.append)
        assert {"synced": SALES + 3, "open": 0} == counts(path)

    def test_printed_twice(self, path, said, operate, tmp_path, monkeypatch):
        """A second print of one receipt ends the demo: it proves, it does not play."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        def print_again(*words):
            [journal] = tmp_path.glob(f"*/{demo.TILLS[0]}")
            demo.Journal(journal).append(demo.Journal(journal).lines[0])
            operate(*words)

        with pytest.raises(RuntimeError, match=f"^{SALES} sold, {SALES + 2} printed, {SALES} at the OFD"):
            demo.run(str(path), print_again, said.append)
        assert [] == multiprocessing.active_children()
        assert [] == open_files(path)

    def test_missing(self, path, said, operate, monkeypatch):
        """A receipt that was acknowledged and is not there ends it too."""
        monkeypatch.setattr(ReceiptRepository, "get_receipt_by_id", lambda self, receipt_id: None)
        with pytest.raises(RuntimeError, match=r"^\d+ acknowledged receipts are not in the buffer: \['"):
            demo.run(str(path), operate, said.append)
        assert [] == [line for line in said if "are there" in line]
        assert [] == open_files(path)

    def test_broken_process(self, path, said, operate):
        """A process that fails by itself is told as such, and not taken for a kill."""
        resource_tracker.ensure_running()  # it is a process of the same executable
        multiprocessing.set_executable("/bin/false")
        try:
            with pytest.raises(RuntimeError, match="^a process of the demo has failed, with status 1$"):
                demo.run(str(path), operate, said.append)
        finally:
            multiprocessing.set_executable(sys.executable)
        assert [] == open_files(path)

    def test_impatient(self, path, said, operate, monkeypatch):
        """What does not happen is told, and all processes are ended."""
        monkeypatch.setattr(demo, "TIMEOUT_SECONDS", 0.0)
        with pytest.raises(RuntimeError, match="^the demo has waited 0 s for sales$"):
            demo.run(str(path), operate, said.append)
        assert [] == multiprocessing.active_children()
        assert [] == open_files(path)


class TestRefused:
    def test_no_room(self, file_engine, file_repository, path, said, operate):
        file_repository.set_config("buffer_capacity", SALES - 1)
        file_engine.dispose()
        with pytest.raises(BufferFullError) as caught:
            demo.run(str(path), operate, said.append)
        assert (0, SALES - 1, SALES) == (caught.value.undelivered, caught.value.capacity, caught.value.wanted)
        assert [] == open_files(path)

    def test_real_receipts(self, file_engine, file_repository, path, said, operate):
        """A buffer with receipts of a real till is left alone: the demo would mark them as delivered."""
        a_receipt(file_repository)
        file_engine.dispose()
        with pytest.raises(ValueError, match="holds 1 receipts that are not the demo's"):
            demo.run(str(path), operate, said.append)
        assert {"pending": 1, "open": 0} == counts(path)

    def test_in_memory(self, said, operate):
        with pytest.raises(ValueError, match="needs a file"):
            demo.run(":memory:", operate, said.append)
