"""Rows of the sqlite3 version that break an invariant are repaired, and each repair is on record."""

import logging

import predecessor
import pytest
from builders import NOON
from predecessor import adopt, letter, receipt, repairs, rows, run

from kkt_buffer import (
    InvalidDocumentError,
    Outcome,
    ReceiptRepository,
    deliver_pending,
)


class TestRepairs:
    # What is found in a receipt; the fields that it has afterwards; and what the event says of it.
    FOUND = (
        (
            {"status": "syncing"},
            {"status": "pending", "next_attempt_at": None},
            ("syncing without a lease", "pending"),
        ),
        ({"status": "failed"}, {"status": "pending"}, ("failed without a dead letter", "pending")),
        ({"retry_count": None}, {"retry_count": 0}, ("retry_count null", "0")),
        (
            {"status": "synced", "hlc_server_time": NOON + 3},
            {"status": "synced", "synced_at": NOON + 3, "hlc_server_time": NOON + 3},
            (f"synced without synced_at: {NOON + 3}", "set from another time of the receipt"),
        ),
        (
            {"status": "synced", "synced_at": NOON + 4},
            {"status": "synced", "synced_at": NOON + 4, "hlc_server_time": NOON + 4},
            (f"synced without hlc_server_time: {NOON + 4}", "set from another time of the receipt"),
        ),
        (
            {"status": "synced"},
            {"status": "synced", "synced_at": NOON, "hlc_server_time": NOON},
            (f"synced without synced_at: {NOON}", "set from another time of the receipt"),
        ),
        (
            {"hlc_server_time": NOON + 1},
            {"status": "pending", "hlc_server_time": None},
            (f"pending with hlc_server_time: {NOON + 1}", "removed"),
        ),
        ({"synced_at": NOON + 1}, {"synced_at": None}, (f"pending with synced_at: {NOON + 1}", "removed")),
        ({"fiscal_doc": "{no json"}, {"fiscal_doc": "{no json"}, ("a document that is not JSON", "kept as text")),
        ({"fiscal_doc": "[" * 100_000}, {}, ("a document that is not JSON", "kept as text")),
        ({"fiscal_doc": b'{"a": 1}'}, {"fiscal_doc": '{"a": 1}'}, ("fiscal_doc is a BLOB", "converted to text")),
        (
            {"fiscal_doc": b'{"a": "\xcc"}'},
            {"fiscal_doc": '{"a": "\\xcc"}'},
            ("fiscal_doc is not UTF-8", "its invalid bytes are written as \\x…"),
        ),
        (
            {"created_at": NOON + 0.5},
            {"created_at": NOON},
            (f"created_at is not a whole number: {NOON + 0.5} → {NOON}", "replaced"),
        ),
        ({"retry_count": "many"}, {"retry_count": 0}, ("retry_count is not a whole number: 'many' → 0", "replaced")),
    )

    @pytest.mark.parametrize(("found", "became", "event"), FOUND)
    def test_receipt(self, old, caplog, found, became, event, opened):
        """Each repair leaves the receipt deliverable, with an event and a line in the log."""
        run(old, receipt(**found))
        with caplog.at_level(logging.INFO, logger="kkt_buffer.migrations"):
            adopt(old)
        row = rows(old, "receipts")["r"]
        assert became == {name: row[name] for name in became}
        assert event in repairs(old, "r")
        assert f"repaired receipt r: {event[0].split(':')[0]}" in caplog.text
        assert f"{event[0].split(':')[0]} → {event[1]} (1)" in caplog.text
        engine = opened(old)
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

    def test_document(self, old, opened):
        """A document that is not JSON says so when it is decoded, and only then."""
        run(old, receipt(fiscal_doc="{no json"))
        adopt(old)
        engine = opened(old)
        (found,) = ReceiptRepository(engine).get_pending_receipts()
        assert found.fiscal_doc == "{no json"
        with pytest.raises(InvalidDocumentError, match="r"):
            _ = found.document
        engine.dispose()

    def test_stray_bytes_in_text(self, old):
        """Bytes that are not UTF-8 inside a TEXT do not make the whole queue unreadable."""
        run(old, receipt(), "UPDATE receipts SET last_error = CAST(X'CFF0' AS TEXT)")
        adopt(old)
        assert rows(old, "receipts")["r"]["last_error"] == "\\xcf\\xf0"
        assert repairs(old, "r") == [("last_error is not UTF-8", "its invalid bytes are written as \\x…")]

    def test_no_id(self, old):
        """A primary key that is null, which SQLite allows, becomes an id."""
        run(old, receipt(id=None))
        adopt(old)
        ((found, row),) = rows(old, "receipts").items()
        assert len(found) == 36
        assert row["fiscal_doc"] == predecessor.DOCUMENT

    def test_clock(self, old, opened):
        """Timestamps that are equal or went back stay as they are; the next one is above all of them."""
        stamps = [(NOON, 0), (NOON, 0), (NOON + 9, 0), (NOON + 5, 3)]
        for number, (seconds, counter) in enumerate(stamps):
            run(old, receipt(id=f"r{number}", hlc_local_time=seconds, hlc_logical_counter=counter))
        adopt(old)
        found = rows(old, "receipts")
        assert stamps == [(row["hlc_local_time"], row["hlc_logical_counter"]) for row in found.values()]
        kept = [bool(repairs(old, f"r{number}")) for number in range(4)]
        assert [False, True, False, True] == kept
        engine = opened(old)
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
    def test_id(self, old, found, became, opened):
        """An id that operations would look for in vain becomes one that they find, wherever it is referred to."""
        run(old, "CREATE TABLE sales (receipt_id TEXT REFERENCES receipts (id))")
        run(old, receipt(id=found, status="failed"), ("INSERT INTO sales VALUES (?)", (found,)))
        run(old, letter(found), ("UPDATE buffer_events SET receipt_id = ?", (found,)))
        adopt(old)
        assert [became] == list(rows(old, "receipts")) == list(rows(old, "sales"))
        assert rows(old, "buffer_events")[1]["receipt_id"] == became
        assert ("another" in dict(repairs(old, became)).values()) == (found != became)
        engine = opened(old)
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
        """A setting that is not a whole number would stop the buffer."""
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
