"""The functional interface over one default repository."""

import inspect
import threading

import pytest
from builders import NOON, an_id, new_receipt, run_python

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

    def test_second_closes_first(self, tmp_path):
        """The second buffer takes the place of the first, whose engine is closed."""
        first = buffer.init_buffer_db(tmp_path / "first.db")
        buffer.insert_receipt(new_receipt())
        second = buffer.init_buffer_db(tmp_path / "second.db")
        assert second is buffer.get_db()
        assert buffer.get_buffer_status().pending == 0
        assert first.pool.checkedin() == 0

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
        """Closing twice is closing once, and the next use opens it again."""
        buffer.close_buffer_db()
        buffer.insert_receipt(new_receipt())
        buffer.close_buffer_db()
        buffer.close_buffer_db()
        assert buffer.get_buffer_status().pending == 1

    def test_threads_open_it_once(self):
        """Sixteen threads that come first at the same time share one buffer."""
        together = threading.Barrier(16)
        engines = []

        def work():
            together.wait()
            buffer.insert_receipt(new_receipt())
            engines.append(buffer.get_db())

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [buffer.get_db()] * 16 == engines
        assert buffer.get_buffer_status().pending == 16


class TestFunctions:
    def test_every_operation(self):
        """Each function does what its method does."""
        receipt_id = buffer.insert_receipt(new_receipt(id=an_id()))
        assert [receipt_id] == [receipt.id for receipt in buffer.get_pending_receipts(limit=5)]
        assert buffer.increment_retry_count(receipt_id, "timeout") == 1
        assert buffer.update_receipt_status(receipt_id, "syncing")
        assert buffer.mark_synced(receipt_id, NOON)
        assert buffer.get_receipt_by_id(receipt_id).status == "synced"
        with buffer.transaction():
            second, third = buffer.insert_receipts([new_receipt(), new_receipt()], exist_ok=True)
        assert buffer.move_to_dlq(second, "rejected")
        buffer.log_event("sync_failed", receipt_id=third, metadata={"n": 1})
        assert buffer.get_events(1, event_type="sync_failed", receipt_id=third)[0].details == {"n": 1}
        buffer.set_config("buffer_capacity", 5)
        assert buffer.get_config("buffer_capacity") == 5
        status = buffer.get_buffer_status()
        assert (1, 1, 1, 5) == (status.pending, status.synced, status.failed, status.capacity)
        assert [second] == [letter.original_receipt_id for letter in buffer.list_dead_letters()]
        buffer.requeue(second, actor="Anna", reason="the table was put right")
        assert buffer.deliver_pending(lambda receipt: NOON).count(Outcome.SYNCED) == 2
        fourth = buffer.insert_receipt(new_receipt())
        buffer.move_to_dlq(fourth, "rejected")
        buffer.resolve(fourth, actor="Anna", reason="a test receipt")
        assert buffer.list_dead_letters() == []

    def test_same_signatures(self):
        """A function takes what its method takes, with the same defaults."""
        own = {"init_buffer_db", "get_db", "close_buffer_db", "deliver_pending"}
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
