"""How the schema comes, is recognised, and goes."""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.util import CommandError
from builders import NOON, a_receipt, driver, everything, new_receipt, run_python
from sqlalchemy import inspect, text

from kkt_buffer import (
    BufferBusyError,
    ReceiptRepository,
    SchemaError,
    buffer,
    check,
    create_buffer_engine,
    current,
    migrate,
    upgrade,
)
from kkt_buffer.drift import differences
from kkt_buffer.models import CONFIG_RULES, Base
from kkt_buffer.sqlite.schema import SQLITE_TRIGGERS, SQLITE_VIEWS

ROOT = Path(__file__).parents[2]
HEAD = migrate.revisions()[-1]
NOBODY = "00000000-0000-4000-8000-000000000000"
ALEMBIC = (str(Path(sys.executable).with_name("alembic")),)


# Each operation that needs the schema, by its name.
A_WHY = {"actor": "Anna", "reason": "a test"}
OPERATIONS = {
    "check_integrity": lambda repository: repository.check_integrity(),
    "claim_pending": lambda repository: repository.claim_pending(),
    "get_buffer_status": lambda repository: repository.get_buffer_status(),
    "get_config": lambda repository: repository.get_config("buffer_capacity"),
    "get_events": lambda repository: repository.get_events(),
    "get_pending_receipts": lambda repository: repository.get_pending_receipts(),
    "get_receipt_by_id": lambda repository: repository.get_receipt_by_id(NOBODY),
    "get_receipts_due": lambda repository: repository.get_receipts_due(NOON),
    "increment_retry_count": lambda repository: repository.increment_retry_count(NOBODY, "an error"),
    "insert_receipt": lambda repository: repository.insert_receipt(new_receipt()),
    "insert_receipts": lambda repository: repository.insert_receipts([new_receipt()]),
    "list_dead_letters": lambda repository: repository.list_dead_letters(),
    "log_event": lambda repository: repository.log_event("circuit_opened"),
    "mark_synced": lambda repository: repository.mark_synced(NOBODY, NOON),
    "move_to_dlq": lambda repository: repository.move_to_dlq(NOBODY, "a reason"),
    "prune": lambda repository: repository.prune(),
    "record_failure": lambda repository: repository.record_failure(NOBODY, "an error", NOBODY),
    "recover_expired_leases": lambda repository: repository.recover_expired_leases(),
    "release": lambda repository: repository.release(NOBODY, NOBODY),
    "renew_lease": lambda repository: repository.renew_lease(NOBODY, NOBODY),
    "requeue": lambda repository: repository.requeue(NOBODY, **A_WHY),
    "requeue_all": lambda repository: repository.requeue_all(**A_WHY),
    "resolve": lambda repository: repository.resolve(NOBODY, **A_WHY),
    "set_config": lambda repository: repository.set_config("buffer_capacity", 1),
    "transaction": lambda repository: repository.transaction().__enter__(),
    "update_receipt_status": lambda repository: repository.update_receipt_status(NOBODY, "pending"),
}


def alembic(*arguments, cwd=ROOT, **environment):
    """Run the `alembic` of this environment in the checkout."""
    return subprocess.run(
        [*ALEMBIC, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def objects(engine):
    """Each object of the schema with its SQL, white space and quotes aside."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        return {name: plain(sql) for name, sql in rows if name != "sqlite_sequence"}


def contents(engine):
    """Every row of every table, as {table: {key: row}}; the keys are the first columns."""
    with engine.connect() as connection:
        tables = {
            table: connection.execute(text(f"SELECT * FROM {table}")).mappings().all()
            for table in inspect(connection).get_table_names()
        }
    return {table: {next(iter(row.values())): dict(row) for row in rows} for table, rows in tables.items()}


def counted(engine):
    """What `buffer_counts` should hold, counted row by row."""
    with engine.connect() as connection:
        statuses = dict(list(connection.execute(text("SELECT status, COUNT(*) FROM receipts GROUP BY status"))))
        open_letters = connection.scalar(text("SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL"))
    return {"pending": 0, "syncing": 0, "synced": 0, "failed": 0} | statuses | {"open_dead_letters": open_letters}


def counts(engine):
    return {name: row["value"] for name, row in contents(engine)["buffer_counts"].items()}


def schema(path):
    engine = create_buffer_engine(path)
    try:
        return objects(engine)
    finally:
        engine.dispose()


def plain(sql):
    return re.sub(r"\s+", " ", str(sql)).replace('"', "").strip()


def checks(sql):
    """The CHECK constraints in the text of a table, up to the parenthesis that closes each."""
    found = []
    for start in re.finditer(r"CONSTRAINT \S+ CHECK \(", sql):
        depth, end = 1, start.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            end += 1
        found.append(sql[start.start() : end])
    return sorted(found)


def structure(engine):
    """What SQLite itself understands of the schema: columns, keys, references, indexes; and the text of the rest."""
    found = {}
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT type, name, sql FROM sqlite_master ORDER BY name")).all()
        for kind, name, sql in rows:
            if kind == "table" and not name.startswith(("sqlite_", "kkt_buffer_version")):
                for pragma in ("table_xinfo", "foreign_key_list", "index_list"):
                    # The first number tells the order, which ADD COLUMN changes.
                    lines = connection.exec_driver_sql(f"PRAGMA {pragma}({name})")
                    found[pragma, name] = sorted(str(tuple(line)[1:]) for line in lines)
                found["checks", name] = checks(plain(sql))
            elif kind == "index" and sql:
                keys = connection.exec_driver_sql(f"PRAGMA index_xinfo({name})")
                found[kind, name] = plain(sql), [tuple(key)[2:] for key in keys]
            elif sql and "kkt_buffer_version" not in name:
                found[kind, name] = plain(sql)
    return found


class TestUpgrade:
    def test_is_what_the_models_say(self, engine):
        """The migrations arrive at what the models and `schema` make by themselves, object by object."""
        modelled = create_buffer_engine(":memory:")
        with modelled.begin() as connection:
            Base.metadata.create_all(connection)
            for sql in (*SQLITE_VIEWS.values(), *SQLITE_TRIGGERS.values()):
                connection.exec_driver_sql(sql)
        assert structure(modelled) == structure(engine)
        with modelled.connect() as connection:
            assert [] == differences(connection)
        modelled.dispose()

    def test_twice(self, engine, monkeypatch):
        """On a database that is up to date nothing is done, and Alembic is not even imported."""
        monkeypatch.setitem(sys.modules, "alembic", None)
        upgrade(engine)
        assert current(engine) == migrate.revisions()[-1]

    def test_defaults(self, engine):
        """The settings of the first migration are those that the code falls back to."""
        with engine.connect() as connection:
            rows = dict(list(connection.execute(text("SELECT key, value FROM config"))))
        defaults = {key: str(rule.default) for key, rule in CONFIG_RULES.items()}
        assert {"version": "1.0.0", "release": migrate.release()} | defaults == rows

    def test_logging_is_left_alone(self, tmp_path):
        """A library does not configure its host's logging, nor print."""
        program = """
            import logging, sys
            logging.basicConfig(level=logging.ERROR, format="host %(message)s")
            before = list(logging.root.handlers)
            import kkt_buffer
            kkt_buffer.upgrade(kkt_buffer.create_buffer_engine(sys.argv[1]))
            assert logging.root.handlers == before
            assert logging.getLogger("host").isEnabledFor(logging.ERROR)
        """
        assert run_python(program, tmp_path / "buffer.db").stdout == ""

    def test_all_or_nothing(self, tmp_path, monkeypatch, open_engine):
        """A migration that fails leaves the database as it was, without even a version table."""
        engine = open_engine(tmp_path / "buffer.db")
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE buffer_counts (host TEXT)"))
        failed = f"the upgrade to schema {HEAD} failed and was rolled back; .*buffer_counts already exists"
        with pytest.raises(SchemaError, match=failed):
            upgrade(engine)
        assert list(objects(engine)) == ["buffer_counts"]

    def test_beside_a_host(self, tmp_path, open_engine):
        """The application's own Alembic version and tables in the same database are not touched, nor minded."""
        engine = open_engine(tmp_path / "buffer.db")
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE alembic_version (version_num TEXT)"))
            connection.execute(text("INSERT INTO alembic_version VALUES ('f00d')"))
            connection.execute(text("CREATE TABLE goods (id INTEGER PRIMARY KEY, name TEXT)"))
        upgrade(engine)
        check(engine)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "f00d"

    def test_foreign_keys(self, path, file_engine, caplog):
        """A reference that was broken before is told, and does not stand in the way."""
        with file_engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
            connection.execute(text("CREATE TABLE host (receipt_id TEXT REFERENCES receipts (id))"))
            connection.execute(text("INSERT INTO host VALUES ('gone')"))
            connection.execute(text("DELETE FROM kkt_buffer_version"))
            connection.execute(text("DROP VIEW v_buffer_status"))
            for table in ("buffer_counts", "config", "buffer_events", "dlq", "receipts"):
                connection.execute(text(f"DROP TABLE {table}"))
            connection.commit()
        file_engine.dispose()
        with caplog.at_level(logging.WARNING, logger="kkt_buffer.migrations"):
            upgrade(file_engine)
        assert "foreign keys were violated before the migration" in caplog.text


class TestPatience:
    """Somebody else has the file locked: most likely it is upgrading it."""

    @pytest.fixture
    def locked(self, tmp_path):
        """A new buffer that is locked, and how to unlock it."""
        engine = create_buffer_engine(tmp_path / "buffer.db", busy_timeout=0.05)
        with contextlib.closing(driver().connect(tmp_path / "buffer.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield engine, other
        engine.dispose()

    def test_waits(self, locked, caplog, monkeypatch):
        engine, other = locked
        rolled_back = []

        def run(*arguments):
            if "waiting for the process" in caplog.text and not rolled_back:
                rolled_back.append(other.execute("ROLLBACK"))
            original(*arguments)

        original = command.upgrade
        monkeypatch.setattr(command, "upgrade", run)
        upgrade(engine)
        assert rolled_back
        check(engine)

    def test_gives_up(self, locked, monkeypatch):
        engine, _ = locked
        monkeypatch.setattr(migrate, "PATIENCE_SECONDS", 0)
        with pytest.raises(BufferBusyError, match="kept"):
            upgrade(engine)


class TestCurrent:
    def test_nothing(self, tmp_path, open_engine):
        assert current(open_engine(tmp_path / "buffer.db")) is None

    def test_empty_version_table(self, engine):
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM kkt_buffer_version"))
        assert current(engine) is None

    @pytest.fixture
    def newer(self, path):
        """A buffer that a later release has migrated."""
        engine = create_buffer_engine(path)
        with engine.begin() as connection:
            connection.execute(text("UPDATE kkt_buffer_version SET version_num = '9999'"))
            connection.execute(text("UPDATE config SET value = '2.7.0' WHERE key = 'release'"))
        engine.dispose()
        return path

    @pytest.fixture
    def older(self, tmp_path):
        """A buffer that an earlier release has made."""
        path = tmp_path / "older.db"
        engine = create_buffer_engine(path)
        command.upgrade(migrate._config(engine), "0001")
        engine.dispose()
        return path

    @pytest.fixture
    def empty(self, tmp_path):
        """A file that was never upgraded."""
        path = tmp_path / "empty.db"
        create_buffer_engine(path).dispose()
        return path

    NEWER = r"schema 9999, made by kkt-buffer 2.7.0; this is kkt-buffer \S+, which knows .* Nothing was touched"

    @pytest.mark.parametrize("entry", [current, upgrade, check, migrate.require])
    def test_newer(self, newer, entry):
        """A database of a newer release is refused by every entry point, says whose it is, and is not touched."""
        before = everything(newer)
        engine = create_buffer_engine(newer)
        with pytest.raises(SchemaError, match=self.NEWER):
            entry(engine)
        engine.dispose()
        assert before == everything(newer)

    @pytest.mark.parametrize("options", [{}, {"upgrade": True}, {"upgrade": False}])
    def test_newer_by_function(self, newer, options):
        before = everything(newer)
        with pytest.raises(SchemaError, match=self.NEWER):
            buffer.init_buffer_db(newer, **options)
        assert before == everything(newer)

    @pytest.mark.parametrize("step", [["upgrade", "head"], ["downgrade", "base"], ["check"]])
    def test_newer_by_alembic(self, newer, step):
        before = everything(newer)
        done = alembic("-x", f"db={newer}", *step)
        assert done.returncode != 0
        assert re.search(self.NEWER, done.stdout)
        assert "Traceback" not in done.stdout
        assert before == everything(newer)

    def test_newer_without_a_name(self, newer, open_engine):
        """Whatever a later release has made of `config`, its schema is refused."""
        engine = open_engine(newer)
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE config RENAME TO settings"))
        with pytest.raises(SchemaError, match="schema 9999, made by a newer release"):
            current(engine)

    OLDER = "has the old schema 0001 .* Run `python -m kkt_buffer upgrade PATH`"
    EMPTY = "has no schema .* Run `python -m kkt_buffer upgrade PATH`"

    @pytest.mark.parametrize(("fixture", "told"), [("newer", NEWER), ("older", OLDER), ("empty", EMPTY)])
    def test_operations(self, request, fixture, told):
        """No operation works on the schema of another release, be it the first one of a service."""
        path = request.getfixturevalue(fixture)
        before = everything(path)
        engine = create_buffer_engine(path)
        repository = ReceiptRepository(engine)
        for operation in [*OPERATIONS.values(), *OPERATIONS.values()]:
            with pytest.raises(SchemaError, match=told):
                operation(repository)
        engine.dispose()
        assert before == everything(path)

    def test_upgraded_meanwhile(self, older, open_engine):
        """A repository that was refused goes on as soon as somebody has upgraded."""
        repository = ReceiptRepository(open_engine(older))
        with pytest.raises(SchemaError, match=self.OLDER):
            a_receipt(repository)
        upgrade(open_engine(older))
        assert a_receipt(repository)

    def test_all_operations(self):
        """None was forgotten above, but for those which need no schema."""
        public = {name for name in dir(ReceiptRepository) if not name.startswith("_")}
        assert set(OPERATIONS) == public - {"backup", "in_transaction"}

    def test_not_now(self, older):
        """A service that was told not to upgrade says what to run, and leaves the file alone."""
        before = everything(older)
        with pytest.raises(SchemaError, match=self.OLDER):
            buffer.init_buffer_db(older, upgrade=False)
        assert before == everything(older)
        buffer.init_buffer_db(older)
        buffer.init_buffer_db(older, upgrade=False)
        buffer.close_buffer_db()

    def test_revisions(self):
        """The numbers of the files are Alembic's own revisions, in one line, the last of them its head."""
        from alembic.script import ScriptDirectory  # noqa: PLC0415

        scripts = ScriptDirectory(str(migrate.SCRIPTS))
        assert list(migrate.revisions()) == [script.revision for script in scripts.walk_revisions()][::-1]
        assert migrate.revisions()[-1] == scripts.get_current_head()


# What somebody may do to each kind of object, and what is said of it.
TAMPERED = {
    "a column less": ("ALTER TABLE dlq DROP COLUMN last_error", "table dlq lacks .*last_error TEXT"),
    "a table less": ("DROP TABLE buffer_counts", "table buffer_counts is missing"),
    "a check": (
        ("receipts", "retry_count >= 0", "retry_count >= -1"),
        r"table receipts lacks .*CHECK \(retry_count >= 0\)",
    ),
    "a default": (("receipts", "DEFAULT 0", "DEFAULT 1"), "table receipts lacks .*retry_count INTEGER DEFAULT 0"),
    "a foreign key": (
        ("dlq", "REFERENCES receipts (id)", "REFERENCES receipts (id) ON DELETE CASCADE"),
        r"table dlq lacks .*FOREIGN KEY\(original_receipt_id\)",
    ),
    "a trigger": (
        ("trg_guard_capacity", "'Buffer full'", "'full'"),
        "trigger trg_guard_capacity differs",
    ),
    "a trigger less": ("DROP TRIGGER trg_guard_undelivered", "trigger trg_guard_undelivered is missing"),
    "a view": (("v_buffer_status", "100.0", "10.0"), "view v_buffer_status differs"),
    "an index": (("idx_receipts_hlc", "hlc_logical_counter", "id"), "index idx_receipts_hlc differs"),
    "an index more": ("CREATE INDEX mine ON receipts (pos_id)", "index mine is not ours"),
    "a partial index": (
        ("idx_receipts_synced", "'synced'", "'failed'"),
        "index idx_receipts_synced differs",
    ),
    "an expression index": (
        ("idx_receipts_status", "COALESCE(hlc_server_time, hlc_local_time)", "hlc_local_time"),
        "index idx_receipts_status differs",
    ),
    "a unique index": (("idx_dlq_open", "UNIQUE ", ""), "index idx_dlq_open differs"),
}


class TestCheck:
    def test_clean(self, engine):
        check(engine)

    @pytest.fixture(params=TAMPERED)
    def tampered(self, request, path):
        """A buffer that is not as it should be, and how."""
        change, told = TAMPERED[request.param]
        with driver().connect(path) as db:
            if isinstance(change, str):
                db.execute(change)
            else:
                name, old, new = change
                db.execute("PRAGMA writable_schema = ON")
                changed = db.execute(
                    "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ? AND instr(sql, ?)",
                    (old, new, name, old),
                )
                assert changed.rowcount == 1
        db.close()
        return path, told

    def test_drift(self, tampered):
        """Every kind of object is compared, and what differs is named."""
        path, told = tampered
        engine = create_buffer_engine(path)
        with pytest.raises(SchemaError, match=f"not that of this release: the {told}"):
            check(engine)
        engine.dispose()

    def test_drift_by_alembic(self, tampered):
        """So does `alembic check`."""
        path, _ = tampered
        engine = create_buffer_engine(path)
        with pytest.raises(CommandError, match="New upgrade operations detected"):
            command.check(migrate._config(engine))
        engine.dispose()

    def test_of_others(self, path, file_engine):
        """Other tables, views, triggers and columns are not ours to judge, on our tables either."""
        with file_engine.begin() as connection:
            connection.execute(text("CREATE TABLE goods (id INTEGER PRIMARY KEY)"))
            connection.execute(text("CREATE INDEX idx_goods ON goods (id)"))
            connection.execute(text("CREATE VIEW v_shop AS SELECT pos_id FROM receipts"))
            connection.execute(text("CREATE TRIGGER shop AFTER INSERT ON receipts BEGIN SELECT 1; END"))
            connection.execute(text("ALTER TABLE receipts ADD COLUMN cashier TEXT"))
        check(file_engine)
        command.check(migrate._config(file_engine))

    def test_not_migrated(self, tmp_path, open_engine):
        with pytest.raises(SchemaError, match="has no schema .*python -m kkt_buffer upgrade PATH"):
            check(open_engine(tmp_path / "buffer.db"))

    def test_old(self, engine, monkeypatch):
        monkeypatch.setattr(migrate, "revisions", lambda: ("0001", HEAD, "9999"))
        with pytest.raises(SchemaError, match=r"has the old schema \d+ where this release needs 9999"):
            check(engine)


# A buffer as the release of 0001 left it: every status, dead letters open and closed, more than its capacity allows.
DOCUMENT = '{ "user" : "ООО \\"Ромашка\\"",  "totalSum":6490 }'
RECEIPT = f"""\
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, retry_count, last_error,
    changed_at) VALUES ('%s', 'till-1', {NOON}, {NOON}, %d, '{DOCUMENT}', %d, %s, %s)"""
SYNCED = f"UPDATE receipts SET status = 'synced', synced_at = {NOON + 9}, hlc_server_time = {NOON + 8} WHERE id = '%s'"
LETTER = f"""\
INSERT INTO dlq (id, original_receipt_id, failed_at, reason, fiscal_doc, retry_attempts, last_error)
    VALUES ('letter of %s', '%s', {NOON + 5}, 'rejected', '{DOCUMENT}', 2, 'no answer')"""
CLOSED = f"""\
UPDATE dlq SET resolved_at = {NOON + 9}, resolved_by = 'delivery', resolution_reason = 'the receipt was delivered'
    WHERE original_receipt_id = '%s'"""
ROWS_OF_0001 = [
    RECEIPT % ("pending", 0, 0, "NULL", "NULL"),
    RECEIPT % ("retried", 1, 3, "'no answer'", str(NOON + 3)),
    RECEIPT % ("syncing", 2, 1, "'no answer'", str(NOON + 1)),
    "UPDATE receipts SET status = 'syncing' WHERE id = 'syncing'",
    RECEIPT % ("synced", 3, 0, "NULL", "NULL"),
    SYNCED % "synced",
    RECEIPT % ("failed", 4, 2, "'no answer'", str(NOON + 5)),
    LETTER % ("failed", "failed"),
    "UPDATE receipts SET status = 'failed' WHERE id = 'failed'",
    RECEIPT % ("late", 5, 2, "'no answer'", str(NOON + 5)),
    LETTER % ("late", "late"),
    "UPDATE receipts SET status = 'failed' WHERE id = 'late'",
    CLOSED % "late",
    SYNCED % "late",
    f"INSERT INTO buffer_events (event_type, timestamp, metadata) VALUES ('circuit_opened', {NOON}, '{{\"n\": 5}}')",
    f"UPDATE config SET value = '2', updated_at = {NOON} WHERE key = 'buffer_capacity'",
    f"INSERT INTO config VALUES ('shop', 'Ромашка', {NOON})",
]
NEW_IN_RECEIPTS = ("next_attempt_at", "lease_token", "lease_taken_at", "lease_expires_at")


class TestLeases:
    """Revision 0002."""

    @pytest.fixture
    def empty(self, tmp_path):
        """A new buffer of the earlier release."""
        engine = create_buffer_engine(tmp_path / "old.db")
        command.upgrade(migrate._config(engine), "0001")
        yield engine
        engine.dispose()

    @pytest.fixture
    def old(self, empty):
        """A buffer of the earlier release in the middle of its work."""
        with empty.begin() as connection:
            for statement in ROWS_OF_0001:
                connection.exec_driver_sql(statement)
        return empty

    @pytest.fixture
    def letter(self, file_repository):
        """A receipt that was given up, in a buffer of this release."""
        return a_receipt(file_repository, "failed").id

    @staticmethod
    def downgrade(engine):
        command.downgrade(migrate._config(engine), "0001")

    @staticmethod
    def upgrade(engine):
        command.upgrade(migrate._config(engine), "0002")

    def test_all_statuses(self, old):
        """What the tests below start from."""
        statuses = {receipt_id: row["status"] for receipt_id, row in contents(old)["receipts"].items()}
        expected = {"pending": "pending", "retried": "pending", "late": "synced"}
        assert {status: status for status in ("syncing", "synced", "failed")} | expected == statuses
        assert ("0001", counted(old)) == (current(old), counts(old))

    def test_up(self, old):
        """Every row and value is kept, and what nobody has a lease on waits again."""
        expected = contents(old)
        self.upgrade(old)
        for row in expected["receipts"].values():
            row.update(dict.fromkeys(NEW_IN_RECEIPTS))
        expected["receipts"]["syncing"]["status"] = "pending"
        expected["dlq"]["letter of failed"]["resolution"] = None
        expected["dlq"]["letter of late"]["resolution"] = "delivered"
        expected["buffer_counts"]["pending"]["value"] += 1
        expected["buffer_counts"]["syncing"]["value"] -= 1
        expected["kkt_buffer_version"] = {"0002": {"version_num": "0002"}}
        assert expected == contents(old)
        assert counted(old) == counts(old)
        check(old)

    def test_up_and_on(self, old, clock):
        """The buffer goes on where it was: what waits leaves in its order, and an operator finds the dead letter."""
        upgrade(old)
        repository = ReceiptRepository(old, now=clock)
        assert ["pending", "retried", "syncing"] == [receipt.id for receipt in repository.claim_pending()]
        assert ["failed"] == [letter.original_receipt_id for letter in repository.list_dead_letters()]
        repository.set_config("buffer_capacity", 200)
        repository.requeue("failed", actor="Anna", reason="the tax table is right now")
        assert counted(old) == counts(old)

    def test_up_is_one_step(self, old):
        """An upgrade that fails on its way leaves every row and object as it was."""
        with old.begin() as connection:
            connection.execute(text("CREATE INDEX idx_receipts_synced ON receipts (synced_at, id)"))
        before = objects(old), contents(old)
        with pytest.raises(SchemaError, match="failed and was rolled back; .*idx_receipts_synced already exists"):
            upgrade(old)
        assert before == (objects(old), contents(old))

    @pytest.mark.parametrize("entry", [check, migrate.require])
    def test_required(self, old, entry):
        with pytest.raises(SchemaError, match=f"has the old schema 0001 where this release needs {HEAD}"):
            entry(old)

    def test_down(self, file_engine, file_repository, clock):
        """Every row is kept but for what the older schema has no word for; what is leased waits again."""
        for status in ("pending", "synced", "failed"):
            a_receipt(file_repository, status)
        file_repository.mark_synced(a_receipt(file_repository, "failed").id, NOON + 9)
        _, tried, leased = file_repository.insert_receipts([new_receipt() for _ in range(3)])
        clock.seconds += 1
        for receipt in file_repository.claim_pending():
            if receipt.id == tried:
                file_repository.record_failure(tried, "no answer", receipt.lease_token)
            elif receipt.id != leased:
                file_repository.release(receipt.id, receipt.lease_token)
        expected = contents(file_engine)
        assert expected["receipts"][tried]["next_attempt_at"]
        assert {"pending": 3, "syncing": 1, "synced": 2, "failed": 1, "open_dead_letters": 1} == counts(file_engine)

        self.downgrade(file_engine)
        for row in expected["receipts"].values():
            for column in NEW_IN_RECEIPTS:
                del row[column]
        expected["receipts"][leased]["status"] = "pending"
        for row in expected["dlq"].values():
            del row["resolution"]
        expected["buffer_counts"]["pending"]["value"] += 1
        expected["buffer_counts"]["syncing"]["value"] -= 1
        expected["kkt_buffer_version"] = {"0001": {"version_num": "0001"}}
        assert expected == contents(file_engine)
        assert counted(file_engine) == counts(file_engine)

    def refused_down(self, engine):
        before = objects(engine), contents(engine)
        refusal = "refusing to forget what became of 1 dead letters .* requeued or resolved. Nothing was changed"
        with pytest.raises(CommandError, match=refusal):
            self.downgrade(engine)
        assert before == (objects(engine), contents(engine))

    @pytest.mark.parametrize("operation", ["requeue", "resolve"])
    def test_down_after_an_operator(self, file_engine, file_repository, letter, operation):
        """The older schema would take what an operator decided for a delivery."""
        getattr(file_repository, operation)(letter, actor="Anna", reason="the goods came back")
        self.refused_down(file_engine)

    def test_down_after_another_program(self, file_engine, letter):
        """What another program closed without a word goes down and up as it is."""
        with file_engine.begin() as connection:
            connection.execute(text(f"UPDATE dlq SET resolved_at = {NOON + 9}, resolved_by = 'Ivan'"))
        self.downgrade(file_engine)
        upgrade(file_engine)
        with file_engine.connect() as connection:
            row = connection.execute(text("SELECT resolved_at, resolved_by, resolution FROM dlq")).one()
        assert (NOON + 9, "Ivan", None) == row

    def test_down_command(self, path, file_engine, file_repository, letter):
        """`alembic downgrade` says it in one line."""
        file_repository.resolve(letter, actor="Anna", reason="the goods came back")
        file_engine.dispose()
        done = alembic("-x", f"db={path}", "downgrade", "0001")
        assert done.returncode != 0
        assert "FAILED: refusing to forget what became of 1 dead letters" in done.stdout
        assert "Traceback" not in done.stdout

    def test_down_schema(self, empty, file_engine):
        """Going down arrives at the schema that the first migration makes."""
        self.downgrade(file_engine)
        assert objects(empty) == objects(file_engine)

    @pytest.mark.parametrize("buffer", ["empty", "old"])
    def test_up_down_up(self, buffer, engine, request):
        """Up, down and up again arrives at the same schema and the same rows, with data or without."""
        buffer = request.getfixturevalue(buffer)
        upgrade(buffer)
        expected = contents(buffer)
        self.downgrade(buffer)
        upgrade(buffer)
        assert objects(engine) == objects(buffer)
        assert expected == contents(buffer)
        check(buffer)


class TestRevision:
    """What `make migration` writes."""

    def test_numbered_and_written(self, tmp_path):
        """The next number, the rules, and what the models and `schema` differ in, triggers too."""
        copy = tmp_path / "copy"
        for folder in ("src", "migrations", ".ci"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "alembic.ini", copy)
        for name, old, new in (
            (
                "models.py",
                "    changed_at: Mapped[int | None]\n",
                "    changed_at: Mapped[int | None]\n    shade: Mapped[str | None]\n",
            ),
            ("sqlite/schema.py", "'Buffer full'", "'Buffer is full'"),
        ):
            file = copy / "src" / "kkt_buffer" / name
            before = file.read_text()
            assert before.count(old) >= 1
            file.write_text(before.replace(old, new))
        # Without the coverage of this process, which would look into the copy.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        environment["PYTHONPATH"] = str(copy / "src")
        done = subprocess.run(
            ["sh", ".ci/migration.sh", Path(sys.executable).parent, "Add the shade."],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (script,) = (copy / "migrations" / "versions").glob(f"{int(HEAD) + 1:04}_*.py")
        assert script.name.endswith("_add_the_shade.py")
        written = script.read_text()
        for expected in (
            f'down_revision = "{HEAD}"',
            "Rules of our migrations",
            '"shade"',
            "DROP TRIGGER trg_guard_capacity",
        ):
            assert expected in written
        path = tmp_path / "buffer.db"
        for step in (["upgrade", "head"], ["check"], ["downgrade", HEAD], ["upgrade", "head"], ["check"]):
            done = subprocess.run(
                [*ALEMBIC, "-x", f"db={path}", *step],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr

    def test_needs_words(self):
        # Not through make, which would first renew the environment that runs this test.
        command = ["sh", ".ci/migration.sh", Path(sys.executable).parent, ""]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "make migration m=" in done.stderr
        assert done.returncode != 0


class TestAlembic:
    def test_up_check_down(self, tmp_path):
        """The three commands work in a checkout, make the folder, and leave nothing of ours behind."""
        path = tmp_path / "shop" / "buffer.db"
        for step in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
            done = alembic("-x", f"db={path}", *step)
            assert done.returncode == 0, done.stdout
            assert "Warning" not in done.stdout
        assert not [line for line in everything(path) if "receipt" in line]

    def test_which_database(self, tmp_path):
        """`-x db=` comes first, then BUFFER_DB_PATH, then alembic.ini."""
        (tmp_path / "alembic.ini").write_text((ROOT / "alembic.ini").read_text().replace("%(here)s", str(ROOT)))
        expected = tmp_path / "x.db", tmp_path / "environment.db", tmp_path / "data" / "buffer.db"
        alembic("-x", f"db={expected[0]}", "upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH=str(expected[1]))
        assert [True, False, False] == [path.exists() for path in expected]
        alembic("upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH=str(expected[1]))
        assert [True, True, False] == [path.exists() for path in expected]
        alembic("upgrade", "head", cwd=tmp_path, BUFFER_DB_PATH="")
        assert [True, True, True] == [path.exists() for path in expected]

    def test_url(self, tmp_path):
        assert alembic("-x", f"db=sqlite:///{tmp_path}/buffer.db", "upgrade", "head").returncode == 0
        assert (tmp_path / "buffer.db").exists()

    @pytest.mark.parametrize("target", ["{folder}", "postgresql://localhost/shop"])
    def test_refused(self, tmp_path, target):
        """A target that cannot be used is told in one line."""
        done = alembic("-x", f"db={target.format(folder=tmp_path)}", "upgrade", "head")
        assert done.returncode != 0
        assert "Traceback" not in done.stdout
        assert re.search(r"(FAILED:|ERROR) .*(is a folder|expected a path)", done.stdout)

    def test_offline(self, tmp_path):
        """A script of SQL would not be one transaction: refused."""
        done = alembic("-x", f"db={tmp_path}/buffer.db", "upgrade", "head", "--sql")
        assert "FAILED: a script of SQL cannot migrate SQLite safely" in done.stdout

    @pytest.mark.parametrize("status", ["pending", "synced", "failed"])
    def test_downgrade_with_receipts(self, path, status):
        """A buffer that holds receipts is not taken away."""
        engine = create_buffer_engine(path)
        a_receipt(ReceiptRepository(engine), status)
        engine.dispose()
        before = everything(path)
        done = alembic("-x", f"db={path}", "downgrade", "base")
        assert "refusing to drop the buffer: it holds 1 receipts. Nothing was changed" in done.stdout
        assert before == everything(path)

    def test_up_down_up(self, path):
        """Going down and up again arrives at the same schema."""
        before = schema(path)
        for step in (["downgrade", "base"], ["upgrade", "head"]):
            assert alembic("-x", f"db={path}", *step).returncode == 0
        assert before == schema(path)


def test_broken_references_are_refused(tmp_path, monkeypatch, open_engine):
    """A migration that would break a reference is rolled back."""
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    (versions.parent / "env.py").write_text((migrate.SCRIPTS / "env.py").read_text())
    (versions / "0001_bad.py").write_text(
        """
from alembic import op
revision, down_revision = "0001", None
def upgrade():
    op.execute("CREATE TABLE child (id INTEGER REFERENCES parent (id))")
    op.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    op.execute("INSERT INTO child VALUES (1)")
"""
    )
    monkeypatch.setattr(migrate, "SCRIPTS", tmp_path / "migrations")
    engine = open_engine(tmp_path / "buffer.db")
    with pytest.raises(SchemaError, match="failed and was rolled back; .*the migration would break foreign keys"):
        upgrade(engine)
    assert inspect(engine).get_table_names() == []
