"""Commands by which a person decides something: who and why is recorded, and nothing happens by accident."""

import pytest
from builders import a_receipt, another_program, everything, new_receipt, shown, story
from terminal import in_terminal

from kkt_buffer import ReceiptRepository

BY_ANNA = ("--actor", "Anna", "--reason", "the tax table was put right")


@pytest.fixture
def failed(shared_engine, shared_repository, buffer):
    """The ids of three dead letters in `buffer`: two rejected, one given up."""
    ids = [a_receipt(shared_repository).id for _ in range(3)]
    for receipt_id, reason in zip(ids, ("unknown tax rate", "unknown tax rate", "gave up"), strict=True):
        shared_repository.move_to_dlq(receipt_id, reason)
    shared_engine.dispose()
    return ids


@pytest.fixture
def statuses(buffer, open_engine):
    """The status of each receipt that is asked for."""

    def read(ids):
        repository = ReceiptRepository(open_engine(buffer))
        return [str(repository.get_receipt_by_id(receipt_id).status) for receipt_id in ids]

    return read


class TestRequeue:
    def test_by_id(self, failed, buffer, done, statuses, open_engine):
        """One receipt is requeued without a question; who and why is on record."""
        assert "1 of 1 receipts requeued\n" == done("requeue", failed[1], "--db", buffer, *BY_ANNA)
        assert ["failed", "pending", "failed"] == statuses(failed)
        [event] = ReceiptRepository(open_engine(buffer)).get_events(event_type="receipt_requeued")
        assert {"actor": "Anna", "reason": "the tax table was put right"} == event.details

    def test_all(self, failed, buffer, done, statuses):
        assert "3 of 3 receipts requeued\n" == done("requeue", "--all", "--yes", "--db", buffer, *BY_ANNA)
        assert ["pending"] * 3 == statuses(failed)

    def test_error(self, failed, buffer, done, statuses):
        done("requeue", "--error", "TAX", "--yes", "--db", buffer, *BY_ANNA)
        assert ["pending", "pending", "failed"] == statuses(failed)

    def test_nothing(self, buffer, done):
        assert "0 of 0 receipts requeued\n" == done("requeue", "--all", "--db", buffer, *BY_ANNA)

    def test_unknown_error(self, failed, buffer, refused):
        """A text that no dead letter has is most likely a slip of the pen."""
        line = refused("requeue", "--error", "nothing like", "--db", buffer, *BY_ANNA)
        assert "no open dead letter has this text in its reason or last error; nothing was changed" in line

    def test_login_name(self, failed, buffer, done, open_engine, monkeypatch):
        """Without a name it is the name of whoever is logged in."""
        monkeypatch.setenv("LOGNAME", "olga")
        done("requeue", failed[0], "--db", buffer, "--reason", "mended")
        [event] = ReceiptRepository(open_engine(buffer)).get_events(event_type="receipt_requeued")
        assert "olga" == event.details["actor"]

    def test_nobody(self, failed, buffer, run, monkeypatch):
        """Where nobody has a name, one must be given."""

        def nameless():
            raise KeyError("uid not found: 1234")

        monkeypatch.setattr("getpass.getuser", nameless)
        ended = run("requeue", failed[0], "--db", buffer, "--reason", "mended")
        assert 2 == ended.status
        assert "--actor is needed" in ended.err

    def test_no_room(self, failed, buffer, done, run, statuses):
        """As many as fit, the oldest first; the rest is told of and stays."""
        done("config", "--db", buffer, "buffer_capacity", 1)
        ended = run("requeue", "--all", "--yes", "--db", buffer, *BY_ANNA)
        assert (1, "1 of 3 receipts requeued\n") == (ended.status, ended.out)
        [line] = ended.err.splitlines()
        assert line.startswith("error: Buffer full: 1 of 1")
        assert ["pending", "failed", "failed"] == statuses(failed)

    def test_some_cannot(self, failed, buffer, run, statuses):
        """One that is not there, or is no dead letter, does not stop the others."""
        ids = (failed[0], "nothing", failed[0], failed[1])
        ended = run("requeue", *ids, "--yes", "--db", buffer, *BY_ANNA)
        assert (1, "2 of 4 receipts requeued\n") == (ended.status, ended.out)
        assert ["pending", "pending", "failed"] == statuses(failed)
        first, second = ended.err.splitlines()
        assert "no receipt 'nothing'" in first
        assert f"receipt {failed[0]} is pending" in second


class TestQuestion:
    def test_nobody_to_ask(self, failed, buffer, refused):
        """More than one receipt is not changed where nobody can be asked, unless that was said before."""
        before = everything(buffer)
        line = refused("requeue", "--all", "--db", buffer, *BY_ANNA)
        assert f"requeue 3 receipts of {shown(buffer)}, as Anna? Nothing was changed." in line
        assert "--yes" in line
        assert before == everything(buffer)

    @pytest.mark.parametrize(
        ("answer", "status", "after"), [("y\n", 0, "pending"), ("\n", 1, "failed"), ("n\n", 1, "failed")]
    )
    def test_answer(self, failed, buffer, statuses, answer, status, after):
        """At a terminal a person is asked, and only yes is yes."""
        ended = in_terminal("requeue", *failed, "--db", buffer, *BY_ANNA, answer=answer)
        assert status == ended.status
        assert f"requeue 3 receipts of {shown(buffer)}, as Anna? [y/N]" in ended.out.replace("\n", "")
        assert [after] * 3 == statuses(failed)


class TestResolve:
    def test_resolve(self, failed, buffer, done, open_engine):
        """It stays failed, and is closed."""
        assert "1 of 1 receipts resolved\n" == done("resolve", failed[0], "--db", buffer, *BY_ANNA)
        repository = ReceiptRepository(open_engine(buffer))
        assert failed[1:] == [letter.original_receipt_id for letter in repository.list_dead_letters()]
        assert "receipt_resolved" == story(repository, failed[0])[-1]


class TestDiscard:
    def test_discard(self, shared_engine, shared_repository, buffer, done, open_engine):
        held = shared_repository.insert_receipt(new_receipt(), hold=True)
        shared_engine.dispose()
        assert "1 of 1 receipts discarded\n" == done("discard", held, "--db", buffer, *BY_ANNA)
        repository = ReceiptRepository(open_engine(buffer))
        assert [] == repository.list_held()
        assert "failed" == repository.get_receipt_by_id(held).status

    def test_not_held(self, filled, shared_repository, run):
        """What is not held is not discarded."""
        receipt = a_receipt(shared_repository)
        shared_repository.close()
        ended = run("discard", receipt.id, "--db", filled, *BY_ANNA)
        assert (1, "0 of 1 receipts discarded\n") == (ended.status, ended.out)

    def test_again(self, shared_engine, shared_repository, buffer, run):
        """The second time it is said that it was done before."""
        held = shared_repository.insert_receipt(new_receipt(), hold=True)
        shared_engine.dispose()
        ended = run("discard", held, held, "--yes", "--db", buffer, *BY_ANNA)
        assert (1, "1 of 2 receipts discarded\n") == (ended.status, ended.out)
        assert ended.err.endswith("it was not changed. It was discarded or resolved already.\n")


class TestConfig:
    def test_all(self, buffer, done):
        """Every setting, with its default and what is allowed."""
        done("config", "--db", buffer, "lease_seconds", 90)
        lines = [line.split() for line in done("config", "--db", buffer).splitlines()]
        assert ["SETTING", "VALUE", "DEFAULT", "ALLOWED"] == lines[0]
        assert ["lease_seconds", "90", "60", "1", "to", "1,000,000,000"] in lines

    def test_one(self, buffer, done):
        assert "200\n" == done("config", "--db", buffer, "buffer_capacity")
        assert "1.0.0\n" == done("config", "--db", buffer, "version")

    def test_change(self, buffer, done):
        assert "buffer_capacity 500\n" == done("config", "--db", buffer, "buffer_capacity", 500)
        assert "500\n" == done("config", "--db", buffer, "buffer_capacity")

    def test_nonsense_is_corrected(self, filled, done):
        """A setting that nobody can read any more can still be set."""
        with another_program(filled) as db:
            db.execute("UPDATE config SET value = 'many' WHERE key = 'buffer_capacity'")
        assert "buffer_capacity 300\n" == done("config", "--db", filled, "buffer_capacity", 300)

    def test_too_small(self, filled, run):
        """A capacity that is used up already is stored, and its effect is told."""
        ended = run("config", "--db", filled, "buffer_capacity", 2)
        expected = "warning: 2 receipts waiting: the till refuses new ones until fewer than 2 are waiting, or "
        assert (0, "buffer_capacity 2\n") == (ended.status, ended.out)
        assert ended.err == f"{expected}buffer_capacity is raised\n"
        assert "" == run("config", "--db", filled, "buffer_capacity", 3).err

    def test_another_is_nonsense(self, filled, done):
        """A second setting that is invalid does not spoil the correction of the first."""
        with another_program(filled) as db:
            db.execute("UPDATE config SET value = 'many' WHERE key = 'ofd_deadline_days'")
        assert "buffer_capacity 1\n" == done("config", "--db", filled, "buffer_capacity", 1)

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["buffer_capacty", "500"], "buffer_capacty: no such setting; expected one of buffer_capacity"),
            (["buffer_capacty"], "buffer_capacty: no such setting"),
            (["buffer_capacity", "0"], "buffer_capacity: expected a whole number from 1"),
            (["buffer_capacity", "many"], "buffer_capacity: expected a whole number from 1"),
        ],
    )
    def test_refused(self, buffer, refused, words, told):
        """A slip of the pen is not stored as a setting that nobody reads."""
        before = everything(buffer)
        assert told in refused("config", "--db", buffer, *words)
        assert before == everything(buffer)


@pytest.mark.parametrize(
    "command",
    [
        ["requeue", "--all", *BY_ANNA],
        ["resolve", "x", *BY_ANNA],
        ["discard", "x", *BY_ANNA],
        ["config", "lease_seconds", 5],
        ["prune"],
    ],
)
def test_no_notice(path, run, monkeypatch, caplog, command):
    """A known bug of the SQLite in use is said by `verify` and `work`, not before each decision."""
    monkeypatch.setattr("kkt_buffer.sqlite.driver.has_wal_reset_bug", lambda driver: True)
    monkeypatch.setattr("kkt_buffer.sqlite.driver.WAL_RESET_BUG", f"has a bug that {command[0]} does not mention")
    run(*command, "--db", path)
    assert "has a bug" not in caplog.text


@pytest.mark.parametrize(
    "command", [["requeue", "--all", *BY_ANNA], ["resolve", "x", *BY_ANNA], ["config", "lease_seconds", "5"], ["prune"]]
)
def test_missing(tmp_path, refused, command):
    """Acting on a buffer that is not there does not make it."""
    assert "there is no buffer at" in refused(*command, "--db", tmp_path / "buffer.db")
    assert [] == list(tmp_path.iterdir())
