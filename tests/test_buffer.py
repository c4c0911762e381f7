"""The functional interface over one default repository."""

import inspect

import predecessor
import pytest
from builders import NOON, an_id, new_receipt, open_files, run_python, together
from operations_table import OPERATIONS, prepared
from sqlalchemy import make_url

from kkt_buffer import (
    BufferDamagedError,
    Outcome,
    ReceiptRepository,
    SchemaError,
    buffer,
)


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    """No buffer is open before a test, nor after it; the default path is in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BUFFER_DB_PATH", raising=False)
    buffer.close_buffer_db()  # a test of another file may have left one open, or refused
    yield
    buffer.close_buffer_db()


# What services of the sqlite3 version import. (Its functions for cash sessions are out.)
PREDECESSORS_NAMES = (
    "init_buffer_db, close_buffer_db, get_db, insert_receipt, get_pending_receipts, mark_synced, move_to_dlq, "
    "get_buffer_status, update_receipt_status, update_receipt_fiscal_doc, increment_retry_count, get_receipt_by_id, "
    "BufferFullError, ReceiptNotFoundError, Receipt, BufferStatus"
)


class TestNames:
    def test_predecessors(self):
        """Whatever its services import, they import from here."""
        run_python(f"from kkt_buffer.buffer import {PREDECESSORS_NAMES}", "-W", "error")

    def test_all(self):
        """What is public says so: the operations, and what stands beside them."""
        assert sorted(buffer.__all__) == buffer.__all__
        assert set(PREDECESSORS_NAMES.split(", ")) <= set(buffer.__all__)
        functions = {name for name in vars(buffer) if hasattr(ReceiptRepository, name) and not name.startswith("_")}
        assert functions <= set(buffer.__all__)
        assert all(hasattr(buffer, name) for name in buffer.__all__)


class TestPredecessorsFile:
    """The default path is not that of the sqlite3 version, where receipts may wait."""

    @pytest.fixture
    def old(self, tmp_path):
        (tmp_path / "kkt_adapter" / "data").mkdir(parents=True)
        return predecessor.make(tmp_path / "kkt_adapter" / "data" / "buffer.db", 3)

    def test_named(self, old, caplog):
        """Beside an empty new buffer it is named, with what to do."""
        buffer.init_buffer_db()
        [told] = [record.message for record in caplog.records if record.name == "kkt_buffer.buffer"]
        assert f"a buffer of the sqlite3 version at {old}" in told
        assert "BUFFER_DB_PATH=kkt_adapter/data/buffer.db" in told

    def test_followed(self, old, caplog, monkeypatch):
        """Who does what it says finds the receipts, and reads it no more."""
        monkeypatch.setenv("BUFFER_DB_PATH", "kkt_adapter/data/buffer.db")
        buffer.init_buffer_db()
        assert 3 == buffer.get_buffer_status().total_receipts
        assert [] == [record for record in caplog.records if record.name == "kkt_buffer.buffer"]

    def test_itself(self, tmp_path, caplog):
        """Nor is it warned of itself when it is empty."""
        (tmp_path / "kkt_adapter" / "data").mkdir(parents=True)
        buffer.init_buffer_db(predecessor.make(tmp_path / "kkt_adapter" / "data" / "buffer.db"))
        assert [] == [record for record in caplog.records if record.name == "kkt_buffer.buffer"]

    def test_not_in_memory(self, old, caplog):
        buffer.init_buffer_db(":memory:")
        assert [] == caplog.records

    def test_not_beside_receipts(self, old, caplog):
        """A buffer that is in use is the right one."""
        buffer.init_buffer_db()
        buffer.insert_receipt(new_receipt())
        caplog.clear()
        buffer.init_buffer_db()
        assert [] == caplog.records


class TestInit:
    def test_new(self, tmp_path):
        """A missing file and its folder are made, with the schema, and the engine is returned."""
        engine = buffer.init_buffer_db(tmp_path / "shop" / "buffer.db")
        assert engine is buffer.get_db()
        assert buffer.get_buffer_status().total_receipts == 0

    def test_default_path(self, tmp_path):
        buffer.init_buffer_db()
        assert (tmp_path / "data" / "buffer.db").exists()

    def test_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BUFFER_DB_PATH", str(tmp_path / "elsewhere.db"))
        buffer.init_buffer_db()
        assert (tmp_path / "elsewhere.db").exists()

    def test_argument_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BUFFER_DB_PATH", str(tmp_path / "elsewhere.db"))
        buffer.init_buffer_db(tmp_path / "here.db")
        assert not (tmp_path / "elsewhere.db").exists()

    @pytest.mark.parametrize("target", [":memory:", "sqlite:///url.db"])
    def test_kinds(self, target):
        buffer.init_buffer_db(target)
        buffer.insert_receipt(new_receipt())
        assert buffer.get_buffer_status().pending == 1

    @pytest.mark.parametrize("named", ["argument", "URL", "variable"])
    def test_server(self, postgresql_url, tmp_path, monkeypatch, named):
        """A schema of a server is upgraded and used like a file."""
        if named == "variable":
            monkeypatch.setenv("BUFFER_DB_PATH", postgresql_url)
            buffer.init_buffer_db()
        else:
            buffer.init_buffer_db(make_url(postgresql_url) if named == "URL" else postgresql_url)
        buffer.insert_receipt(new_receipt())
        assert "postgresql" == buffer.get_db().dialect.name
        assert buffer.get_buffer_status().pending == 1
        assert [] == list(tmp_path.iterdir())

    def test_second_closes_first(self, tmp_path):
        """The second buffer takes the place of the first, whose engine is closed."""
        first = buffer.init_buffer_db(tmp_path / "first.db")
        buffer.insert_receipt(new_receipt())
        second = buffer.init_buffer_db(tmp_path / "second.db")
        assert second is buffer.get_db()
        assert buffer.get_buffer_status().pending == 0
        assert first is not second
        assert [] == open_files(tmp_path / "first.db")

    @pytest.mark.parametrize(("content", "error"), [(b"not a database" * 100, BufferDamagedError)])
    def test_failure_keeps_first(self, tmp_path, content, error):
        """If the second cannot be opened, the first goes on."""
        (tmp_path / "bad.db").write_bytes(content)
        first = buffer.init_buffer_db(tmp_path / "first.db")
        with pytest.raises(error):
            buffer.init_buffer_db(tmp_path / "bad.db")
        assert first is buffer.get_db()

    def test_newer(self, path, open_engine):
        """A file of a newer release is refused."""
        engine = open_engine(path)
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE kkt_buffer_version SET version_num = '9999'")
        engine.dispose()
        with pytest.raises(SchemaError):
            buffer.init_buffer_db(path)

    def test_reopened(self, tmp_path):
        """What one process stored, the next one finds."""
        program = """
            import sys
            from kkt_buffer import buffer
            buffer.init_buffer_db(sys.argv[1])
            print(buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"}))
        """
        receipt_id = run_python(program, tmp_path / "buffer.db").stdout.strip()
        buffer.init_buffer_db(tmp_path / "buffer.db")
        assert [receipt_id] == [receipt.id for receipt in buffer.get_pending_receipts()]


class TestLifeCycle:
    def test_first_use_opens(self, tmp_path):
        """Any operation opens the default buffer."""
        buffer.insert_receipt(new_receipt())
        assert (tmp_path / "data" / "buffer.db").exists()

    def test_close(self):
        """Idempotent; the next use opens it again."""
        buffer.close_buffer_db()
        buffer.insert_receipt(new_receipt())
        buffer.close_buffer_db()
        buffer.close_buffer_db()
        assert buffer.get_buffer_status().pending == 1

    def test_threads_open_it_once(self):
        """Sixteen threads that come first at the same time share one buffer."""

        def work(_number):
            buffer.insert_receipt(new_receipt())
            return buffer.get_db()

        engines = together(16, work)
        assert [buffer.get_db()] * 16 == engines
        assert buffer.get_buffer_status().pending == 16


class TestFunctions:
    @pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
    @pytest.mark.parametrize("name", sorted(set(OPERATIONS) & set(vars(buffer))))
    def test_operation(self, name, engine, request):
        """Each function does what its method does: the same answer, or, where it writes, one of the same kind."""
        engine = buffer.init_buffer_db(":memory:" if engine == "sqlite" else request.getfixturevalue("server_buffer"))
        repository = ReceiptRepository(engine)
        known = prepared(repository)
        answer = OPERATIONS[name].call(buffer, known)
        if OPERATIONS[name].writes:
            assert type(OPERATIONS[name].call(repository, prepared(repository))) is type(answer)
        else:
            assert repr(OPERATIONS[name].call(repository, known)) == repr(answer)

    def test_keywords(self):
        """Every keyword reaches the method."""
        own = an_id()
        assert own == buffer.insert_receipt(new_receipt(id=own))
        assert own == buffer.insert_receipt(new_receipt(id=own), exist_ok=True)
        assert [own] == buffer.insert_receipts([new_receipt(id=own)], exist_ok=True)
        buffer.log_event("sync_failed", receipt_id=own, metadata={"n": 1})
        assert buffer.get_events(1, event_type="sync_failed", receipt_id=own)[0].details == {"n": 1}
        buffer.move_to_dlq(own, "rejected")
        buffer.requeue(own, actor="Anna", reason="the table was put right")
        assert [own] == [letter.original_receipt_id for letter in buffer.list_dead_letters(open_only=False, limit=1)]

    def test_transaction(self):
        """What is inserted inside belongs to one commit."""
        with pytest.raises(RuntimeError), buffer.transaction():
            buffer.insert_receipts([new_receipt(), new_receipt()])
            raise RuntimeError
        assert buffer.get_buffer_status().pending == 0

    def test_deliver_pending(self):
        made = buffer.insert_receipts([new_receipt(), new_receipt()])
        report = buffer.deliver_pending(lambda receipt: NOON, limit=1)
        assert {made[0]: Outcome.SYNCED} == report.outcomes

    def test_same_signatures(self):
        """A function takes what its method takes, with the same defaults."""
        own = {"init_buffer_db", "get_db", "close_buffer_db", "repository", "deliver_pending"}
        functions = {
            name: function
            for name, function in inspect.getmembers(buffer, inspect.isfunction)
            if function.__module__ == buffer.__name__ and not name.startswith("_") and name not in own
        }
        assert len(functions) >= 14
        for name, function in functions.items():
            method = inspect.signature(getattr(ReceiptRepository, name))
            expected = [parameter for parameter in method.parameters.values() if parameter.name != "self"]
            assert expected == list(inspect.signature(function).parameters.values()), name
