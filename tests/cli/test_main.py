"""The command line, and the demo that it plays."""

import json
import logging
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from alembic import command
from builders import NOON, a_receipt, an_id, everything, open_files, run_python

from kkt_buffer import BufferFullError, ReceiptRepository, ReceiptStatus, create_buffer_engine, demo, migrate
from kkt_buffer.cli import main
from kkt_buffer.migrate import revisions

HEAD = revisions()[-1]
DAY = 86_400

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


def stored_tables(path):
    return column(path, "SELECT name FROM sqlite_master")


def to_sell(count):
    """What the demo's till puts into the buffer."""
    return [{"id": an_id(), "pos_id": demo.TILL, "fiscal_doc": demo.plain_receipt(number)} for number in range(count)]


@pytest.fixture
def used(file_engine, file_repository, path):
    """A buffer on disk with one receipt of each status, that nobody has open."""
    for status in ReceiptStatus:
        a_receipt(file_repository, status)
    file_engine.dispose()
    return path


@pytest.fixture
def without_schema(tmp_path):
    """A database that is as ours should be, but has no tables."""
    path = tmp_path / "bare.db"
    create_buffer_engine(path).dispose()
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Not a database, but somebody's notes.\n" * 100)
    return path


@pytest.fixture
def of_another_program(tmp_path):
    """A database with a table that is called like ours, and is not."""
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE receipts (number INTEGER PRIMARY KEY, total REAL)")
        connection.execute("INSERT INTO receipts VALUES (1, 64.9)")
        connection.commit()
    return path


@pytest.fixture
def moscow(monkeypatch):
    """The local time of the tests: three hours ahead of UTC."""
    monkeypatch.setenv("TZ", "MSK-3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


class TestUpgrade:
    def test_new(self, tmp_path, capsys):
        """The file is made, with the folders that it needs."""
        path = tmp_path / "shop" / "till 1" / "buffer.db"
        assert 0 == main(["upgrade", str(path)])
        assert (f"{path}: schema {HEAD} (was none)\n", "") == capsys.readouterr()
        assert 0 == main(["status", str(path)])

    def test_again(self, used, capsys):
        """A second time changes nothing, and says which schema was there."""
        before = everything(used)
        assert 0 == main(["upgrade", str(used)])
        assert (f"{used}: schema {HEAD} (was {HEAD})\n", "") == capsys.readouterr()
        assert before == everything(used)

    def test_old(self, tmp_path, capsys):
        """A buffer of an earlier release says what it was, too."""
        path = tmp_path / "buffer.db"
        engine = create_buffer_engine(path)
        command.upgrade(migrate.alembic_config(engine), "0001")
        engine.dispose()
        assert 0 == main(["upgrade", str(path)])
        assert (f"{path}: schema {HEAD} (was 0001)\n", "") == capsys.readouterr()

    def test_program(self, tmp_path):
        """`python -m kkt_buffer` is the same command line, and its exit status is the program's."""
        command = [sys.executable, "-m", "kkt_buffer", "upgrade"]
        done = subprocess.run([*command, "buffer.db"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (0, f"buffer.db: schema {HEAD} (was none)\n") == (done.returncode, done.stdout)
        done = subprocess.run([*command, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (1, "") == (done.returncode, done.stdout)
        assert done.stderr.splitlines()[-1].startswith("error: ")


class TestStatus:
    def test_table(self, used, capsys, moscow):
        """Times are shown as the wall clock of the shop shows them."""
        assert 0 == main(["status", str(used)])
        expected = f"""\
buffer             | {used}
schema             | {HEAD}
pending            | 1
syncing            | 1
synced             | 1
failed             | 1  (open dead letters: 1)
total              | 4
full               | 1.00 %  (2 of 200)
oldest undelivered | 2026-03-01 15:00:00 +0300
deliver before     | 2026-03-31 15:00:00 +0300
"""
        assert (expected, "") == capsys.readouterr()

    def test_empty_table(self, path, capsys):
        assert 0 == main(["status", str(path)])
        lines = capsys.readouterr().out.splitlines()
        assert ["oldest undelivered | nothing waits", "deliver before     | nothing waits"] == lines[-2:]

    def test_json(self, used, capsys):
        """For programs: one JSON object, times as Unix seconds."""
        assert 0 == main(["status", str(used), "--json"])
        expected = {
            "path": str(used),
            "schema": HEAD,
            "total_receipts": 4,
            "pending": 1,
            "syncing": 1,
            "synced": 1,
            "failed": 1,
            "dlq_size": 1,
            "capacity": 200,
            "percent_full": 1.0,
            "oldest_undelivered_at": NOON,
            "deadline_at": NOON + 30 * DAY,
        }
        assert expected == json.loads(capsys.readouterr().out)

    def test_empty_json(self, path, capsys):
        assert 0 == main(["status", "--json", str(path)])
        status = json.loads(capsys.readouterr().out)
        assert (None, None) == (status["oldest_undelivered_at"], status["deadline_at"])

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_changes_nothing(self, used, options, capsys):
        before = used.read_bytes()
        assert 0 == main(["status", str(used), *options])
        assert before == used.read_bytes()


class TestErrors:
    @pytest.fixture
    def refused(self, capsys):
        """Run a command that must fail, and return the one line that it says of it."""

        def run(*argv):
            assert 1 == main([str(argument) for argument in argv])
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            return line

        return run

    def test_missing(self, tmp_path, refused):
        """Looking at a buffer that is not there does not make it."""
        path = tmp_path / "shop" / "buffer.db"
        assert "No such file or directory" in refused("status", path)
        assert [] == list(tmp_path.iterdir())

    @pytest.mark.parametrize("command", ["status", "upgrade", "demo"])
    def test_folder(self, command, tmp_path, refused):
        assert f"{tmp_path} is a folder" in refused(command, tmp_path)
        assert [] == list(tmp_path.iterdir())

    @pytest.mark.parametrize("command", ["status", "upgrade", "demo"])
    def test_no_database(self, command, text_file, refused):
        """A file that is something else is left as it is, to the byte."""
        before = text_file.read_bytes()
        assert "the file is not an SQLite database" in refused(command, text_file)
        assert before == text_file.read_bytes()

    def test_no_schema(self, without_schema, refused):
        """The message says how to get one."""
        assert f"no schema where this release needs {HEAD}" in refused("status", without_schema)
        assert [] == stored_tables(without_schema)

    @pytest.mark.parametrize("command", ["status", "upgrade", "demo"])
    def test_newer(self, command, used, refused):
        """What a newer release made is not for this one to touch."""
        with closing(sqlite3.connect(used)) as connection:
            connection.execute("UPDATE kkt_buffer_version SET version_num = '9999'")
            connection.commit()
        before = everything(used)
        assert "schema 9999, made by kkt-buffer 1.0.0; this is" in refused(command, used)
        assert before == everything(used)

    def test_no_wal(self, of_another_program, refused):
        """A database that is not kept as a buffer is, is none; it is left as it is, to the byte."""
        before = of_another_program.read_bytes()
        line = refused("status", of_another_program)
        assert f"{of_another_program} is no buffer: its journal mode is 'delete'. Nothing was touched." in line
        assert before == of_another_program.read_bytes()

    @pytest.mark.parametrize("command", ["upgrade", "demo"])
    def test_of_another_program(self, command, of_another_program, refused):
        """Tables of somebody else that are called like ours are neither taken over nor changed."""
        before = everything(of_another_program)
        line = refused(command, of_another_program)
        assert f"the upgrade to schema {HEAD} failed and was rolled back; the database is as it was." in line
        assert "table receipts already exists" in line
        assert before == everything(of_another_program)

    def test_nonsense_in_config(self, used, refused):
        with closing(sqlite3.connect(used)) as connection:
            connection.execute("UPDATE config SET value = 'many' WHERE key = 'buffer_capacity'")
            connection.commit()
        assert "config buffer_capacity is 'many'" in refused("status", used)

    @pytest.mark.parametrize(
        "path", ["", "postgresql://shop/buffer", ":memory:"], ids=["empty", "another database", "memory"]
    )
    def test_bad_path(self, path, refused):
        assert refused("status", path)

    def test_memory(self, refused):
        """The demo's processes would each have a buffer of their own: said before anything is played."""
        assert "error: path: the demo needs a file, because several processes open it" == refused("demo", ":memory:")

    def test_real_receipts(self, used, refused):
        """The demo delivers to nobody, so it keeps away from receipts that somebody needs."""
        before = everything(used)
        assert "this buffer holds 4 receipts that are not the demo's" in refused("demo", used)
        assert before == everything(used)

    def test_no_room(self, file_engine, file_repository, path, refused):
        """A buffer without room for a shift is told of at once, and stays as it is."""
        file_repository.set_config("buffer_capacity", demo.RECEIPTS_PER_SHIFT)
        a_receipt(file_repository, pos_id=demo.TILL)
        file_engine.dispose()
        before = everything(path)
        expected = "error: Buffer full: 1 of 60 receipts are waiting for delivery, so 60 more cannot be taken."
        assert refused("demo", path).startswith(expected)
        assert before == everything(path)

    def test_broken_demo(self, path, monkeypatch, refused):
        """A demo that does not prove what it should is an error like any other."""
        monkeypatch.setattr(demo, "_until_killed", lambda work, arguments, count: ["lost"])
        assert "error: 1 acknowledged receipts are not in the buffer: ['lost']" == refused("demo", path)

    def test_reader_gone(self, path):
        """Whoever reads what we say may stop before the end, as `head` does: no word of it, no traceback."""
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb") as nowhere:
            status = [sys.executable, "-m", "kkt_buffer", "status", str(path)]
            done = subprocess.run(status, stdout=nowhere, stderr=subprocess.PIPE, text=True, check=False)
        assert (1, "") == (done.returncode, done.stderr)

    def test_interrupted(self, path, monkeypatch, capsys):
        """Control-C is no error of ours; the exit status is the one that shells give it."""

        def interrupt(path):
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "run", interrupt)
        assert 130 == main(["demo", str(path)])
        assert ("", "interrupted; what was acknowledged is safe\n") == capsys.readouterr()

    @pytest.mark.parametrize(
        "argv", [[], ["deliver"], ["status"], ["upgrade"], ["status", "buffer.db", "--xml"], ["demo", "a.db", "b.db"]]
    )
    def test_not_understood(self, argv, capsys):
        """A command line that makes no sense is told apart from one that failed."""
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert 2 == caught.value.code
        out, err = capsys.readouterr()
        assert "" == out
        assert err.startswith("usage: python -m kkt_buffer")


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
            assert "in 1 s (here; usually 60) its leases are over" in out
            [delivered] = re.findall(r"Another worker delivers (\d+); one is rejected, and becomes a dead letter", out)
            assert int(held) == int(delivered) + 1
            assert "requeues it: 1 more delivered" in out
            [twice] = re.findall(r"The operator has all of them, (\d) of them twice", out)
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
