"""Files of the sqlite3 version are adopted: every row is kept, after a backup."""

import contextlib
import os
import pty
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import predecessor
import pytest
<<<<<<< HEAD
from builders import NOON, everything
from predecessor import adopt, driver, receipt, repairs, rows, run
from schema.helpers import HEAD, downgrade_to
=======
from alembic import command
from builders import NOON, driver, everything
>>>>>>> tests-a

from kkt_buffer import (
    BufferStorageError,
    ReceiptRepository,
    SchemaError,
    buffer,
    check,
    current,
    deliver_pending,
    upgrade,
)
from kkt_buffer.sqlite.file import backup

<<<<<<< HEAD
=======
HEAD = migrate.revisions()[-1]


def rows(path, table):
    """The rows of a table by their first column, as SQLite has them."""
    with contextlib.closing(driver().connect(path)) as db:
        db.row_factory = driver().Row
        return {row[0]: dict(row) for row in db.execute(f"SELECT * FROM {table}")}


def run(path, *statements):
    """Change a file of the predecessor by hand."""
    with contextlib.closing(driver().connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(*((statement,) if isinstance(statement, str) else statement))


def adopt(path):
    engine = create_buffer_engine(path)
    try:
        upgrade(engine)
        check(engine)
    finally:
        engine.dispose()


def repairs(path, receipt_id):
    """What the events say was found in a receipt, and what it became."""
    events = [
        row
        for row in rows(path, "buffer_events").values()
        if row["event_type"] == "receipt_repaired" and row["receipt_id"] == receipt_id
    ]
    return [(details["found"], details["became"]) for details in (json.loads(row["metadata"]) for row in events)]


@pytest.fixture
def old(tmp_path):
    """A file of the predecessor without a receipt."""
    return predecessor.make(tmp_path / "old.db")


RECEIPT = {
    "id": "r",
    "pos_id": "till-1",
    "created_at": NOON,
    "hlc_local_time": NOON,
    "hlc_logical_counter": 0,
    "hlc_server_time": None,
    "fiscal_doc": predecessor.DOCUMENT,
    "status": "pending",
    "retry_count": 0,
    "last_error": None,
    "synced_at": None,
}


def receipt(**fields):
    return predecessor.RECEIPT, list((RECEIPT | fields).values())


def letter(receipt_id="r", *, failed_at=NOON, resolved_at=None, resolved_by=None, letter_id=None):
    name = letter_id or f"letter {failed_at}"
    row = (name, receipt_id, failed_at, "rejected", predecessor.DOCUMENT, 20, "no", resolved_at, resolved_by)
    return predecessor.LETTER, row

>>>>>>> tests-a

class TestWhole:
    @pytest.mark.parametrize("size", [0, 200])
    @pytest.mark.parametrize("by", ["function", "alembic", "command"])
    def test_nothing_lost(self, tmp_path, size, by, opened):
        """Every row and every value that needed no repair is kept, whoever upgrades."""
        path = predecessor.make(tmp_path / "old.db", size)
        before = {table: rows(path, table) for table in ("receipts", "dlq", "buffer_events", "config")}
        if by == "function":
            buffer.init_buffer_db(path)
            buffer.close_buffer_db()
        elif by == "alembic":
            subprocess.run(
                [Path(sys.executable).with_name("alembic"), "-x", f"db={path}", "upgrade", "head"],
                cwd=Path(__file__).parents[2],
                check=True,
                capture_output=True,
            )
        else:
            subprocess.run([sys.executable, "-m", "kkt_buffer", "upgrade", path], check=True, capture_output=True)
        for table, was in before.items():
            found = rows(path, table)
            assert was.keys() <= found.keys()
            for key, row in was.items():
                changed = {name for name in row if row[name] != found[key][name]}
                assert changed <= {"status", "retry_count", "resolved_at", "resolved_by"}
                if table == "receipts" and changed:
                    assert repairs(path, key)
        engine = opened(path)
        check(engine)
        status = ReceiptRepository(engine).get_buffer_status()
        engine.dispose()
        statuses = [row["status"] for row in rows(path, "receipts").values()]
        open_letters = [row for row in rows(path, "dlq").values() if row["resolved_at"] is None]
        assert size == status.total_receipts
        assert statuses.count("pending") == status.pending
        assert statuses.count("failed") == status.failed == status.dlq_size == len(open_letters)
        assert "syncing" not in statuses

    def test_everything_is_delivered(self, tmp_path, opened):
        """What waited is delivered, in order, and what was given up can be requeued and delivered too."""
        path = predecessor.make(tmp_path / "old.db", 200)
        engine = opened(path)
        upgrade(engine)
        repository = ReceiptRepository(engine)
        sent = []

        def send(receipt):
            sent.append((receipt.hlc_local_time, receipt.hlc_logical_counter))
            return NOON

        while deliver_pending(repository, send).outcomes:
            pass
        assert sorted(sent) == sent
        assert repository.requeue_all(actor="Anna", reason="once more")
        while deliver_pending(repository, send).outcomes:
            pass
        status = repository.get_buffer_status()
        assert (200, 0) == (status.synced, status.dlq_size)
        stamps = [(row["hlc_local_time"], row["hlc_logical_counter"]) for row in rows(path, "receipts").values()]
        new = repository.get_receipt_by_id(repository.insert_receipt({"pos_id": "t", "fiscal_doc": {}}))
        assert (new.hlc_local_time, new.hlc_logical_counter) > max(stamps)
        engine.dispose()

    def test_order_of_rows(self, tmp_path):
        """The order in which the rows were made is kept; other tables may rely on it."""
        path = predecessor.make(tmp_path / "old.db", 50)
<<<<<<< HEAD
        with contextlib.closing(driver.connect(path)) as db:
=======
        with contextlib.closing(driver().connect(path)) as db:
>>>>>>> tests-a
            db.execute("DELETE FROM receipts WHERE rowid % 7 = 0")
            db.commit()
            before = db.execute("SELECT rowid, id FROM receipts ORDER BY rowid").fetchall()
        adopt(path)
<<<<<<< HEAD
        with contextlib.closing(driver.connect(path)) as db:
=======
        with contextlib.closing(driver().connect(path)) as db:
>>>>>>> tests-a
            assert before == db.execute("SELECT rowid, id FROM receipts ORDER BY rowid").fetchall()

    @pytest.mark.slow
    def test_large(self, tmp_path, caplog, opened):
        """A hundred thousand receipts."""
        path = predecessor.make(tmp_path / "old.db", 100_000)
        adopt(path)
        engine = opened(path)
        status = ReceiptRepository(engine).get_buffer_status()
        engine.dispose()
        assert status.total_receipts == 100_000
        assert "6 rows of config" in caplog.text
        assert "100000 rows of receipts" in caplog.text
<<<<<<< HEAD
        with contextlib.closing(driver.connect(path)) as db:
=======
        with contextlib.closing(driver().connect(path)) as db:
>>>>>>> tests-a
            assert ("ok",) == db.execute("PRAGMA integrity_check").fetchone()

    def test_once(self, old):
        """What was taken over is a buffer like any other: nothing is done again."""
        adopt(old)
        before = everything(old)
        adopt(old)
        assert before == everything(old)

    def test_parts(self, old):
        """Tables of the predecessor that are not there do not matter."""
        run(old, receipt(status="failed"), "DROP VIEW v_recent_events", "DROP TABLE dlq")
        run(old, "DROP TRIGGER trg_receipt_added", "DROP TRIGGER trg_receipt_synced", "DROP TABLE buffer_events")
        adopt(old)
        assert rows(old, "receipts")["r"]["status"] == "pending"

    def test_in_memory(self, opened):
        """A test's own predecessor in memory is taken over too; there is nothing to back up."""
        engine = opened(":memory:")
        with engine.begin() as connection:
            for statement in predecessor.statements():
                connection.exec_driver_sql(statement)
        upgrade(engine)
        check(engine)
        engine.dispose()

    def test_settings(self, old):
        """A shop's settings stay, and what was not there gets its default."""
        run(old, "UPDATE config SET value = '700' WHERE key = 'buffer_capacity'")
        adopt(old)
        found = {key: row["value"] for key, row in rows(old, "config").items()}
<<<<<<< HEAD
        assert ("700", "Ромашка", "60") == (found["buffer_capacity"], found["shop"], found["lease_seconds"])
=======
        assert ("700", "Ромашка", "300") == (found["buffer_capacity"], found["shop"], found["lease_seconds"])


class TestRepairs:
    # What is found in a receipt; the fields that it has afterwards; and what the event says of it.
    FOUND = (
        (
            {"status": "syncing"},
            {"status": "pending", "next_attempt_at": None},
            ("syncing, and nobody works on it", "pending"),
        ),
        ({"status": "failed"}, {"status": "pending"}, ("failed without a dead letter", "pending")),
        ({"retry_count": None}, {"retry_count": 0}, ("retry_count null", "0")),
        (
            {"status": "synced", "hlc_server_time": NOON + 3},
            {"status": "synced", "synced_at": NOON + 3, "hlc_server_time": NOON + 3},
            (f"synced without synced_at: {NOON + 3}", "taken from what is known"),
        ),
        (
            {"status": "synced", "synced_at": NOON + 4},
            {"status": "synced", "synced_at": NOON + 4, "hlc_server_time": NOON + 4},
            (f"synced without hlc_server_time: {NOON + 4}", "taken from what is known"),
        ),
        (
            {"status": "synced"},
            {"status": "synced", "synced_at": NOON, "hlc_server_time": NOON},
            (f"synced without synced_at: {NOON}", "taken from what is known"),
        ),
        (
            {"hlc_server_time": NOON + 1},
            {"status": "pending", "hlc_server_time": None},
            (f"pending with hlc_server_time: {NOON + 1}", "removed"),
        ),
        ({"synced_at": NOON + 1}, {"synced_at": None}, (f"pending with synced_at: {NOON + 1}", "removed")),
        ({"fiscal_doc": "{no json"}, {"fiscal_doc": "{no json"}, ("a document that is not JSON", "kept as text")),
        ({"fiscal_doc": "[" * 100_000}, {}, ("a document that is not JSON", "kept as text")),
        ({"fiscal_doc": b'{"a": 1}'}, {"fiscal_doc": '{"a": 1}'}, ("fiscal_doc is a BLOB", "made a text")),
        (
            {"fiscal_doc": b'{"a": "\xcc"}'},
            {"fiscal_doc": '{"a": "\\xcc"}'},
            ("fiscal_doc is no UTF-8", "its stray bytes are written as \\x…"),
        ),
        (
            {"created_at": NOON + 0.5},
            {"created_at": NOON},
            (f"created_at is no whole number: {NOON + 0.5} → {NOON}", "made one"),
        ),
        ({"retry_count": "many"}, {"retry_count": 0}, ("retry_count is no whole number: 'many' → 0", "made one")),
    )

    @pytest.mark.parametrize(("found", "became", "event"), FOUND)
    def test_receipt(self, old, caplog, found, became, event):
        """Each repair leaves the receipt deliverable, with an event and a line in the log."""
        run(old, receipt(**found))
        with caplog.at_level(logging.INFO, logger="kkt_buffer.adoption"):
            adopt(old)
        row = rows(old, "receipts")["r"]
        assert became == {name: row[name] for name in became}
        assert event in repairs(old, "r")
        assert f"repaired receipt r: {event[0].split(':')[0]}" in caplog.text
        assert f"{event[0].split(':')[0]} → {event[1]} (1)" in caplog.text
        engine = create_buffer_engine(old)
        repository = ReceiptRepository(engine)
        if row["status"] == "pending":
            texts = []
            report = deliver_pending(repository, lambda due: texts.append(due.fiscal_doc) or NOON)
            assert (1, [row["fiscal_doc"]]) == (report.count(Outcome.SYNCED), texts)
        engine.dispose()

    def test_sound(self, old, caplog):
        """A receipt without a fault is not called repaired."""
        run(old, receipt(), receipt(id="s", hlc_logical_counter=1))
        adopt(old)
        assert [] == repairs(old, "r") + repairs(old, "s")
        assert "repaired: nothing" in caplog.text

    def test_document(self, old):
        """A document that is not JSON says so when it is decoded, and only then."""
        run(old, receipt(fiscal_doc="{no json"))
        adopt(old)
        engine = create_buffer_engine(old)
        (found,) = ReceiptRepository(engine).get_pending_receipts()
        assert found.fiscal_doc == "{no json"
        with pytest.raises(InvalidDocumentError, match="r"):
            _ = found.document
        engine.dispose()

    def test_stray_bytes_in_text(self, old):
        """Bytes that are no UTF-8 inside a TEXT do not make the whole queue unreadable."""
        run(old, receipt(), "UPDATE receipts SET last_error = CAST(X'CFF0' AS TEXT)")
        adopt(old)
        assert rows(old, "receipts")["r"]["last_error"] == "\\xcf\\xf0"
        assert repairs(old, "r") == [("last_error is no UTF-8", "its stray bytes are written as \\x…")]

    def test_no_id(self, old):
        """A primary key that is null, which SQLite allows, becomes an id."""
        run(old, receipt(id=None))
        adopt(old)
        ((found, row),) = rows(old, "receipts").items()
        assert len(found) == 36
        assert row["fiscal_doc"] == predecessor.DOCUMENT

    def test_clock(self, old):
        """Timestamps that are equal or went back stay as they are; the next one is above all of them."""
        stamps = [(NOON, 0), (NOON, 0), (NOON + 9, 0), (NOON + 5, 3)]
        for number, (seconds, counter) in enumerate(stamps):
            run(old, receipt(id=f"r{number}", hlc_local_time=seconds, hlc_logical_counter=counter))
        adopt(old)
        found = rows(old, "receipts")
        assert stamps == [(row["hlc_local_time"], row["hlc_logical_counter"]) for row in found.values()]
        kept = [bool(repairs(old, f"r{number}")) for number in range(4)]
        assert [False, True, False, True] == kept
        engine = create_buffer_engine(old)
        repository = ReceiptRepository(engine, now=lambda: NOON)
        new = repository.get_receipt_by_id(repository.insert_receipt({"pos_id": "t", "fiscal_doc": {}}))
        assert (NOON + 9, 1) == (new.hlc_local_time, new.hlc_logical_counter)
        engine.dispose()

    @pytest.mark.parametrize("capacity", ["2", "not a number"])
    def test_too_many(self, old, capacity):
        """More than the capacity: all stay, and the next one has to wait for room."""
        run(old, ("UPDATE config SET value = ? WHERE key = 'buffer_capacity'", (capacity,)))
        wanted = 3 if capacity == "2" else 201
        run(old, *(receipt(id=f"r{number:03}", hlc_logical_counter=number) for number in range(wanted)))
        adopt(old)
        assert len(rows(old, "receipts")) == wanted
        limit = 2 if capacity == "2" else 200
        assert repairs(old, None)[-1] == (f"more receipts than buffer_capacity: {wanted} > {limit}", "all kept")
        assert rows(old, "config")["buffer_capacity"]["value"] == str(limit)

    IDS = (
        ("0F8FAD5B-D9CB-469F-A165-70867728950E", "0f8fad5b-d9cb-469f-a165-70867728950e"),
        (b"a-blob", "a-blob"),
        (b"\xcc1", "\\xcc1"),
    )

    @pytest.mark.parametrize(("found", "became"), IDS)
    def test_id(self, old, found, became):
        """An id that operations would look for in vain becomes one that they find, wherever it is referred to."""
        run(old, "CREATE TABLE sales (receipt_id TEXT REFERENCES receipts (id))")
        run(old, receipt(id=found, status="failed"), ("INSERT INTO sales VALUES (?)", (found,)))
        run(old, letter(found), ("UPDATE buffer_events SET receipt_id = ?", (found,)))
        adopt(old)
        assert [became] == list(rows(old, "receipts")) == list(rows(old, "sales"))
        assert rows(old, "buffer_events")[1]["receipt_id"] == became
        assert ("another" in dict(repairs(old, became)).values()) == (found != became)
        engine = create_buffer_engine(old)
        repository = ReceiptRepository(engine)
        (open_letter,) = repository.list_dead_letters()
        repository.requeue(open_letter.original_receipt_id, actor="Anna", reason="again")
        assert deliver_pending(repository, lambda _: NOON).count(Outcome.SYNCED) == 1
        engine.dispose()

    def test_id_is_taken(self, old):
        """Two ids that differ by their letters' case alone are two receipts."""
        lower = "0f8fad5b-d9cb-469f-a165-70867728950e"
        run(old, receipt(id=lower), receipt(id=lower.upper(), hlc_logical_counter=1))
        adopt(old)
        assert len({lower, *rows(old, "receipts")}) == 2

    @pytest.mark.parametrize(
        ("created_at", "became"),
        [("2026-03-01 12:00:00", NOON), ("2026-03-01T15:00:00+03:00", NOON), ("yesterday", NOON - 9), (1e30, NOON - 9)],
    )
    def test_deadline(self, old, created_at, became):
        """The 30 days run from when the receipt was made: from its text, or from its other time."""
        run(old, receipt(created_at=created_at, hlc_local_time=NOON - 9))
        adopt(old)
        assert rows(old, "receipts")["r"]["created_at"] == became

    def test_fresh_attempts(self, old):
        """A receipt that nobody gave up has its attempts before it, as after a requeue."""
        run(old, receipt(status="failed", retry_count=20))
        adopt(old)
        assert rows(old, "receipts")["r"]["retry_count"] == 0

    def test_resolved_when(self, old):
        """A dead letter that was resolved at some odd time stays resolved, by whom it was."""
        run(old, receipt(status="failed"), letter(resolved_at="2026-03-01 12:00:00", resolved_by="Анна"))
        run(old, letter(failed_at=NOON + 1, resolved_at="once", resolved_by="Иван"))
        adopt(old)
        assert ["Анна", "Иван"] == [row["resolved_by"] for row in rows(old, "dlq").values()]
        assert rows(old, "dlq")[f"letter {NOON}"]["resolved_at"] == NOON

    @pytest.mark.parametrize(
        ("value", "became"), [("200.0", "200"), (b"300", "300"), ("0", "1"), ("-5", "1"), ("many", "200")]
    )
    def test_setting(self, old, value, became):
        """A setting that is no whole number would stop the buffer."""
        run(old, ("UPDATE config SET value = ? WHERE key = 'buffer_capacity'", (value,)))
        adopt(old)
        assert rows(old, "config")["buffer_capacity"]["value"] == became

    def test_event_times(self, old):
        run(old, receipt(), "UPDATE buffer_events SET timestamp = '2026-03-01 12:00:00'")
        adopt(old)
        assert rows(old, "buffer_events")[1]["timestamp"] == NOON

    LETTERS = (
        ("failed", [letter(failed_at=NOON), letter(failed_at=NOON + 1)], [NOON + 1]),
        ("failed", [letter(failed_at=NOON, letter_id="b"), letter(failed_at=NOON, letter_id="a")], [NOON]),
        ("failed", [letter()], [NOON]),
        ("synced", [letter()], []),
        ("pending", [letter()], []),
        ("syncing", [letter()], []),
        ("failed", [letter(resolved_at=NOON + 5, resolved_by="Ivan")], []),
        ("failed", [letter(resolved_at=NOON + 5)], []),
        ("failed", [letter(resolved_by="Ivan")], [NOON]),
        (None, [letter()], []),
    )

    @pytest.mark.parametrize(("status", "letters", "still_open"), LETTERS)
    def test_letters(self, old, status, letters, still_open):
        """One open dead letter at most, and that of a failed receipt; the others are resolved by the adoption."""
        times = {"synced_at": NOON, "hlc_server_time": NOON} if status == "synced" else {}
        run(old, *([receipt(status=status, **times)] if status else []), *letters)
        adopt(old)
        found = rows(old, "dlq").values()
        assert len(found) == len(letters)
        assert still_open == [row["failed_at"] for row in found if row["resolved_at"] is None]
        closed = [row for row in found if row["resolved_at"] is not None]
        assert {row["resolved_by"] for row in closed} <= {"adoption", "Ivan"}
        by_us = [row for row in closed if row["resolved_by"] == "adoption"]
        assert len(by_us) <= len(repairs(old, "r"))
        expected = {"syncing": "pending"}.get(status, status)
        assert [expected] * bool(status) == [row["status"] for row in rows(old, "receipts").values()]

    def test_letter_values(self, old):
        """Dead letters are read as numbers and texts too."""
        sql, row = letter(failed_at=NOON + 0.5)
        run(old, receipt(status="failed"), (sql, [None, *row[1:3], b"bad \xff", *row[4:]]))
        adopt(old)
        (found,) = rows(old, "dlq").values()
        assert (NOON, "bad \\xff", 36) == (found["failed_at"], found["reason"], len(found["id"]))


class TestOthers:
    def test_untouched(self, tmp_path):
        """Tables, views, indexes and triggers that are not ours are the same afterwards, and work."""
        path = predecessor.make(tmp_path / "old.db", 20)
        names = ("pos_sessions", "cash_transactions", "loyalty", "v_turnover", "v_recent_events", "shop_points")

        def others():
            with contextlib.closing(driver().connect(path)) as db:
                found = db.execute("SELECT name, sql FROM sqlite_master").fetchall()
                data = [db.execute(f"SELECT * FROM {name}").fetchall() for name in (*names[:4],)]
                return {name: sql for name, sql in found if name in (*names, "idx_cash_receipt")}, data

        before = others()
        assert len(before[0]) == len(names) + 1
        adopt(path)
        assert before == others()
        engine = create_buffer_engine(path)
        ReceiptRepository(engine).insert_receipt({"pos_id": "till-1", "fiscal_doc": {}})
        engine.dispose()
        assert len(rows(path, "loyalty")) == 21
        with contextlib.closing(driver().connect(path)) as db:
            newest = db.execute("SELECT event_type, event_time FROM v_recent_events LIMIT 1").fetchone()
            db.execute("PRAGMA foreign_keys = ON")
            assert [] == db.execute("PRAGMA foreign_key_check").fetchall()
        assert newest[0] == "receipt_added"

    def test_our_old_indexes_go(self, old):
        adopt(old)
        with contextlib.closing(driver().connect(old)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        gone = {"idx_receipts_created_at", "idx_receipts_retry", "idx_dlq_failed_at", "idx_events_timestamp"}
        assert names.isdisjoint(gone)

    def test_broken_references(self, tmp_path, caplog):
        """References of the shop's own that were broken before stay what they are, and do not stand in the way."""
        path = predecessor.make(tmp_path / "old.db", 5)
        run(path, "INSERT INTO cash_transactions (receipt_id, amount) VALUES ('gone', 1)")
        run(path, letter("also gone"))
        adopt(path)
        assert "foreign keys were violated before" in caplog.text
        assert [row["amount"] for row in rows(path, "cash_transactions").values()].count(1) == 1

    def test_columns_of_the_shop(self, old, caplog):
        """Columns that a shop has added to a table of ours are kept as they were defined, and work."""
        for column in (
            '"shift no" INTEGER NOT NULL DEFAULT 7',
            "cashier TEXT NOT NULL DEFAULT 'Иванова, А.' COLLATE NOCASE",
            "[length] INTEGER GENERATED ALWAYS AS (length(fiscal_doc)) VIRTUAL",
        ):
            run(old, f"ALTER TABLE receipts ADD COLUMN {column}")
        run(
            old,
            receipt(),
            "CREATE TABLE lengths (n INTEGER)",
            "CREATE TRIGGER shop_length AFTER INSERT ON receipts BEGIN INSERT INTO lengths VALUES (NEW.length); END",
        )
        adopt(old)
        engine = create_buffer_engine(old)
        ReceiptRepository(engine).insert_receipt({"pos_id": "t", "fiscal_doc": "{}"})
        engine.dispose()
        found = list(rows(old, "receipts").values())
        assert [7, 7] == [row["shift no"] for row in found]
        assert ["Иванова, А."] * 2 == [row["cashier"] for row in found]
        assert 2 in rows(old, "lengths")
        assert "kept the column shift no of receipts, which is not ours" in caplog.text

    def test_stored_column(self, tmp_path):
        """What SQLite cannot add again as it was is kept as a plain column, with its values."""
        ddl = "email TEXT UNIQUE, -- a comment, with a comma\n    pos_id TEXT NOT NULL"
        path = tmp_path / "old.db"
        with contextlib.closing(driver().connect(path)) as db:
            db.executescript(predecessor.DDL.replace("pos_id TEXT NOT NULL", ddl, 1))
        run(path, receipt(), "UPDATE receipts SET email = 'a@b'")
        adopt(path)
        assert rows(path, "receipts")["r"]["email"] == "a@b"

    def test_unique_index(self, old, caplog):
        """An index of the shop's own goes, and where it was a rule, the log says so."""
        run(old, "CREATE UNIQUE INDEX shop_unique ON receipts (pos_id, created_at)")
        adopt(old)
        assert "dropped the index shop_unique" in caplog.text

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (
                "ALTER TABLE receipts ADD COLUMN next_attempt_at TEXT",
                "duplicate column name: next_attempt_at. What has",
            ),
            (
                "ALTER TABLE receipts ADD COLUMN changed_at TEXT",
                "duplicate column name: changed_at. What has this name",
            ),
            ("CREATE TABLE buffer_counts (a)", "buffer_counts already exists. What has this name there is not ours"),
            (
                "ALTER TABLE dlq DROP COLUMN last_error",
                "table dlq is not that of the sqlite3 version: it has no column",
            ),
        ],
    )
    def test_names_of_ours(self, old, change, told):
        """What has a name of ours stands in the way; it is named, and nothing is changed, nor left beside the file."""
        run(old, receipt(), change)
        before = everything(old)
        with pytest.raises(SchemaError, match=told):
            adopt(old)
        assert before == everything(old)
        assert [] == list(old.parent.glob("*before-adoption*"))

    def test_ids_of_events(self, old):
        """An id of an event is never given twice, even if the latest events were deleted."""
        run(old, receipt(), receipt(id="s", hlc_logical_counter=1), "DELETE FROM buffer_events")
        adopt(old)
        engine = create_buffer_engine(old)
        assert ReceiptRepository(engine).log_event("circuit_opened") == 3
        engine.dispose()

    def test_another_receipts_table(self, tmp_path):
        """A table of the same name that is not the predecessor's is not taken for it."""
        path = tmp_path / "shop.db"
        run(path, "CREATE TABLE receipts (id INTEGER PRIMARY KEY, total INTEGER)", "INSERT INTO receipts VALUES (1, 5)")
        with pytest.raises(SchemaError, match="failed and was rolled back; .*receipts already exists"):
            adopt(path)
        assert {1: {"id": 1, "total": 5}} == rows(path, "receipts")
        assert [] == list(tmp_path.glob("*before-adoption*"))
>>>>>>> tests-a


class TestBackup:
    def test_beside_itself(self, old, caplog):
        """The file as it was is kept beside it, for its owner alone, and the log says where."""
        run(old, receipt(status="syncing"))
        before = everything(old)
        adopt(old)
        (copy,) = old.parent.glob("old.db.before-adoption-*")
        assert str(copy) in caplog.text
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert before == everything(copy)

    def test_back(self, old):
        """The backup is a file like the first: it is taken over in the same way."""
        run(old, receipt(status="syncing"))
        adopt(old)
        (copy,) = old.parent.glob("old.db.before-adoption-*")
        again = shutil.copy(copy, old.with_name("again.db"))
        adopt(again)
        same = [rows(path, "receipts") for path in (old, again)]
        assert same[0] == same[1]

    def test_no_room(self, old, monkeypatch):
        """Without a backup nothing is changed."""
        run(old, receipt())
        before = everything(old)
        in_the_way = old.with_name("a file where a folder should be")
        in_the_way.touch()
        copy = in_the_way / "copy.db"
        monkeypatch.setattr("kkt_buffer.sqlite.file.backup", lambda engine, _: backup(engine, copy))
        with pytest.raises(BufferStorageError, match="the backup .* cannot be used: .*Nothing was written"):
            adopt(old)
        assert before == everything(old)

    def test_unfinished(self, old):
        """What a kill left of an earlier copy is taken away."""
        unfinished = old.with_name(f".{old.name}.before-adoption-20260301-120000.unfinished")
        unfinished.touch()
        adopt(old)
        assert not unfinished.exists()

    def test_fails_later(self, old, monkeypatch, opened):
        """An adoption that fails at its end leaves the file as it was, and says so."""
        run(old, receipt(), "CREATE TRIGGER trg_guard_capacity AFTER INSERT ON loyalty BEGIN SELECT 1; END")
        before = everything(old)
        engine = opened(old)
        with pytest.raises(
            SchemaError, match="rolled back; the database is as it was. trigger trg_guard_capacity already"
        ):
            upgrade(engine)
        engine.dispose()
        assert before == everything(old)
        assert [] == list(old.parent.glob("*before-adoption*"))


class TestRefused:
    def test_status(self, old):
        """Who may only look says what the file is, and what to run."""
        done = subprocess.run(
            [sys.executable, "-m", "kkt_buffer", "status", old], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert f"the schema of the sqlite3 version where this release needs {HEAD}" in done.stderr

    def test_not_now(self, old):
        before = everything(old)
        with pytest.raises(SchemaError, match="the schema of the sqlite3 version"):
            buffer.init_buffer_db(old, upgrade=False)
        assert before == everything(old)

    def test_down(self, old, opened):
        """What was taken over goes no further down than to the first schema: it holds receipts."""
        run(old, receipt())
        adopt(old)
        engine = opened(old)
        downgrade_to(engine, "0001")
        assert current(engine) == "0001"
        with pytest.raises(Exception, match="refusing to drop the buffer: it holds 1 receipts"):
            downgrade_to(engine, "base")
        upgrade(engine)
        check(engine)
        engine.dispose()


def test_progress(tmp_path):
    """On a terminal the upgrade says how far it is."""
    path = predecessor.make(tmp_path / "old.db", 200)
    leader, follower = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "kkt_buffer", "upgrade", path], stderr=follower, check=False)
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(leader, 4096):
            said += chunk
    os.close(leader)
    assert done.returncode == 0
    assert b"adopting receipts: 200 of 200 (100 %)" in said
    assert b"backup, pages: " in said
