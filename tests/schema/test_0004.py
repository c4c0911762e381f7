"""The schema on PostgreSQL: upgraded whole or not at all, compared object by object, and restored from a dump."""

import random
import re
import signal

import pytest
import servers
from alembic import command
from alembic.util import CommandError
from builders import PROOF, STATUSES, a_receipt, another_program, everything, fill, new_receipt, snapshot, start_python
from operations_table import OPERATIONS, Known
from schema.helpers import HEAD, alembic
from sqlalchemy import event, make_url, text
from sqlalchemy.schema import CreateIndex, CreateTable

from kkt_buffer import ReceiptRepository, SchemaError, check, current, migrate, upgrade
from kkt_buffer.columns import MORE_COLUMNS, ONLY_ON, WHERE
from kkt_buffer.models import VERSION_TABLE, metadata
from kkt_buffer.postgresql import catalog

KILLS = 100 if PROOF else 5

# Upgrades URL, and is killed before the statement number LAST; prints how many there were.
UPGRADE = """
import os, signal, sys
from sqlalchemy import event
from kkt_buffer import create_buffer_engine, upgrade

url, last, seen = sys.argv[1], int(sys.argv[2]), 0
engine = create_buffer_engine(url)

@event.listens_for(engine, "before_cursor_execute")
def count(*_):
    global seen
    seen += 1
    if seen == last:
        os.kill(os.getpid(), signal.SIGKILL)

upgrade(engine)
print(seen)
"""


@pytest.fixture
def new_engine(postgresql_url, open_engine):
    """An engine on an empty schema."""
    return open_engine(postgresql_url)


def names(engine):
    """Every table, view, index and function of the schema."""
    with engine.connect() as connection:
        return connection.scalars(
            text(
                "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace UNION ALL"
                " SELECT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace ORDER BY 1"
            )
        ).all()


class TestModels:
    def test_same_tables(self, server_engine):
        """The migrations make the tables and the indexes of the models."""

        def made_by_models(_schema):
            dialect = server_engine.dialect
            for table in metadata.sorted_tables:
                if table.name == VERSION_TABLE or table.info.get(ONLY_ON) == "sqlite":
                    continue
                yield str(CreateTable(table).compile(dialect=dialect))
                for index in table.indexes:
                    sql = str(CreateIndex(index).compile(dialect=dialect))
                    more = "".join(f", {name}" for name in index.info.get(MORE_COLUMNS, ()))
                    where = f" WHERE {index.info[WHERE]}" if WHERE in index.info else ""
                    yield f"{sql[: sql.rindex(')')]}{more}){where}"
            yield "ALTER TABLE receipts SET (toast_tuple_target = 256)"

        with server_engine.connect() as connection:
            modelled, made = catalog.objects(connection, made_by_models)
        assert {key: sql for key, sql in modelled.items() if key[0] in {"table", "index"}} == {
            key: sql for key, sql in made.items() if key[0] in {"table", "index"}
        }


class TestUpgrade:
    def test_is_what_the_models_say(self, new_engine):
        """The migrations arrive at what the models and `schema` say, object by object."""
        upgrade(new_engine)
        check(new_engine)
        assert HEAD == current(new_engine)

    def test_all_or_nothing(self, new_engine):
        """A migration that fails leaves the schema as it was, without even a version table."""
        with new_engine.begin() as connection:
            connection.execute(text("CREATE TABLE dlq (host TEXT)"))
        failed = f"the upgrade to schema {HEAD} failed and was rolled back; .*dlq.* already exists"
        with pytest.raises(SchemaError, match=failed):
            upgrade(new_engine)
        assert ["dlq"] == [name for name in names(new_engine) if "toast" not in name]

    def test_beside_a_host(self, new_engine):
        """The application's own Alembic version and tables in the same schema are not touched, nor minded."""
        with new_engine.begin() as connection:
            connection.execute(text("CREATE TABLE alembic_version (version_num TEXT)"))
            connection.execute(text("INSERT INTO alembic_version VALUES ('f00d')"))
        upgrade(new_engine)
        check(new_engine)
        command.check(migrate.alembic_config(new_engine))
        with new_engine.connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "f00d"

    def test_first_of_several(self, server, open_engine):
        """The buffer is in the first schema of the path; one of the same names behind it stays another buffer."""
        with server.schema() as first, server.schema() as second:
            behind = open_engine(server.url(schema=second))
            upgrade(behind)
            a_receipt(ReceiptRepository(behind))
            engine = open_engine(server.url(schema=f"{first},{second}"))
            assert current(engine) is None
            upgrade(engine)
            check(engine)
            assert 0 == ReceiptRepository(engine).get_buffer_status().total_receipts
            assert 1 == ReceiptRepository(behind).get_buffer_status().total_receipts

    def test_any_name(self, server, open_engine):
        """The schema may have a name that must be quoted."""
        server.execute('CREATE SCHEMA "Till 1"')
        engine = open_engine(server.url(schema='"Till\\ 1"'))
        upgrade(engine)
        check(engine)
        assert a_receipt(ReceiptRepository(engine))
        engine.dispose()
        server.execute('DROP SCHEMA "Till 1" CASCADE')


class TestKilled:
    def test_process(self, server, open_engine):
        """A process that is killed at any statement leaves the old schema or the new one; the next one succeeds."""
        with server.schema() as schema, start_python(UPGRADE, server.url(schema=schema), 0) as whole:
            count = int(whole.stdout.read())
            engine = open_engine(server.url(schema=schema))
            expected = names(engine)
            engine.dispose()
        for last in sorted(random.sample(range(1, count + 1), KILLS)) if KILLS < count else range(1, count + 1):
            with server.schema() as schema:
                with start_python(UPGRADE, server.url(schema=schema), last) as killed:
                    assert -signal.SIGKILL == killed.wait(60)
                engine = open_engine(server.url(schema=schema))
                if current(engine) is None:  # it waits for the server to notice that its client is gone
                    upgrade(engine)
                assert expected == names(engine)
                check(engine)
                engine.dispose()

    def test_server(self, server, open_engine):
        """So does a server that is killed in the middle of it."""
        with servers.Server() as own:
            engine = open_engine(own.url())
            statements = []

            def kill(*arguments):
                statements.append(arguments[2])
                if "CREATE VIEW" in arguments[2]:
                    own.kill()

            event.listen(engine, "before_cursor_execute", kill)
            with pytest.raises(Exception, match="connection to the server was lost"):
                upgrade(engine)
            event.remove(engine, "before_cursor_execute", kill)
            own.start()
            assert [] == names(engine)
            upgrade(engine)
            check(engine)
            engine.dispose()


# A change of each kind of object, and the message about it.
TAMPERED = {
    "a column less": ("ALTER TABLE dlq DROP COLUMN last_error", "table dlq lacks .*last_error text"),
    "a table less": ("DROP TABLE dlq CASCADE", "table dlq is missing"),
    "a check": (
        "ALTER TABLE receipts DROP CONSTRAINT ck_receipts_retry_count",
        r"table receipts lacks .*ck_receipts_retry_count CHECK \(retry_count >= 0\)",
    ),
    "a check that was not validated": (
        """
        ALTER TABLE receipts DROP CONSTRAINT ck_receipts_retry_count;
        ALTER TABLE receipts ADD CONSTRAINT ck_receipts_retry_count CHECK (retry_count >= 0) NOT VALID
        """,
        "table receipts lacks .*ck_receipts_retry_count",
    ),
    "a default": ("ALTER TABLE receipts ALTER retry_count SET DEFAULT 1", "table receipts lacks .*retry_count bigint"),
    "a type": ("ALTER TABLE buffer_events ALTER receipt_id TYPE varchar(36)", "table buffer_events lacks .*receipt_id"),
    "a value that may be missing": ("ALTER TABLE receipts ALTER pos_id DROP NOT NULL", "table receipts lacks .*pos_id"),
    "an order of texts": ('ALTER TABLE config ALTER key TYPE text COLLATE "default"', "table config lacks .*key text"),
    "a foreign key": (
        """
        ALTER TABLE dlq DROP CONSTRAINT fk_dlq_original_receipt_id_receipts;
        ALTER TABLE dlq ADD CONSTRAINT fk_dlq_original_receipt_id_receipts
            FOREIGN KEY (original_receipt_id) REFERENCES receipts ON DELETE CASCADE
        """,
        r"table dlq lacks .*FOREIGN KEY \(original_receipt_id\)",
    ),
    "a table that is not logged": ("ALTER TABLE config SET UNLOGGED", "table config lacks"),
    "a table's options": ("ALTER TABLE receipts RESET (toast_tuple_target)", "table receipts lacks"),
    "a trigger": ("ALTER TABLE receipts DISABLE TRIGGER trg_guard_held", "trigger trg_guard_held differs"),
    "a trigger less": ("DROP TRIGGER trg_guard_undelivered ON receipts", "trigger trg_guard_undelivered is missing"),
    "a function": (
        "CREATE OR REPLACE FUNCTION kkt_buffer_capacity() RETURNS bigint LANGUAGE sql AS 'SELECT 5'",
        "function kkt_buffer_capacity differs",
    ),
    "a view": (
        "CREATE OR REPLACE VIEW buffer_state AS SELECT * FROM kkt_state() WHERE pending > 0",
        "view buffer_state differs",
    ),
    "an index": (
        "DROP INDEX idx_receipts_hlc; CREATE INDEX idx_receipts_hlc ON receipts (id)",
        "index idx_receipts_hlc differs",
    ),
    "an index less": ("DROP INDEX idx_receipts_hlc", "index idx_receipts_hlc is missing"),
    "an index more": ("CREATE INDEX mine ON receipts (pos_id)", "index mine is not part of the buffer"),
    "a full index": (
        """
        DROP INDEX idx_receipts_held;
        CREATE INDEX idx_receipts_held ON receipts (hlc_local_time, hlc_logical_counter)
        """,
        "index idx_receipts_held differs",
    ),
    "a unique index": (
        "DROP INDEX idx_dlq_open; CREATE INDEX idx_dlq_open ON dlq (original_receipt_id) WHERE resolved_at IS NULL",
        "index idx_dlq_open differs",
    ),
    "the version table": (
        "ALTER TABLE kkt_buffer_version ALTER version_num TYPE text",
        "table kkt_buffer_version lacks version_num",
    ),
}


class TestCheck:
    @pytest.fixture(params=TAMPERED)
    def tampered(self, request, server_buffer, open_engine):
        """An engine on a buffer that is not as it should be, and how."""
        change, told = TAMPERED[request.param]
        with another_program(server_buffer) as db:
            db.execute(change)
        return open_engine(server_buffer), told

    def test_drift(self, tampered):
        """Every kind of object is compared, and what differs is named, also by `alembic check`."""
        engine, told = tampered
        with pytest.raises(SchemaError, match=f"not that of this release: .*the {told}"):
            check(engine)
        with pytest.raises(CommandError, match="New upgrade operations detected"):
            command.check(migrate.alembic_config(engine))

    def test_of_others(self, server_engine):
        """Other tables, views, functions, triggers and columns are not ours to judge, on our tables either."""
        with server_engine.begin() as connection:
            connection.execute(text("CREATE TABLE goods (id INTEGER PRIMARY KEY)"))
            connection.execute(text("CREATE INDEX idx_goods ON goods (id)"))
            connection.execute(text("CREATE VIEW v_shop AS SELECT pos_id FROM receipts"))
            connection.execute(
                text("CREATE FUNCTION shop() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
            )
            connection.execute(text("CREATE TRIGGER shop AFTER INSERT ON receipts EXECUTE FUNCTION shop()"))
            connection.execute(text("ALTER TABLE receipts ADD COLUMN cashier TEXT"))
        check(server_engine)
        command.check(migrate.alembic_config(server_engine))

    def test_not_migrated(self, new_engine):
        with pytest.raises(SchemaError, match="has no tables of a buffer .*kkt-buffer upgrade"):
            check(new_engine)


class TestOtherRelease:
    @pytest.fixture
    def newer(self, server_buffer):
        """A buffer that a later release has migrated."""
        with another_program(server_buffer) as db:
            db.execute("UPDATE kkt_buffer_version SET version_num = '9999'")
            db.execute("UPDATE config SET value = '2.7.0' WHERE key = 'release'")
        return server_buffer

    NEWER = r"schema 9999, made by kkt-buffer 2.7.0; this is kkt-buffer \S+, which knows .* Nothing was changed"

    @pytest.mark.parametrize("entry", [current, upgrade, check, migrate.require])
    def test_newer(self, newer, entry, open_engine):
        """A buffer of a newer release is refused by every entry point, says whose it is, and is not touched."""
        before = everything(newer)
        with pytest.raises(SchemaError, match=self.NEWER):
            entry(open_engine(newer))
        assert before == everything(newer)

    @pytest.mark.parametrize(("fixture", "told"), [("newer", NEWER), ("postgresql_url", "has no tables of a buffer")])
    def test_operations(self, request, fixture, told, open_engine):
        """No operation works on the schema of another release."""
        url = request.getfixturevalue(fixture)
        before = everything(url)
        repository = ReceiptRepository(open_engine(url))
        for operation in OPERATIONS.values():
            with pytest.raises(SchemaError, match=told):
                operation.call(repository, Known.nothing())
        assert before == everything(url)


class TestAlembic:
    def test_up_check_down(self, postgresql_url):
        """The three commands work in a checkout, and leave nothing of ours behind."""
        for step in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
            done = alembic("-x", f"db={postgresql_url}", *step)
            assert done.returncode == 0, done.stdout
            assert servers.PASSWORD not in done.stdout
        assert [] == [line for line in everything(postgresql_url) if "version" not in line]

    @pytest.mark.parametrize("what", ["receipts", "settings"])
    def test_downgrade_refused(self, server_buffer, what):
        """A buffer that holds receipts, or settings that were changed, is not taken away."""
        if what == "receipts":
            fill(server_buffer)
        else:
            with another_program(server_buffer) as db:
                db.execute("UPDATE config SET value = '500' WHERE key = 'buffer_capacity'")
        before = everything(server_buffer)
        done = alembic("-x", f"db={server_buffer}", "downgrade", "base")
        assert re.search(r"refusing to drop the buffer: it (holds 4 receipts|has changed settings)", done.stdout)
        assert before == everything(server_buffer)


class TestRestored:
    def test_dump(self, server, server_buffer, open_engine):
        """A dump that is restored elsewhere is the same buffer: its schema, its rows, its counts, its clock."""
        fill(server_buffer)
        before = open_engine(server_buffer)
        newest = ReceiptRepository(before).get_pending_receipts()[-1]
        schema = make_url(server_buffer).query["options"].partition("=")[2]
        with servers.Server() as other:
            other.execute(server.dump(schema))
            engine = open_engine(other.url(schema=schema))
            assert snapshot(before) == snapshot(engine)
            check(engine)
            repository = ReceiptRepository(engine, now=lambda: newest.hlc_local_time - 60)
            assert repository.check_integrity().is_sound
            receipt = repository.get_receipt_by_id(repository.insert_receipt(new_receipt()))
            assert (newest.hlc_local_time, newest.hlc_logical_counter) < (
                receipt.hlc_local_time,
                receipt.hlc_logical_counter,
            )
            assert len(STATUSES) + 1 == repository.get_buffer_status().total_receipts
            engine.dispose()
