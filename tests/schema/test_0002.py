"""Revision 0002: leases, backoff, and how a dead letter was closed."""

import pytest
from alembic.util import CommandError
from builders import NOON, a_receipt, new_receipt
from schema.helpers import HEAD, alembic, contents, downgrade_to, fill_0001, objects, state, state_of_rows, upgrade_to
from sqlalchemy import text

from kkt_buffer import (
    ReceiptRepository,
    SchemaError,
    check,
    current,
    migrate,
    upgrade,
)

NEW_IN_RECEIPTS = ("next_attempt_at", "lease_token", "lease_taken_at", "lease_expires_at")


def counted(engine):
    """What `buffer_counts` should hold, counted row by row."""
    with engine.connect() as connection:
        statuses = dict(list(connection.execute(text("SELECT status, COUNT(*) FROM receipts GROUP BY status"))))
        open_letters = connection.scalar(text("SELECT COUNT(*) FROM dlq WHERE resolved_at IS NULL"))
    return {"pending": 0, "syncing": 0, "synced": 0, "failed": 0} | statuses | {"open_dead_letters": open_letters}


def counts(engine):
    return {name: row["value"] for name, row in contents(engine)["buffer_counts"].items()}


class TestLeases:
    @pytest.fixture
    def empty(self, tmp_path, opened):
        """A new buffer of the earlier release."""
        engine = opened(tmp_path / "old.db")
        upgrade_to(engine, "0001")
        yield engine
        engine.dispose()

    @pytest.fixture
    def old(self, empty):
        """A buffer of the earlier release in the middle of its work."""
        fill_0001(empty)
        return empty

    @pytest.fixture
    def letter(self, file_repository):
        """A receipt that was dead-lettered, in a buffer of this release."""
        return a_receipt(file_repository, "failed").id

    def test_all_statuses(self, old):
        """What the tests below start from."""
        statuses = {receipt_id: row["status"] for receipt_id, row in contents(old)["receipts"].items()}
        expected = {"pending": "pending", "retried": "pending", "late": "synced"}
        assert {status: status for status in ("syncing", "synced", "failed")} | expected == statuses
        assert ("0001", counted(old)) == (current(old), counts(old))

    def test_up(self, old):
        """Every row and value is kept, and what nobody has a lease on waits again."""
        expected = contents(old)
        upgrade_to(old, "0002")
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

    def test_up_and_on(self, old, clock):
        """The buffer goes on where it was: what waits leaves in its order, and an operator finds the dead letter."""
        upgrade(old)
        repository = ReceiptRepository(old, now=clock)
        assert ["pending", "retried", "syncing"] == [receipt.id for receipt in repository.claim_pending()]
        assert ["failed"] == [letter.original_receipt_id for letter in repository.list_dead_letters()]
        repository.set_config("buffer_capacity", 200)
        repository.requeue("failed", actor="Anna", reason="the tax table is right now")
        assert state_of_rows(old) == state(old)

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
        with pytest.raises(SchemaError, match=f"has the old schema 0001 where this release needs schema {HEAD}"):
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
        downgrade_to(file_engine, "0002")
        expected = contents(file_engine)
        assert expected["receipts"][tried]["next_attempt_at"]
        assert {"pending": 3, "syncing": 1, "synced": 2, "failed": 1, "open_dead_letters": 1} == counts(file_engine)

        downgrade_to(file_engine, "0001")
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
        downgrade_to(engine, "0002")
        before = objects(engine), contents(engine)
        refusal = "refusing to forget the resolution of 1 dead letters .* requeued or resolved. Nothing was changed"
        with pytest.raises(CommandError, match=refusal):
            downgrade_to(engine, "0001")
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
        downgrade_to(file_engine, "0001")
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
        assert "FAILED: refusing to forget the resolution of 1 dead letters" in done.stdout
        assert "Traceback" not in done.stdout

    def test_down_schema(self, empty, file_engine):
        """Going down arrives at the schema that revision 0001 makes."""
        downgrade_to(file_engine, "0001")
        assert objects(empty) == objects(file_engine)

    @pytest.mark.parametrize("buffer", ["empty", "old"])
    def test_up_down_up(self, buffer, memory_engine, request):
        """Up, down and up again arrives at the same schema and the same rows, with data or without."""
        buffer = request.getfixturevalue(buffer)
        upgrade(buffer)
        expected = contents(buffer)
        downgrade_to(buffer, "0001")
        upgrade(buffer)
        assert objects(memory_engine) == objects(buffer)
        assert expected == contents(buffer)
        check(buffer)
