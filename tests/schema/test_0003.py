"""Revision 0003: held receipts, digests, small indexes, the state of the buffer in one row."""

import hashlib

import predecessor
import pytest
from alembic.util import CommandError
from builders import NOON, a_receipt, new_receipt
from predecessor import receipt, run
from schema.helpers import (
    contents,
    downgrade_to,
    fill_0001,
    objects,
    state,
    state_of_rows,
    upgrade_to,
)
from sqlalchemy import text

from kkt_buffer import ReceiptRepository, check, upgrade

NEW_IN_RECEIPTS = ("held_at", "digest", "inserted_digest")
HOLD = f"""\
INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, held_at)
VALUES ('held', 'till-1', {NOON}, {NOON}, 9, '{{}}', {NOON})"""


def digest(document):
    return hashlib.sha256(document.encode()).hexdigest()


def of_0001(path, opened):
    engine = opened(path)
    upgrade_to(engine, "0001")
    fill_0001(engine)
    return engine


def of_0002(path, opened):
    """One with receipts of every status, leased ones too."""
    engine = opened(path)
    upgrade(engine)
    repository = ReceiptRepository(engine, now=lambda: NOON)
    for status in ("pending", "syncing", "synced", "failed") * 2:
        a_receipt(repository, status)
    repository.mark_synced(a_receipt(repository, "failed").id, NOON + 9)
    downgrade_to(engine, "0002")
    return engine


def of_the_predecessor(path, opened):
    return opened(predecessor.make(path, 200))


def empty(path, opened):
    return opened(path)


BUFFERS = [empty, of_0001, of_0002, of_the_predecessor]


@pytest.fixture(params=BUFFERS, ids=lambda make: make.__name__)
def buffer(request, tmp_path, opened):
    """A file of each earlier release."""
    return request.param(tmp_path / "buffer.db", opened)


class TestUp:
    def test_state(self, buffer):
        """The state is that of the rows, wherever they come from."""
        upgrade(buffer)
        check(buffer)
        assert state_of_rows(buffer) == state(buffer)

    def test_rows(self, tmp_path, opened):
        """Every row and value is kept."""
        engine = of_0002(tmp_path / "buffer.db", opened)
        expected = contents(engine)
        upgrade_to(engine, "0003")
        for row in expected["receipts"].values():
            row.update(dict.fromkeys(NEW_IN_RECEIPTS))
            if row["status"] != "synced":
                row["digest"] = digest(row["fiscal_doc"])
        del expected["buffer_counts"]
        found = contents(engine)
        assert state_of_rows(engine) == found.pop("buffer_state")[1]
        expected["config"]["lease_seconds"]["value"] = "60"
        expected["kkt_buffer_version"] = {"0003": {"version_num": "0003"}}
        assert expected == found

    def test_digests(self, buffer):
        """What is not synced has a digest, and every receipt is intact."""
        upgrade(buffer)
        for row in contents(buffer)["receipts"].values():
            expected = None if row["status"] == "synced" else digest(row["fiscal_doc"])
            assert expected == row["digest"]
        assert all(found.is_intact for found in ReceiptRepository(buffer).get_pending_receipts())

    def test_stray_bytes(self, tmp_path, opened):
        """The digest of a damaged text is that of its bytes; it does not stop the upgrade."""
        engine = of_0001(tmp_path / "buffer.db", opened)
        with engine.begin() as connection:
            connection.execute(text("UPDATE receipts SET fiscal_doc = CAST(X'CFF0' AS TEXT) WHERE id = 'pending'"))
        upgrade(engine)
        with engine.connect() as connection:
            found = connection.scalar(text("SELECT digest FROM receipts WHERE id = 'pending'"))
        assert hashlib.sha256(b"\xcf\xf0").hexdigest() == found

    def test_stamps_that_are_no_numbers(self, tmp_path, opened):
        """Of the timestamps that another program has stored as text, none becomes the greatest."""
        engine = of_0001(tmp_path / "buffer.db", opened)
        with engine.begin() as connection:
            connection.execute(text("UPDATE receipts SET hlc_local_time = 'soon' WHERE id = 'pending'"))
            connection.execute(text("UPDATE receipts SET hlc_logical_counter = 'last' WHERE id = 'retried'"))
            connection.execute(text("UPDATE receipts SET synced_at = 'once' WHERE id = 'late'"))
        upgrade(engine)
        found = state(engine)
        assert (NOON, 5, NOON + 9) == (found["hlc_local_time"], found["hlc_logical_counter"], found["last_synced_at"])

    def test_greatest_stamp(self, old, opened):
        """The counter is that of the greatest pair, not the greatest counter."""
        run(old, receipt(hlc_logical_counter=7), receipt(id="s", hlc_local_time=NOON + 1))
        engine = opened(old)
        upgrade(engine)
        found = state(engine)
        assert (NOON + 1, 0) == (found["hlc_local_time"], found["hlc_logical_counter"])

    def test_lease(self, buffer):
        """The default changes where nobody has changed the setting."""
        upgrade(buffer)
        assert "60" == contents(buffer)["config"]["lease_seconds"]["value"]

    @pytest.mark.parametrize(("value", "updated_at"), [("120", "updated_at"), ("300", "updated_at + 60")])
    def test_own_lease(self, tmp_path, opened, value, updated_at):
        """A value that somebody chose stays, be it the old default, up and down."""
        engine = of_0001(tmp_path / "buffer.db", opened)
        with engine.begin() as connection:
            change = f"UPDATE config SET value = '{value}', updated_at = {updated_at} WHERE key = 'lease_seconds'"
            connection.exec_driver_sql(change)
        upgrade(engine)
        assert value == contents(engine)["config"]["lease_seconds"]["value"]
        downgrade_to(engine, "0002")
        assert value == contents(engine)["config"]["lease_seconds"]["value"]

    def test_neighbours(self, tmp_path, opened):
        """A trigger, a view and a column of the shop on our tables do not stand in the way."""
        engine = of_0001(tmp_path / "buffer.db", opened)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE receipts ADD COLUMN cashier TEXT DEFAULT 'Анна'")
            connection.exec_driver_sql("CREATE VIEW v_shop AS SELECT pos_id, status FROM receipts")
            connection.exec_driver_sql("CREATE TRIGGER shop AFTER INSERT ON receipts BEGIN SELECT 1; END")
        for _ in range(2):
            upgrade(engine)
            check(engine)
            downgrade_to(engine, "0002")
        assert {"v_shop", "shop"} <= objects(engine).keys()
        assert {"Анна"} == {row["cashier"] for row in contents(engine)["receipts"].values()}


class TestDown:
    def test_schema(self, tmp_path, opened, file_engine):
        """Going down arrives at the schema of 0002."""
        expected = opened(tmp_path / "expected.db")
        upgrade_to(expected, "0002")
        downgrade_to(file_engine, "0002")
        assert objects(expected) == objects(file_engine)
        assert {key: row["value"] for key, row in contents(expected)["config"].items()} == {
            key: row["value"] for key, row in contents(file_engine)["config"].items()
        }

    def test_rows(self, file_engine, file_repository):
        """Every row is kept but for what the older schema has no column for; the counts are those of the rows."""
        for status in ("pending", "syncing", "synced", "failed"):
            a_receipt(file_repository, status)
        expected = contents(file_engine)
        downgrade_to(file_engine, "0002")
        for row in expected["receipts"].values():
            for column in NEW_IN_RECEIPTS:
                del row[column]
        del expected["buffer_state"]
        counts = {"pending": 1, "syncing": 1, "synced": 1, "failed": 1, "open_dead_letters": 1}
        expected["buffer_counts"] = {name: {"name": name, "value": value} for name, value in counts.items()}
        expected["config"]["lease_seconds"]["value"] = "300"
        expected["kkt_buffer_version"] = {"0002": {"version_num": "0002"}}
        assert expected == contents(file_engine)

    @pytest.mark.parametrize("status", ["pending", "failed"])
    def test_held(self, file_engine, status):
        """The older release would deliver what is not printed yet."""
        with file_engine.begin() as connection:
            connection.exec_driver_sql(HOLD)
            if status == "failed":
                connection.exec_driver_sql(
                    f"INSERT INTO dlq (id, original_receipt_id, failed_at, reason, fiscal_doc, retry_attempts)"
                    f" VALUES ('l', 'held', {NOON}, 'no', '{{}}', 0)"
                )
                connection.exec_driver_sql("UPDATE receipts SET status = 'failed'")
        before = objects(file_engine), contents(file_engine)
        with pytest.raises(CommandError, match="refusing to forget that 1 receipts are held: .* Nothing was changed"):
            downgrade_to(file_engine, "0002")
        assert before == (objects(file_engine), contents(file_engine))
        with file_engine.begin() as connection:
            connection.exec_driver_sql("UPDATE receipts SET held_at = NULL")
        downgrade_to(file_engine, "0002")

    def test_discarded(self, file_engine, file_repository):
        """A held receipt that was discarded is never delivered: it does not stand in the way."""
        receipt_id = file_repository.insert_receipt(new_receipt(), hold=True)
        file_repository.discard_held(receipt_id, actor="Anna", reason="not printed")
        downgrade_to(file_engine, "0002")

    def test_works(self, file_engine, file_repository):
        """The capacity is guarded and the counts are kept there, as before."""
        file_repository.set_config("buffer_capacity", 2)
        a_receipt(file_repository)
        downgrade_to(file_engine, "0002")
        add = "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc) VALUES"
        with file_engine.begin() as connection:
            connection.exec_driver_sql(f"{add} ('a', 't', {NOON}, {NOON}, 1, '{{}}')")
            with pytest.raises(Exception, match="Buffer full"):
                connection.exec_driver_sql(f"{add} ('b', 't', {NOON}, {NOON}, 2, '{{}}')")
        assert 2 == contents(file_engine)["buffer_counts"]["pending"]["value"]


def test_up_down_up(buffer, memory_engine):
    """Up, down and up again arrives at the same schema and the same rows, with data or without."""
    upgrade(buffer)
    schema, expected = objects(buffer), contents(buffer)
    downgrade_to(buffer, "0002")
    upgrade(buffer)
    assert (schema, expected) == (objects(buffer), contents(buffer))
    check(buffer)
    assert objects(memory_engine).items() <= schema.items()


def test_goes_on(buffer):
    """The buffer goes on where it was: the next timestamp is above all that are there."""
    upgrade(buffer)
    greatest = state_of_rows(buffer)
    repository = ReceiptRepository(buffer, now=lambda: NOON)
    repository.set_config("buffer_capacity", 1000)
    new = repository.get_receipt_by_id(repository.insert_receipt(new_receipt()))
    stamp = (new.hlc_local_time, new.hlc_logical_counter)
    assert stamp > (greatest["hlc_local_time"], greatest["hlc_logical_counter"])
    assert state_of_rows(buffer) == state(buffer)
