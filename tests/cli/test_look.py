"""Commands that look at a buffer: what they print, for people and for programs."""

import json
import re

import pytest
from builders import NOON, a_document, a_foreign_receipt, a_receipt, an_id, another_program, everything, new_receipt
from terminal import in_terminal, without_distances

from kkt_buffer.migrate import revisions

HEAD = revisions()[-1]
DAY = 86_400


class TestList:
    def test_undelivered(self, filled, done):
        """Without a status: those that the OFD does not have."""
        lines = done("list", filled).splitlines()
        assert ["STATUS", "syncing", "pending", "failed"] == [line.split()[2] for line in lines]
        assert max(map(len, lines)) <= 80

    def test_one_status(self, filled, done):
        [_, line] = done("list", filled, "--status", "synced").splitlines()
        assert "synced" in line

    def test_of_one_till(self, shared_engine, shared_repository, buffer, done):
        mine = a_receipt(shared_repository, pos_id="till-2")
        a_receipt(shared_repository)
        shared_engine.dispose()
        [_, line] = done("list", buffer, "--pos", "till-2").splitlines()
        assert line.startswith(mine.id)

    def test_last_error_and_held(self, shared_engine, shared_repository, buffer, done):
        """The last error stands below its receipt; a held receipt is told apart."""
        shared_repository.insert_receipt(new_receipt(), hold=True)
        receipt = a_receipt(shared_repository)
        shared_repository.increment_retry_count(receipt.id, "HTTP 500\n<html>" + "x" * 99)
        shared_engine.dispose()
        _, held, failed, error = done("list", buffer).splitlines()
        assert ("held", "    HTTP 500") == (held.split()[2], error)
        assert failed.endswith("1")

    def test_long_error(self, shared_engine, shared_repository, buffer, done):
        """It is cut to the width of a terminal, and complete in a file or a pipe."""
        receipt = a_receipt(shared_repository)
        shared_repository.increment_retry_count(receipt.id, "x" * 99)
        shared_engine.dispose()
        assert "    " + "x" * 99 == done("list", buffer).splitlines()[-1]
        assert "    " + "x" * 75 + "…" in in_terminal("list", buffer).out

    def test_none(self, buffer, done):
        assert "no such receipts\n" == done("list", buffer)

    def test_more(self, shared_engine, shared_repository, buffer, run):
        """It is told when there are more."""
        shared_repository.insert_receipts(new_receipt() for _ in range(3))
        shared_engine.dispose()
        ended = run("list", buffer, "--limit", 2)
        assert (0, "only the first 2 pending receipts; --limit shows more\n") == (ended.status, ended.err)
        assert 3 == len(ended.out.splitlines())
        assert "" == run("list", buffer, "--limit", 3).err

    def test_json(self, shared_engine, shared_repository, buffer, done):
        """One object per line, with the document decoded and masked."""
        receipt = a_receipt(shared_repository, fiscal_doc=a_document(operator="Кассир Иванова"))
        shared_engine.dispose()
        [line] = done("list", buffer, "--json").splitlines()
        assert receipt.to_dict() | {"fiscal_doc": a_document(operator="***")} == json.loads(line)
        assert receipt.to_dict() == json.loads(done("list", buffer, "--json", "--reveal"))


class TestShow:
    def test_all_of_it(self, shared_engine, shared_repository, buffer, clock, done, moscow):
        """Its state, its document, and what happened to it, in the order in which it happened."""
        receipt = a_receipt(shared_repository, fiscal_doc='{"totalSum": 6490}')
        clock.seconds += 5
        shared_repository.increment_retry_count(receipt.id, "HTTP 500")
        clock.seconds += 5
        shared_repository.mark_synced(receipt.id, NOON + 9)
        shared_engine.dispose()
        expected = f"""\
receipt    | {receipt.id}
till       | till-1
status     | synced
stored     | 2026-03-01 15:00:00 +0300
attempts   | 1
last error | HTTP 500
delivered  | 2026-03-01 15:00:10 +0300, by the clock of the OFD 2026-03-01 15:00:09 +0300
document   | 18 bytes, intact

document
{{
  "totalSum": 6490
}}

what happened
2026-03-01 15:00:00  added           pos_id: till-1
2026-03-01 15:00:05  attempt_failed  retry_count: 1, error: HTTP 500
2026-03-01 15:00:10  synced          server_time: {NOON + 9}, retry_count: 1
"""
        assert expected == without_distances(done("show", receipt.id, "--db", buffer))

    def test_states(self, shared_engine, shared_repository, buffer, done, moscow):
        """Held, leased, waiting for its next attempt; and until when it must be delivered."""
        held = shared_repository.insert_receipt(new_receipt(), hold=True)
        failing = a_receipt(shared_repository)
        [claimed] = shared_repository.claim_pending()
        shared_repository.record_failure(claimed.id, "HTTP 500", claimed.lease_token)
        leased = a_receipt(shared_repository, "syncing")
        shared_engine.dispose()
        shown = [without_distances(done("show", one, "--db", buffer)) for one in (held, failing.id, leased.id)]
        assert "pending, held since 2026-03-01 15:00:00 +0300: not printed yet" in shown[0]
        assert re.search(r"pending, next attempt 2026-03-01 15:00:0\d \+0300", shown[1])
        assert "syncing, leased until 2026-03-01 15:01:00 +0300" in shown[2]
        assert all("deliver before | 2026-03-31 15:00:00 +0300" in one for one in shown)

    def test_folded(self, shared_engine, shared_repository, buffer, done):
        """A long list is cut, unless all of it is asked for."""
        items = [{"name": f"item {number}"} for number in range(9)]
        receipt = a_receipt(shared_repository, fiscal_doc={"items": items, "tags": [1, 2, 3]})
        shared_engine.dispose()
        shown = done("show", receipt.id, "--db", buffer)
        assert ["item 0", "item 1", "item 2"] == re.findall(r"item \d", shown)
        assert '"… 6 more; --full shows them"' in shown
        assert 9 == len(re.findall(r"item \d", done("show", receipt.id, "--db", buffer, "--full")))

    def test_personal(self, shared_engine, shared_repository, buffer, done):
        """Personal data of the buyer and the cashier are masked, at any depth, unless asked for."""
        secrets = {
            "buyerPhoneOrAddress": "+79001234567",
            "operator": "Иванова А.А.",
            "operatorInn": "123456789047",
            "buyerInformation": {"buyer": "Петров", "buyerInn": "500100732259", "buyerAddress": ["Москва"]},
            "items": [{"name": "Хлеб", "nested": [{"BuyerInn": "7707083893"}]}],
            "cashier": {"name": "Сидорова"},
            "buyerAddress": None,
        }
        words = [
            "+79001234567",
            "Иванова",
            "123456789047",
            "Петров",
            "500100732259",
            "Москва",
            "7707083893",
            "Сидорова",
        ]
        receipt = a_receipt(shared_repository, fiscal_doc={**secrets, "operatorTransferName": "a firm", "user": "ООО"})
        shared_engine.dispose()
        shown = done("show", receipt.id, "--db", buffer)
        assert [] == [word for word in words if word in shown]
        assert "Хлеб" in shown
        assert "a firm" in shown
        assert '"buyerAddress": null' in shown
        assert words == [word for word in words if word in done("show", receipt.id, "--db", buffer, "--reveal")]

    def test_numbers(self, shared_engine, shared_repository, buffer, done):
        """Every value is shown as it was stored: also 10.10, and whatever a float cannot hold."""
        document = """\
{
  "totalSum": 10.10,
  "sums": [
    1E2,
    -0,
    123456789012345678901234567890
  ],
  "nothing": [],
  "none": {},
  "text": "10.10",
  "paid": true,
  "Касса": null
}
"""
        receipt = a_receipt(shared_repository, fiscal_doc=document)
        shared_engine.dispose()
        assert document in done("show", receipt.id, "--db", buffer)

    def test_not_json(self, filled, done):
        """What cannot be decoded cannot be masked, so it is not shown."""
        receipt_id = an_id()
        with another_program(filled) as db:
            db.execute(
                "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)"
                f" VALUES ('{receipt_id}', 'till-1', {NOON}, {NOON + 1}, 0, 'phone +7900')"
            )
        assert "not JSON; --reveal shows it as it is" in done("show", receipt_id, "--db", filled)
        assert "phone +7900" in done("show", receipt_id, "--db", filled, "--reveal")
        assert "7900" not in done("list", filled, "--json")
        assert "7900" in done("list", filled, "--json", "--reveal")

    def test_damaged(self, file_engine, file_repository, path, done):
        """A document that is not what was stored is told of."""
        receipt = a_receipt(file_repository, fiscal_doc='{"totalSum": 6490}')
        file_engine.dispose()
        content = path.read_bytes()
        with another_program(path) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            content = path.read_bytes()
        path.write_bytes(content.replace(b'"totalSum": 6490', b'"totalSum": 6491'))
        assert "CHANGED since it was stored" in done("show", receipt.id, "--db", path)

    def test_terminal(self, shared_engine, shared_repository, buffer):
        """In 80 columns nothing is cut and nothing is wider; control characters do not reach the terminal."""
        receipt = a_receipt(shared_repository, fiscal_doc={"name": "\x9b2J\u202e"})
        shared_repository.move_to_dlq(receipt.id, "rejected: " + "unknown tax rate, " * 12 + "\x1b[2J the end")
        shared_engine.dispose()
        out = in_terminal("show", receipt.id, "--db", buffer).out
        assert max(len(re.sub(r"\x1b\[\d+m", "", line)) for line in out.splitlines()) <= 80
        assert r"\x9b2J\u202e" in out
        assert r"\x1b[2J the" in " ".join(out.split())

    def test_impossible_time(self, shared_engine, buffer, done):
        """What another program wrote may have a time that no calendar has."""
        a_foreign_receipt(shared_engine, "adopted", created_at=10**15)
        shared_engine.dispose()
        assert "1000000000000000 (no valid time)" in done("show", "adopted", "--db", buffer)

    def test_unknown(self, filled, refused):
        assert "no receipt 'nothing' in this buffer" in refused("show", "nothing", "--db", filled)


class TestDeadLetters:
    @pytest.fixture
    def three(self, shared_engine, shared_repository, buffer):
        """Three dead letters: two of one error, and one that hides it in its last error."""
        ids = [a_receipt(shared_repository).id for _ in range(4)]
        shared_repository.increment_retry_count(ids[2], "unknown TAX rate")
        for receipt_id, reason in zip(ids, ("unknown tax rate", "too old", "gave up", "closed"), strict=True):
            shared_repository.move_to_dlq(receipt_id, reason)
        shared_repository.resolve(ids[3], actor="Anna", reason="a test")
        shared_engine.dispose()
        return ids

    def test_open_ones(self, three, buffer, done):
        out = done("dead-letters", buffer)
        assert three[:3] == re.findall(r"^[0-9a-f-]{36}", out, re.MULTILINE)
        assert out.endswith("    gave up\n3 open dead letters\n")

    def test_error(self, three, buffer, done):
        """Only those with this text, however it is written."""
        out = done("dead-letters", buffer, "--error", "tax RATE")
        assert [three[0], three[2]] == re.findall(r"^[0-9a-f-]{36}", out, re.MULTILINE)

    def test_one(self, three, buffer, done):
        assert done("dead-letters", buffer, "--error", "too old").endswith("\n1 open dead letter\n")

    def test_none(self, buffer, done):
        assert "no open dead letters\n" == done("dead-letters", buffer)


class TestHeld:
    def test_held(self, shared_engine, shared_repository, buffer, done):
        held = shared_repository.insert_receipt(new_receipt(), hold=True)
        a_receipt(shared_repository)
        shared_engine.dispose()
        [_, line] = done("held", buffer).splitlines()
        assert line.startswith(held)


class TestEvents:
    def test_newest_last(self, shared_engine, shared_repository, buffer, done, moscow):
        """Of a receipt its id and its error are told, of everything else what it was."""
        receipt = a_receipt(shared_repository)
        shared_repository.increment_retry_count(receipt.id, "HTTP 500\n" + "x" * 99)
        shared_repository.increment_retry_count(receipt.id, "x" * 99)
        shared_repository.log_event("circuit_opened", metadata={"failures": 5})
        shared_repository.log_event("circuit_closed")
        shared_engine.dispose()
        expected = f"""\
2026-03-01 15:00:00  attempt_failed  {receipt.id}  HTTP 500
2026-03-01 15:00:00  attempt_failed  {receipt.id}  {"x" * 59}…
2026-03-01 15:00:00  circuit_opened  failures: 5
2026-03-01 15:00:00  circuit_closed
"""
        assert expected == done("events", buffer)
        assert f"2026-03-01 15:00:00  added           {receipt.id}\n{expected}" == done("events", buffer, "--all")
        assert expected.splitlines()[-1:] == done("events", buffer, "--limit", 1).splitlines()

    def test_none(self, buffer, done):
        assert "no events\n" == done("events", buffer)

    def test_routine(self, shared_engine, shared_repository, buffer, done):
        """What is rare is found, however many receipts were added since."""
        shared_repository.log_event("circuit_opened")
        shared_repository.set_config("buffer_capacity", 1000)
        shared_repository.insert_receipts(new_receipt() for _ in range(600))
        shared_engine.dispose()
        assert done("events", buffer).rstrip().endswith("circuit_opened")
        assert 20 == done("events", buffer, "--all").count("added")

    @pytest.mark.parametrize("routine", [[], ["--all"]])
    def test_follow(self, shared_engine, shared_repository, buffer, monkeypatch, capfd, routine):
        """New events are printed as they come, each once, also when there are very many at a time."""
        from kkt_buffer.cli import main  # noqa: PLC0415

        batches = iter((0, 1, 0, 700))
        stored = []

        def sleep(seconds):
            count = next(batches, None)
            if count is None:
                raise KeyboardInterrupt
            with shared_repository.transaction():
                stored.extend(shared_repository.log_event("circuit_opened") for _ in range(count))
                if count:
                    a_receipt(shared_repository)

        monkeypatch.setattr("kkt_buffer.cli.events.sleep", sleep)
        assert 0 == main(["events", str(buffer), "--follow", *routine])
        out = capfd.readouterr().out
        assert 701 == len(stored) == out.count("circuit_opened")
        assert (2 if routine else 0) == out.count("added")


def test_nothing_is_changed(filled, run):
    """Looking changes nothing."""
    before = everything(filled)
    for command in ("status", "list", "dead-letters", "held", "events", "metrics", "check", "export", "config"):
        run(command, "--db", filled)
    assert before == everything(filled)
