"""`create_buffer_engine` with the URL of a server: what is refused before anything is stored, and how."""

import contextlib
import sys

import pytest
from builders import new_receipt
from postgresql.cluster import wait_until
from psycopg import ConnectionInfo
from sqlalchemy import event, make_url, text
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import DBAPIError

from kkt_buffer import (
    BufferBusyError,
    BufferDamagedError,
    BufferFullError,
    BufferStorageError,
    ConnectionLostError,
    ReceiptRepository,
    SchemaError,
    create_buffer_engine,
)
from kkt_buffer.backend import backend_of
from kkt_buffer.postgresql.connection import ServerConnection
from kkt_buffer.postgresql.engine import Server


class TestOptions:
    @pytest.mark.parametrize("given", ["abc", "-1", "", "1.5"])
    def test_replicas(self, server_buffer, given):
        """A demand that cannot be read is refused, not taken for none."""
        url = make_url(server_buffer).update_query_dict({"require_replicas": given})
        with pytest.raises(ValueError, match="require_replicas="):
            create_buffer_engine(url)

    def test_replicas_in_the_url(self, server_buffer):
        """For commands, which have no other way to ask for it."""
        url = make_url(server_buffer).update_query_dict({"require_replicas": "1"})
        with pytest.raises(BufferStorageError, match="synchronous_standby_names is ''"):
            create_buffer_engine(url)

    def test_driver(self, server_buffer):
        """However its driver is written, a buffer has one name."""
        named = set()
        for driver in ("postgresql", "postgresql+psycopg"):
            engine = create_buffer_engine(make_url(server_buffer).set(drivername=driver))
            named.add(str(backend_of(engine)))
            engine.dispose()
        assert 1 == len(named)

    @pytest.mark.parametrize("query", ["busy_timeout=abc", "answer_timeout=-1", "answer_timeout=nan"])
    def test_timeouts_in_the_url(self, server_buffer, query):
        """They are read there too, and refused if they are no numbers."""
        with pytest.raises(ValueError, match=f"{query.partition('=')[0]}=.* in the URL: expected a number"):
            create_buffer_engine(f"{server_buffer}&{query}")
        with pytest.raises(ValueError, match=r"answer_timeout=5: expected more than busy_timeout \(6\)"):
            create_buffer_engine(f"{server_buffer}&answer_timeout=5&busy_timeout=6")

    @pytest.mark.parametrize("password", ["SE@CRET", "p@CRET:word"])
    def test_at_in_the_password(self, password):
        with pytest.raises(ValueError, match="write it as %40") as refused:
            create_buffer_engine(f"postgresql+psycopg://shop:{password}@db1/shop")
        assert "CRET" not in repr((refused.value, refused.value.__cause__))

    @pytest.mark.parametrize(
        "url", ["postgresql+psycopg://shop@db1:5432,db2:5432/shop", "postgresql-psycopg://shop@db1/"]
    )
    def test_unreadable(self, url):
        with pytest.raises(ValueError, match="cannot be read.* several hosts as .*host=HOST1:5432&host=HOST2:5432"):
            create_buffer_engine(url)

    def test_replicas_of_a_file(self, tmp_path):
        with pytest.raises(ValueError, match="a file has no replicas"):
            create_buffer_engine(tmp_path / "buffer.db", require_replicas=1)

    def test_other_database(self):
        with pytest.raises(ValueError, match=r"postgresql\+psycopg://USER@HOST/DATABASE"):
            create_buffer_engine("mysql://localhost/shop")

    def test_unknown_option(self, server_buffer):
        with pytest.raises(BufferStorageError, match='invalid connection option "require_replica"'):
            create_buffer_engine(make_url(server_buffer).update_query_dict({"require_replica": "1"}))

    def test_timeouts(self, server_buffer):
        """A wait for a lock must not be taken for a server that does not answer."""
        with pytest.raises(ValueError, match=r"answer_timeout=10: expected more than busy_timeout \(10\)"):
            create_buffer_engine(server_buffer, busy_timeout=10, answer_timeout=10)

    @pytest.mark.parametrize("level", ["SERIALIZABLE", "READ COMMITTED"])
    def test_isolation_level(self, server_buffer, level):
        """SQLAlchemy would begin transactions of its own, even with the same level."""
        for options in ({"isolation_level": level}, {"execution_options": {"isolation_level": level}}):
            with pytest.raises(ValueError, match="READ COMMITTED"):
                create_buffer_engine(server_buffer, **options)

    def test_one_slash(self, tmp_path, monkeypatch):
        """A URL that lost a slash does not become a file with the password in its name."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="two slashes"):
            create_buffer_engine("postgresql+psycopg:/shop:SECRET@db1/shop")
        assert [] == list(tmp_path.iterdir())

    def test_no_driver(self, server_buffer, monkeypatch):
        """Without the extra it says what to install."""
        monkeypatch.delitem(sys.modules, "kkt_buffer.postgresql.engine")
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(BufferStorageError, match="pip install"):
            create_buffer_engine(server_buffer)


class TestServers:
    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            (("PostgreSQL 11.2-YB-2.25.0.0-b0", "UTF8", "public", False), "this is YugabyteDB"),
            (("PostgreSQL 15.1", "UTF8", "public", True), "this is Citus"),
            (("PostgreSQL 15.1", "LATIN1", "public", False), "its encoding is LATIN1"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refused(self, server_buffer, monkeypatch, answer, told):
        """What was never tested is refused by its name. (Their answers are made up: no such server can be had.)"""

        class Answer:
            def one(self):
                return answer

        real = Server.refuse_others

        def refuse_others(self, connection):
            monkeypatch.setattr(connection, "exec_driver_sql", lambda _sql: Answer())
            real(self, connection)

        monkeypatch.setattr(Server, "refuse_others", refuse_others)
        with pytest.raises(BufferStorageError, match=told):
            create_buffer_engine(server_buffer)

    def test_cockroach(self, server_buffer, monkeypatch):
        """Its version is one that SQLAlchemy cannot read."""
        monkeypatch.setattr(ConnectionInfo, "parameter_status", lambda _info, name: "v25.1" * (name == "crdb_version"))
        monkeypatch.setattr(PGDialect, "_get_server_version_info", None)
        with pytest.raises(BufferStorageError, match="this is CockroachDB"):
            create_buffer_engine(server_buffer)

    def test_too_old(self, server_buffer, monkeypatch):
        monkeypatch.setattr("kkt_buffer.postgresql.engine.OLDEST", 99)
        with pytest.raises(BufferStorageError, match="PostgreSQL 99 or newer is needed"):
            create_buffer_engine(server_buffer)

    def test_down(self, server_buffer):
        """A server that is not there is not told as a connection that was lost."""
        with pytest.raises(ConnectionLostError, match="no connection can be opened"):
            create_buffer_engine(make_url(server_buffer).set(port=1))

    def test_no_database(self, server_buffer):
        with pytest.raises(ConnectionLostError, match='"nowhere" does not exist.+Check host, port, database'):
            create_buffer_engine(make_url(server_buffer).set(database="nowhere"))

    def test_name(self, server_buffer):
        """Messages name the hosts and the schema, and neither user nor password."""
        url = make_url(server_buffer)
        hosts = {"host": [f"127.0.0.1:{url.port}", "127.0.0.1:1"], "target_session_attrs": "read-write"}
        engine = create_buffer_engine(url.set(host=None, port=None).update_query_dict(hosts))
        named = make_url(str(backend_of(engine)))
        engine.dispose()
        assert {"host": tuple(hosts["host"]), "options": url.query["options"]} == named.query
        assert (None, None) == (named.username, named.password)

    def test_stands_still_after_a_commit(self, server_engine, monkeypatch):
        """The look at the replicas after a commit is cut off: the outcome is not told as stored, nor as not stored."""
        repository = ReceiptRepository(server_engine)
        repository.insert_receipt(new_receipt())
        with server_engine.connect() as connection:
            driver = connection.connection.dbapi_connection
            driver.replicas = 1
            driver.pgconn.finish()
            with pytest.raises(ConnectionLostError, match="the confirmation of a replica is missing"):
                ServerConnection.refuse_unconfirmed(driver)
            connection.invalidate()


class TestStatements:
    def test_function_dropped(self, server_engine):
        """A function that is gone is a schema that was changed by hand."""
        repository = ReceiptRepository(server_engine)
        repository.get_buffer_status()
        with server_engine.begin() as connection:
            connection.exec_driver_sql("ALTER FUNCTION kkt_insert_receipts RENAME TO kkt_other")
        with pytest.raises(SchemaError, match="was changed by hand"):
            repository.insert_receipt(new_receipt())

    def test_warning(self, server_engine):
        """A warning of somebody's trigger says nothing about replicas."""
        repository = ReceiptRepository(server_engine)
        with repository.transaction() as session:
            session.execute(text("DO $$ BEGIN RAISE WARNING 'paper is low'; END $$"))
            repository.insert_receipt(new_receipt())
        assert 1 == repository.get_buffer_status().pending

    def test_no_patience(self, server_engine, server_buffer, open_engine):
        """With `busy_timeout=0`, who would have to wait is refused at once."""
        hasty = ReceiptRepository(open_engine(server_buffer, busy_timeout=0))
        with ReceiptRepository(server_engine).transaction() as session:
            backend_of(server_engine).lock(session.connection())
            with pytest.raises(BufferBusyError):
                hasty.insert_receipt(new_receipt())
            with pytest.raises(BufferBusyError):
                hasty.insert_receipts([new_receipt(), new_receipt()])

    def test_no_connection(self, server_buffer, open_engine):
        """All connections of the pool are in use: that is an error of ours, as any other."""
        repository = ReceiptRepository(open_engine(server_buffer, pool_size=1, max_overflow=0, pool_timeout=0.05))
        repository.get_buffer_status()
        with repository.engine.connect(), pytest.raises(BufferBusyError, match="larger pool_size"):
            repository.insert_receipt(new_receipt())

    def test_slow_check(self, server, server_engine, server_buffer, open_engine):
        """A check of a large buffer may take longer than any other answer."""
        with server_engine.begin() as connection:
            slow = "CROSS JOIN (SELECT pg_sleep(1.2)) AS slow"
            connection.exec_driver_sql(
                f"CREATE OR REPLACE VIEW buffer_state AS SELECT s.* FROM kkt_state() AS s {slow}"
            )
        repository = ReceiptRepository(open_engine(server_buffer, busy_timeout=0.3, answer_timeout=0.8))
        assert {} == {what: found for what, found in repository.check_integrity().findings.items() if found}
        with pytest.raises(ConnectionLostError):
            repository.get_buffer_status()
        wait_until(lambda: not server.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))

    def test_capacity_lowered(self, server_engine):
        """Lowered while a transaction is open that has read it: the batch is refused, and its block goes on."""
        repository = ReceiptRepository(server_engine)
        repository.insert_receipt(new_receipt())
        with repository.transaction():
            repository.claim_pending(1)
            with server_engine.begin() as another:
                another.exec_driver_sql("UPDATE config SET value = '1' WHERE key = 'buffer_capacity'")
            with pytest.raises(BufferFullError):
                repository.insert_receipts([new_receipt(), new_receipt()])
            with pytest.raises(BufferFullError):
                repository.insert_receipt(new_receipt())
        assert 1 == repository.get_buffer_status().syncing

    def test_lost_while_checking(self, server_engine, server):
        """A connection that is lost tells nothing about the rows: the check does not call them damaged."""
        repository = ReceiptRepository(server_engine)
        repository.get_buffer_status()

        def end(connection, *_):
            server.execute(f"SELECT pg_terminate_backend({connection.connection.dbapi_connection.info.backend_pid})")

        event.listen(server_engine, "before_cursor_execute", end)
        try:
            with pytest.raises(ConnectionLostError):
                repository.check_integrity()
        finally:
            event.remove(server_engine, "before_cursor_execute", end)

    def test_swallowed_error(self, server_engine):
        """After an error that a block has swallowed, the server answers COMMIT with success, and stores nothing."""
        repository = ReceiptRepository(server_engine)
        with pytest.raises(BufferStorageError, match="rolled all of it back"):
            with repository.transaction() as session:
                receipt_id = repository.insert_receipt(new_receipt())
                with contextlib.suppress(DBAPIError):
                    session.connection().exec_driver_sql("SELECT 1 / 0")
        assert repository.get_receipt_by_id(receipt_id) is None

    def test_state_deleted(self, server_engine):
        """Without the counts there is no timestamp: the receipt is refused, and the buffer told as damaged."""
        repository = ReceiptRepository(server_engine)
        with server_engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM buffer_changes")
        with pytest.raises(BufferDamagedError, match="contradict each other"):
            repository.insert_receipt(new_receipt())

    def test_no_backup(self, server_engine, tmp_path):
        with pytest.raises(BufferStorageError, match="pg_basebackup"):
            ReceiptRepository(server_engine).backup(tmp_path / "copy.db")
