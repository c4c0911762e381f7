"""A move that is refused, or fails: nothing is there, and the file keeps every row."""

import shutil

import pytest
from builders import a_receipt, everything, new_receipt, together
from damage import damage
from moving.rows import name_of, rows_of, stored
from sqlalchemy import event, make_url, text

from kkt_buffer import BufferDamagedError, BufferMovedError, BufferStorageError, ReceiptRepository, create_buffer_engine
from kkt_buffer.move import move


class TestRefused:
    """A move that is refused before the file is closed: both sides stay as they were."""

    @pytest.fixture
    def refused(self, used, moved):
        def refused(url, match, error=BufferStorageError):
            before = stored(used), everything(url)
            with pytest.raises(error, match=match):
                moved(used, url)
            assert before == (stored(used), everything(url))

        return refused

    @pytest.mark.parametrize("kind", ["receipt", "event", "pruned"])
    def test_not_empty(self, server_engine, server_buffer, refused, clock, kind):
        """The target has never held anything."""
        repository = ReceiptRepository(server_engine, now=clock)
        if kind == "event":
            repository.log_event("hello")
        else:
            receipt = a_receipt(repository, "synced")
        if kind == "pruned":
            with server_engine.begin() as connection:
                connection.execute(text("UPDATE config SET value = '0' WHERE key = 'retention_events_days'"))
                connection.execute(text("DELETE FROM receipts WHERE id = :id"), {"id": receipt.id})
                connection.execute(text("DELETE FROM buffer_events"))
        refused(server_buffer, "is not empty: it holds another buffer than")

    def test_another_move(self, server_buffer, path, moved, tmp_path):
        """A file does not go where another one has gone."""
        other = shutil.copy(path, tmp_path / "other.db")
        moved(path, server_buffer)
        before = everything(server_buffer)
        with pytest.raises(BufferStorageError, match="is not empty"):
            moved(other, server_buffer)
        assert before == everything(server_buffer)
        assert not [line for line in everything(other) if "trg_moved" in line]

    def test_gone(self, server, server_buffer, used, moved):
        """What was moved, all of it, and is not there any more is not moved once more: it may be delivered already."""
        moved(used, server_buffer)
        schema = make_url(server_buffer).query["options"].partition("=")[2]
        for emptied in (f"DELETE FROM {schema}.config", f"DROP SCHEMA {schema} CASCADE; CREATE SCHEMA {schema}"):
            server.execute(emptied)
            before = everything(server_buffer)
            with pytest.raises(BufferStorageError, match="is not there any more.+Restore the server"):
                moved(used, server_buffer)
            assert before == everything(server_buffer)

    def test_not_owner(self, server, server_buffer, used, moved):
        """Who may not switch off the triggers of the target is told so at once."""
        schema = make_url(server_buffer).query["options"].partition("=")[2]
        server.execute(f"CREATE ROLE clerk_{schema} LOGIN")
        server.execute(f"GRANT USAGE ON SCHEMA {schema} TO clerk_{schema}")
        server.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO clerk_{schema}")
        before = everything(used), everything(server_buffer)
        try:
            with pytest.raises(BufferStorageError, match="this user may not do that"):
                moved(used, make_url(server_buffer).set(username=f"clerk_{schema}"))
            assert before == (everything(used), everything(server_buffer))
        finally:
            server.execute(f"DROP OWNED BY clerk_{schema}")
            server.execute(f"DROP ROLE clerk_{schema}")

    @pytest.mark.parametrize(
        ("statement", "told"),
        [
            (
                "UPDATE receipts SET last_error = CAST(x'FF41' AS TEXT)",
                "last_error of receipt",
            ),
            ("UPDATE receipts SET last_error = 'a' || char(0)", "last_error of the row '.+' of receipts is no text"),
            ("UPDATE receipts SET last_error = x'41'", "last_error of the row '.+' of receipts is no text in UTF-8"),
            ("UPDATE receipts SET changed_at = 'soon'", "changed_at of the row '.+' of receipts is no whole number"),
            ("UPDATE receipts SET changed_at = 1.5", "changed_at of the row '.+' of receipts is no whole number"),
            ("UPDATE dlq SET reason = CAST(x'FF' AS TEXT)", "reason of the row '.+' of dlq is no text in UTF-8"),
            ("UPDATE buffer_events SET metadata = char(0)", "metadata of the row 1 of buffer_events is no text"),
            ("UPDATE config SET value = char(0)", "value of the row '.+' of config is no text"),
            ("UPDATE receipts SET fiscal_doc = '{}'", "differs from its digest"),
        ],
    )
    def test_unfit(self, used, server_buffer, refused, statement, told):
        """What a server cannot store, and damage, is found before anything is changed, and the row is named."""
        damage(used, statement)
        refused(server_buffer, told, (BufferStorageError, BufferDamagedError))


class TestInterrupted:
    """A move that failed after the file was closed."""

    @pytest.fixture
    def closed(self, used, moved, server_engine, server_buffer):
        """The file after a move that failed as the sequence was set, for which `statement` is run on the server."""

        def closed(statement, match):
            def interfere(connection, cursor, sql, *_):
                if sql.startswith("SELECT setval"):
                    connection.connection.cursor().execute(statement)

            empty, expected = everything(server_buffer), rows_of(used)
            event.listen(server_engine, "before_cursor_execute", interfere)
            source = create_buffer_engine(used)
            with pytest.raises(BufferStorageError, match=match):
                move(source, server_engine)
            with pytest.raises(BufferMovedError):
                a_receipt(ReceiptRepository(source))
            source.dispose()
            assert empty == everything(server_buffer)
            arrived = {name: rows for name, rows in rows_of(used).items() if name != "config"}
            assert {name: rows for name, rows in expected.items() if name != "config"} == arrived
            return used

        return closed

    @pytest.mark.parametrize(
        ("statement", "told"),
        [
            ("UPDATE receipts SET pos_id = 'x'", "the rows of receipts are not those that were sent"),
            ("DELETE FROM buffer_events", "the rows of buffer_events are not those that were sent"),
            ("UPDATE config SET value = '201' WHERE key = 'buffer_capacity'", "the rows of config are not those"),
            ("INSERT INTO buffer_changes (pending) VALUES (1)", "the rows of buffer_state are not those"),
            ("SELECT pg_terminate_backend(pg_backend_pid())", "the connection to the server was lost"),
            ("SELECT nothing", 'the server refused to go on .column "nothing" does not exist.'),
        ],
    )
    def test_again(self, closed, moved, server_buffer, statement, told):
        """What has arrived is compared before it is committed. The file stays closed, and a second run moves it."""
        path = closed(statement, told)
        assert not moved(path, server_buffer).is_repeated
        assert rows_of(path) == rows_of(server_buffer)

    @pytest.mark.parametrize("call", ["insert_receipt", "log_event"])
    def test_used_meanwhile(self, closed, moved, server_engine, server_buffer, call):
        """A service that uses the target of an unfinished move is refused, and the move can be completed."""
        path = closed("SELECT nothing", "the server refused to go on")
        with pytest.raises(BufferStorageError, match="a move into this buffer has begun"):
            getattr(ReceiptRepository(server_engine), call)(new_receipt() if call == "insert_receipt" else "hello")
        assert not moved(path, server_buffer).is_repeated
        assert rows_of(path) == rows_of(server_buffer)

    def test_rule_of_the_target(self, used, moved, server_engine, server_buffer):
        """A rule of the target that refuses a row is told of; without it, the move goes on."""
        with server_engine.begin() as connection:
            connection.execute(text("ALTER TABLE receipts ADD CONSTRAINT no_tills CHECK (pos_id <> 'till-1')"))
        with pytest.raises(BufferStorageError, match='the server refused to go on .+"no_tills"') as refused:
            moved(used, server_buffer)
        assert "till-1" not in str(refused.value)  # no line with the values of the row
        with server_engine.begin() as connection:
            connection.execute(text("ALTER TABLE receipts DROP CONSTRAINT no_tills"))
        moved(used, server_buffer)
        assert rows_of(used) == rows_of(server_buffer)

    def test_two_at_once(self, used, moved, server_buffer):
        """Two that move the same file at one moment: one does it, the other finds it done or is refused."""

        def one(_):
            try:
                return moved(used, server_buffer).is_repeated
            except BufferStorageError as error:
                return f"{name_of(server_buffer)} is not empty" in str(error)

        assert [False, True] == sorted(together(2, one))
        assert rows_of(used) == rows_of(server_buffer)
