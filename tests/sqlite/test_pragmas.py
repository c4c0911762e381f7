"""What every connection is set to, and read back."""

import pytest
from builders import another_program, driver

from kkt_buffer import BufferStorageError

# Each setting that a promise of the buffer rests on, and what SQLite reads it back as.
COMMON = {"foreign_keys": 1, "recursive_triggers": 1, "cell_size_check": 1}
FILE = {
    "journal_mode": "wal",
    "synchronous": 2,  # FULL
    "fullfsync": 1,
    "checkpoint_fullfsync": 1,
    "wal_autocheckpoint": 100,
    "journal_size_limit": 1 << 20,
}


def read_back(connection, names):
    return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}


@pytest.fixture
def refuse_pragma(monkeypatch):
    """Let SQLite answer to the setting of one PRAGMA as it is told to: ignore it in silence, or refuse it."""

    def refuse(name, answer):
        connect = driver().connect

        def authorize(action, pragma, value, *_):
            return (
                answer
                if (action, pragma) == (driver().SQLITE_PRAGMA, name) and value is not None
                else driver().SQLITE_OK
            )

        def authorized(*arguments, **options):
            connection = connect(*arguments, **options)
            connection.set_authorizer(authorize)
            return connection

        monkeypatch.setattr(driver(), "connect", authorized)

    return refuse


class TestPragmas:
    def test_file(self, file_engine):
        """Every connection has every setting, also the second one of the pool."""
        reader = file_engine.execution_options(kkt_buffer_read_only=True)
        expected = FILE | COMMON
        with reader.connect() as first, reader.connect() as second:
            assert expected == read_back(first, expected)
            assert expected == read_back(second, expected)
        with file_engine.connect() as writing:
            assert expected == read_back(writing, expected)

    def test_memory(self, engine):
        expected = {"journal_mode": "memory", **COMMON}
        with engine.connect() as connection:
            assert expected == read_back(connection, expected)

    def test_read_only(self, path, open_engine):
        expected = {"journal_mode": "wal", "query_only": 1, **COMMON}
        with open_engine(path, read_only=True).connect() as connection:
            assert expected == read_back(connection, expected)

    def test_busy_timeout(self, path, open_engine):
        with open_engine(path, busy_timeout=1.5).connect() as connection:
            assert {"busy_timeout": 1500} == read_back(connection, ["busy_timeout"])

    def test_no_wal(self, tmp_path, monkeypatch, open_engine):
        """Where the file system cannot give WAL, the buffer is refused, not used without it."""
        connect = driver().connect
        # This VFS has no shared memory, like a network mount.
        monkeypatch.setattr(
            driver(), "connect", lambda target, **options: connect(f"{target}&vfs=unix-dotfile", **options)
        )
        with pytest.raises(BufferStorageError, match=r"journal_mode is 'delete' where 'wal' is needed .* local disk"):
            open_engine(tmp_path / "buffer.db")

    def test_silent_refusal(self, path, open_engine, refuse_pragma):
        """A PRAGMA that SQLite ignored is noticed when it is read back."""
        refuse_pragma("foreign_keys", driver().SQLITE_IGNORE)
        with pytest.raises(BufferStorageError, match="foreign_keys is 0 where 1 is needed"):
            open_engine(path)

    def test_other_refusal(self, path, open_engine, refuse_pragma):
        """Whatever else SQLite says while it is opened refuses the buffer."""
        refuse_pragma("foreign_keys", driver().SQLITE_DENY)
        with pytest.raises(BufferStorageError, match="SQLite refused to go on .*not authorized"):
            open_engine(path)

    def test_driver_of_python_3_12(self, path, monkeypatch, open_engine):
        """Where the driver has a transaction control of its own, it is told to leave transactions to the package."""
        connect, legacy, asked = driver().connect, getattr(driver(), "LEGACY_TRANSACTION_CONTROL", None), []
        monkeypatch.setattr(driver(), "LEGACY_TRANSACTION_CONTROL", -1, raising=False)

        def recorded(target, *, autocommit, **options):
            asked.append(autocommit)
            if legacy is not None:
                options["autocommit"] = autocommit
            return connect(target, **options)

        monkeypatch.setattr(driver(), "connect", recorded)
        open_engine(path)
        assert {-1} == set(asked)

    def test_no_wal_to_read(self, tmp_path, open_engine):
        """A monitor does not accept a database that is not a buffer."""
        path = tmp_path / "other.db"
        with another_program(path) as connection:
            connection.execute("CREATE TABLE t (x)")
        with pytest.raises(BufferStorageError, match="is not a buffer: its journal mode is 'delete'"):
            open_engine(path, read_only=True)
