"""The file that was moved: it keeps every row, and takes no more changes, whichever program asks for them."""

import re
import sqlite3
from pathlib import Path

import pytest
from builders import a_receipt, another_program, everything, new_receipt, snapshot, together
from moving.rows import name_of, rows_of
from operations_table import OPERATIONS, prepared
from sqlalchemy import make_url, text

from kkt_buffer import BufferMovedError, DeliveryWorker, check, upgrade

DAY = 86_400

# The operations that change something in a buffer as `prepared` makes it.
WRITES = [
    name
    for name, operation in OPERATIONS.items()
    if operation.writes and name not in {"prune", "recover_expired_leases", "transaction"}
]

ROW = "(id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc) VALUES ('1', 'a', 5, 5, 0, '{}')"


class TestClosed:
    @pytest.fixture
    def target(self, path, file_repository, moved, server_buffer):
        """The name of the target to which the file at `path` was moved."""
        a_receipt(file_repository)
        moved(path, server_buffer)
        return name_of(server_buffer)

    def test_told(self, target, file_repository):
        """Who looks at the file is told that it is only a copy: its receipts are delivered elsewhere."""
        assert f"it was moved to {target}, and is only a copy" == file_repository.why_refused()

    @pytest.mark.parametrize("name", WRITES)
    def test_operations(self, path, file_engine, file_repository, moved, server_buffer, name):
        """Every operation that writes is refused, also in a program that had the file open; nothing is changed."""
        known = prepared(file_repository)
        moved(path, server_buffer)
        before = snapshot(file_engine)
        with pytest.raises(BufferMovedError) as refused:
            OPERATIONS[name].call(file_repository, known)
        assert name_of(server_buffer) == refused.value.target
        assert before == snapshot(file_engine)

    def test_prune(self, path, file_repository, clock, target):
        """The file keeps its rows: nothing is pruned any more."""
        clock.seconds += 500 * DAY
        with pytest.raises(BufferMovedError):
            file_repository.prune()

    def test_full(self, path, file_repository, moved, server_buffer):
        """Of a full buffer it is said that it was moved, not that it is full."""
        file_repository.set_config("buffer_capacity", 1)
        a_receipt(file_repository)
        moved(path, server_buffer)
        with pytest.raises(BufferMovedError):
            a_receipt(file_repository)

    def test_threads(self, file_repository, target):
        """Threads that share a commit are told so, each of them."""

        def insert(_):
            with pytest.raises(BufferMovedError):
                file_repository.insert_receipt(new_receipt())

        together(8, insert)

    def test_worker(self, file_repository, target):
        """A worker gets the same error, and sends nothing."""
        with pytest.raises(BufferMovedError):
            DeliveryWorker(file_repository, pytest.fail).tick()

    @pytest.mark.parametrize(
        "statement",
        [
            f"INSERT INTO receipts {ROW}",
            f"INSERT OR IGNORE INTO receipts {ROW}",
            "REPLACE INTO receipts SELECT * FROM receipts",
            "UPDATE receipts SET retry_count = 1",
            "UPDATE OR IGNORE receipts SET status = 'syncing'",
            "DELETE FROM receipts",
            "INSERT INTO dlq SELECT id, id, 5, 'a reason', '{}', 0, NULL, NULL, NULL, NULL, NULL FROM receipts",
            "INSERT INTO buffer_events (event_type, timestamp) VALUES ('x', 5)",
            "UPDATE buffer_events SET timestamp = 5",
            "UPDATE config SET value = '5' WHERE key = 'buffer_capacity'",
            "DELETE FROM config WHERE key = 'moved_to'",
        ],
    )
    def test_other_programs(self, path, target, statement):
        """Whatever another program tries, which knows nothing of this release: it is told where the buffer is."""
        before = everything(path)
        with another_program(path) as db, pytest.raises(sqlite3.IntegrityError) as refused:
            db.execute(statement)
        assert f"this buffer was moved to {target}" == str(refused.value)
        assert before == everything(path)

    def test_own_statements(self, path, file_repository, target):
        """So is a statement of the service's own, through the engine."""
        with pytest.raises(BufferMovedError), file_repository.transaction() as session:
            session.execute(text("UPDATE receipts SET retry_count = 1"))

    def test_reading(self, path, tmp_path, file_engine, file_repository, target):
        """It can be read, checked and copied; its schema is that of the release, which can be recorded."""
        assert 1 == file_repository.get_buffer_status().pending
        assert target == file_repository.get_config("moved_to")
        assert file_repository.check_integrity().is_sound
        check(file_engine)
        upgrade(file_engine)
        file_repository.backup(tmp_path / "copy.db")
        assert rows_of(path) == rows_of(tmp_path / "copy.db")
        with another_program(path) as db:
            db.execute("UPDATE config SET value = '9.9' WHERE key = 'release'")

    def test_opened(self, path, file_engine, file_repository, target):
        """By the lines of the document it is opened again, and is as it was."""
        document = (Path(__file__).parents[2] / "migrations" / "README.md").read_text()
        find, forget = re.findall(r'sqlite3 buffer\.db "(.+?)"', document)
        with another_program(path) as db:
            for (drop,) in db.execute(find).fetchall():
                db.execute(drop)
            db.execute(forget)
        a_receipt(file_repository)
        check(file_engine)
        assert [] == [
            line for line in everything(path) if "trg_moved" in line or "move_id" in line or "moved_to" in line
        ]

    def test_password(self, path, server_buffer, target):
        """Neither user nor password are written into the file."""
        url = make_url(server_buffer)
        told = "\n".join(everything(path))
        assert url.password not in told
        assert f"{url.username}@" not in told

    def test_elsewhere(self, path, target, moved, server, migrated_schema):
        """It is not moved to a second server: each receipt would be delivered twice."""
        before = everything(path)
        with migrated_schema.copy() as schema:
            url = server.url(schema=schema)
            empty = everything(url)
            with pytest.raises(BufferMovedError, match="this buffer was moved to") as refused:
                moved(path, url)
            assert target == refused.value.target
            assert (before, empty) == (everything(path), everything(url))

    def test_password_in_query(self, path, server_buffer, moved):
        """A secret in the parameters of the URL is not written either; with another user it is the same target."""
        url = make_url(server_buffer)
        moved(path, url.set(password="").update_query_dict({"password": "s3cret2"}))
        assert "s3cret2" not in "\n".join(everything(path))
        assert moved(path, url.set(username="postgres")).is_repeated
