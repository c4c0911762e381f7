"""What every connection is set to, and read back."""

import contextlib
import sqlite3

import pytest

from kkt_buffer import (
    BufferStorageError,
    create_buffer_engine,
)
from kkt_buffer.sqlite import engine as layer
from kkt_buffer.sqlite.engine import COMMON, DURABLE, MEMORY, QUERY_ONLY, READ_ONLY, WAL


def read_back(connection, pragma):
    return connection.exec_driver_sql(f"PRAGMA {pragma.name}").scalar()


class TestPragmas:
    @pytest.mark.parametrize("pragma", [WAL, *DURABLE, *COMMON], ids=lambda pragma: pragma.name)
    def test_file(self, file_engine, pragma):
        """Every connection has every setting, also the second one of the pool."""
        reader = file_engine.execution_options(**{READ_ONLY: True})
        with reader.connect() as first, reader.connect() as second:
            assert [pragma.reads] * 2 == [read_back(first, pragma), read_back(second, pragma)]

    @pytest.mark.parametrize("pragma", [MEMORY, *COMMON], ids=lambda pragma: pragma.name)
    def test_memory(self, engine, pragma):
        with engine.connect() as connection:
            assert pragma.reads == read_back(connection, pragma)

    @pytest.mark.parametrize("pragma", [WAL, QUERY_ONLY, *COMMON], ids=lambda pragma: pragma.name)
    def test_read_only(self, file_engine, path, pragma):
        with create_buffer_engine(path, read_only=True).connect() as connection:
            assert pragma.reads == read_back(connection, pragma)

    def test_durable(self, file_engine):
        """The two that everything rests on, by name: WAL, and synchronous=FULL, which reads as 2."""
        with file_engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1

    def test_busy_timeout(self, path):
        with create_buffer_engine(path, busy_timeout=1.5).connect() as connection:
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 1500

    def test_no_wal(self, tmp_path, monkeypatch):
        """Where the file system cannot give WAL, the buffer is refused, not used without it."""
        connect = sqlite3.connect
        # This VFS has no shared memory, like a network mount.
        monkeypatch.setattr(
            sqlite3, "connect", lambda target, **options: connect(f"{target}&vfs=unix-dotfile", **options)
        )
        with pytest.raises(BufferStorageError, match=r"journal_mode is 'delete' where 'wal' is needed .* local disk"):
            create_buffer_engine(tmp_path / "buffer.db")

    def test_silent_refusal(self, path, monkeypatch):
        """A PRAGMA that SQLite ignored is noticed when it is read back."""
        monkeypatch.setattr(layer, "DURABLE", (DURABLE[0]._replace(value="NORMAL"),))
        with pytest.raises(BufferStorageError, match="synchronous is 1 where 2 is needed"):
            create_buffer_engine(path)

    def test_other_refusal(self, path, monkeypatch):
        """Whatever else SQLite says while it is opened refuses the buffer."""
        monkeypatch.setattr(layer, "DURABLE", (DURABLE[0]._replace(value="FULL"),))
        monkeypatch.setattr(layer, "COMMON", (COMMON[0]._replace(name="foreign keys"),))
        with pytest.raises(BufferStorageError, match="SQLite refused to go on .*syntax error"):
            create_buffer_engine(path)

    def test_driver_of_python_3_12(self, path, monkeypatch):
        """Where the driver has a transaction control of its own, it is told to leave that to us."""
        connect, asked = sqlite3.connect, []
        monkeypatch.setattr(sqlite3, "LEGACY_TRANSACTION_CONTROL", -1, raising=False)

        def recorded(target, *, autocommit, **options):
            asked.append(autocommit)
            return connect(target, **options)

        monkeypatch.setattr(sqlite3, "connect", recorded)
        create_buffer_engine(path)
        assert asked == [-1]

    def test_no_wal_to_read(self, tmp_path):
        """A monitor does not accept a database that is not ours."""
        path = tmp_path / "other.db"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE t (x)")
        with pytest.raises(BufferStorageError, match="is no buffer: its journal mode is 'delete'"):
            create_buffer_engine(path, read_only=True)
