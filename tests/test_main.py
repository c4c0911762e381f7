"""The command line, and the demo that it plays."""

import json
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
from builders import NOON, a_receipt, an_id, everything, new_receipt, run_python

from kkt_buffer import ReceiptStatus, create_buffer_engine, demo
from kkt_buffer.__main__ import main
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


def stored_ids(path):
    with closing(sqlite3.connect(path)) as connection:
        return {receipt_id for (receipt_id,) in connection.execute("SELECT id FROM receipts")}


def stored_tables(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT name FROM sqlite_master").fetchall()


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
failed             | 1  (1 dead letters are open)
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
        assert "schema 9999, which a newer release made" in refused(command, used)
        assert before == everything(used)

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
    def test_twice(self, tmp_path, capsys):
        """The whole shift, with its real kill, twice on the same file; what it tells is what the file then holds."""
        path = tmp_path / "shop" / "demo.db"
        delivered = 0
        for shift in (1, 2):
            assert 0 == main(["demo", str(path)])
            out, err = capsys.readouterr()
            assert "" == err
            assert "only the operator (ОФД) is simulated" in out
            assert int(re.search(r"after (\d+) receipts its process is killed with SIGKILL", out)[1]) >= 40
            assert re.search(r"all (\d+) acknowledged receipts are there, none is missing", out)
            assert "finishes the shift with 60 receipts" in out
            assert "OUT OF ORDER" not in out
            delivered += int(re.search(r"(\d+) delivered, in HLC order; 1 rejected and dead-lettered", out)[1])
            assert re.search(rf"^synced +\| {delivered}$", out, re.MULTILINE)
            assert re.search(rf"^failed +\| {shift}  \({shift} dead letters are open\)$", out, re.MULTILINE)
        # A receipt on which the kill fell may be there twice: once not acknowledged, once sold again.
        assert delivered >= 2 * 59
        assert {"synced": delivered, "failed": 2, "open": 2} == counts(path)

    def test_all_that_waits(self, file_repository, file_engine, path):
        """Receipts that were waiting are told of, and leave with the others."""
        for _ in range(3):
            a_receipt(file_repository)
        file_engine.dispose()
        said = []
        demo.run(path, said.append)
        assert "   3 receipts of an earlier run are still waiting in it." in said
        delivered = int(re.search(r"(\d+) delivered", said[-1])[1])
        assert delivered >= 3 + 59
        assert {"synced": delivered, "failed": 1, "open": 1} == counts(path)

    def test_missing(self, path, monkeypatch):
        """A receipt that was acknowledged and is not there ends the demo with an error: it proves, it does not play."""
        lost = an_id()
        monkeypatch.setattr(demo, "_sell_and_kill", lambda path, documents: [lost])
        with pytest.raises(RuntimeError, match=f"1 acknowledged receipts are not in the buffer: .*{lost}"):
            demo.run(path, lambda line: None)


class TestTill:
    def test_acknowledges(self, path):
        """The till names each receipt that is on disk, one by one, and says when it is done."""
        documents = list(demo.sample_receipts(3))
        ours, theirs = multiprocessing.Pipe(duplex=False)
        with ours, theirs:
            demo._till(str(path), documents, theirs)
            sent = [ours.recv() for _ in range(4)]
        assert sent.pop() is None
        assert set(sent) == stored_ids(path)

    def test_killed(self, file_repository, file_engine, path):
        """A kill in the middle of the work: nothing is missing that was acknowledged, and the rest was not sold."""
        file_repository.set_config("buffer_capacity", 500)
        file_engine.dispose()
        acknowledged = demo._sell_and_kill(str(path), list(demo.sample_receipts(500)))
        assert len(acknowledged) >= demo.KILL_AFTER
        assert set(acknowledged) <= stored_ids(path)
        assert len(stored_ids(path)) < 500

    def test_killed_too_late(self, path, monkeypatch):
        """A till that has finished before the kill falls has acknowledged everything."""

        def kill(pid, number):
            assert signal.SIGKILL == number
            for till in multiprocessing.active_children():
                till.join()

        monkeypatch.setattr(os, "kill", kill)
        acknowledged = demo._sell_and_kill(str(path), list(demo.sample_receipts(demo.KILL_AFTER + 5)))
        assert demo.KILL_AFTER + 5 == len(acknowledged)
        assert set(acknowledged) == stored_ids(path)


class TestSampleReceipts:
    @pytest.fixture
    def documents(self):
        """Those that the demo plays."""
        return list(demo.sample_receipts(demo.RECEIPTS_PER_SHIFT))

    @pytest.fixture
    def items(self, documents):
        return [item for document in documents for item in document["items"]]

    def test_deterministic(self, documents):
        """The same receipts each time, so that two runs can be compared; others with another seed."""
        assert documents == list(demo.sample_receipts(demo.RECEIPTS_PER_SHIFT))
        assert documents[:5] == list(demo.sample_receipts(5))
        assert documents != list(demo.sample_receipts(demo.RECEIPTS_PER_SHIFT, seed=1))

    @pytest.mark.parametrize("count", [0, 1, 10])
    def test_count(self, count):
        assert count == len(list(demo.sample_receipts(count)))

    def test_kinds(self, documents):
        """Sale, return, purchase, return of a purchase; cash, card and both; every taxation."""
        assert {1, 2, 3, 4} == {document["operationType"] for document in documents}
        assert {1, 2, 32} == {document["taxationType"] for document in documents}
        paid = {(document["cashTotalSum"] > 0, document["ecashTotalSum"] > 0) for document in documents}
        assert {(True, False), (False, True), (True, True)} == paid

    def test_sizes(self, documents):
        """From one item to as many as a big shop sells in one go."""
        assert {1, 2, 3, 5, 8, 77} == {len(document["items"]) for document in documents}

    def test_numbers(self, documents):
        """Each document has a number of its own."""
        assert len(documents) == len({document["fiscalDocumentNumber"] for document in documents})

    def test_sums(self, documents):
        """The items add up to the total, and so does what was paid; money is whole kopecks."""
        for document in documents:
            total = document["totalSum"]
            assert type(total) is int
            assert total == sum(item["sum"] for item in document["items"])
            assert total == document["cashTotalSum"] + document["ecashTotalSum"]

    def test_quantities(self, items):
        """Goods by piece and by weight; the sum of each is its price times its quantity, to the kopeck."""
        assert {int, float} == {type(item["quantity"]) for item in items}
        assert [] == [item for item in items if item["sum"] != round(item["price"] * item["quantity"])]
        assert [] == [item for item in items if item["quantity"] != round(item["quantity"], 3)]

    def test_marked(self, items):
        """Marked goods carry their code as the scanner read it, separators and all."""
        codes = [item["productCodeData"]["rawProductCode"] for item in items if "productCodeData" in item]
        assert codes
        assert [] == [code for code in codes if "\x1d" not in code]
        assert {33} == {item["productType"] for item in items if "productCodeData" in item}

    def test_texts(self, documents, items):
        """Blanks at the end that belong to the value, quotes, runs of blanks, letters beyond ASCII."""
        assert {"0000000001000042    "} == {document["kktRegId"] for document in documents}
        names = {item["name"] for item in items}
        assert 'Сыр "Российский" 45% ' in names
        assert "АИ-95-К5                      ТРК 4" in names
        assert "Перевозка, зона 2\xa0→\xa03" in names

    def test_optional_parts(self, documents):
        """Some buyers want their receipt by mail, some shops add a field of their own, most do neither."""
        assert {True, False} == {"buyerPhoneOrAddress" in document for document in documents}
        assert {True, False} == {"propertiesUser" in document for document in documents}

    def test_unchanged(self, documents, repository):
        """Each comes out of the buffer as it went in."""
        receipt_ids = [repository.insert_receipt(new_receipt(fiscal_doc=document)) for document in documents]
        assert documents == [repository.get_receipt_by_id(receipt_id).document for receipt_id in receipt_ids]
        assert documents == [receipt.document for receipt in repository.get_pending_receipts(100)]
