"""What SQLite refuses of the operations' own statements is told as damage; what a service's trigger raises is not."""

import pytest
from builders import NOON, a_receipt, another_program, new_receipt
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from kkt_buffer import BufferDamagedError, ReceiptRepository, SchemaError


def run(engine, *statements):
    """What somebody does to the file by hand."""
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


WRITING = {
    "insert_receipt": lambda repository, _: repository.insert_receipt(new_receipt()),
    "insert_receipts": lambda repository, _: repository.insert_receipts([new_receipt()]),
    "mark_synced": lambda repository, receipt_id: repository.mark_synced(receipt_id, NOON),
    "claim_pending": lambda repository, _: repository.claim_pending(),
    "move_to_dlq": lambda repository, receipt_id: repository.move_to_dlq(receipt_id, "a reason"),
}


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("inside", [False, True])
class TestSchema:
    def test_missing_column(self, repository, engine, name, inside):
        """A trigger that speaks of a column which is not there: the schema is wrong, not the caller."""
        receipt_id = a_receipt(repository).id
        run(
            engine,
            "CREATE TRIGGER broken AFTER INSERT ON buffer_events BEGIN SELECT nonsense FROM receipts; END",
            "CREATE TRIGGER broken_update AFTER UPDATE ON receipts BEGIN SELECT nonsense FROM receipts; END",
        )
        with pytest.raises(SchemaError, match=r"not that of this release \(no such column: nonsense\)"):
            self.call(repository, WRITING[name], receipt_id, inside=inside)
        assert [receipt_id] == [receipt.id for receipt in repository.get_pending_receipts()]

    def test_own_trigger(self, repository, engine, name, inside):
        """What a trigger of the service's own raises is the service's to understand."""
        receipt_id = a_receipt(repository).id
        body = "BEGIN SELECT RAISE(ABORT, 'this till is closed'); END"
        run(
            engine,
            f"CREATE TRIGGER own_insert BEFORE INSERT ON receipts {body}",
            f"CREATE TRIGGER own_update BEFORE UPDATE ON receipts {body}",
        )
        with pytest.raises(IntegrityError, match="this till is closed"):
            self.call(repository, WRITING[name], receipt_id, inside=inside)
        assert [receipt_id] == [receipt.id for receipt in repository.get_pending_receipts()]

    @staticmethod
    def call(repository, operation, receipt_id, *, inside):
        if inside:
            with repository.transaction():
                operation(repository, receipt_id)
        else:
            operation(repository, receipt_id)


def test_missing_table(repository, engine):
    """A table of ours that somebody has dropped."""
    run(engine, "DROP TABLE dlq")
    with pytest.raises(SchemaError, match=r"not that of this release \(no such table: dlq\).* restore a backup"):
        repository.list_dead_letters()


class TestRows:
    def test_contradiction(self, repository, engine):
        """A receipt whose row breaks a rule of the tables."""
        receipt_id = a_receipt(repository).id
        run(
            engine,
            "PRAGMA ignore_check_constraints = ON",
            f"UPDATE receipts SET synced_at = 1 WHERE id = '{receipt_id}'",
            "PRAGMA ignore_check_constraints = OFF",
        )
        with pytest.raises(BufferDamagedError, match=r"contradict each other \(CHECK constraint failed"):
            repository.claim_pending()

    def test_counts(self, repository, engine):
        """A buffer that counts itself full and is not."""
        run(engine, "UPDATE buffer_state SET synced = 300")
        run(engine, "CREATE TRIGGER own BEFORE INSERT ON receipts BEGIN SELECT RAISE(ABORT, 'Buffer full'); END")
        for operation in (WRITING["insert_receipt"], WRITING["insert_receipts"]):
            with pytest.raises(BufferDamagedError, match=r"contradict each other \(Buffer full\)"):
                operation(repository, None)

    def test_time(self, repository, engine):
        """A time that is none, where the status is computed from it."""
        a_receipt(repository)
        run(engine, "DROP TRIGGER trg_guard_acknowledged", "UPDATE receipts SET created_at = 'yesterday'")
        with pytest.raises(BufferDamagedError, match="the oldest receipt was made at 'yesterday': the file is damaged"):
            repository.get_buffer_status()

    def test_no_key(self, file_engine, path, caplog):
        """A row without a key keeps nobody else from being delivered."""
        repository = ReceiptRepository(file_engine)
        receipt_id = a_receipt(repository).id
        a_receipt(repository)
        file_engine.dispose()
        with another_program(path) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'id TEXT NOT NULL', 'id TEXT')")
        with another_program(path) as connection:
            connection.execute("DROP TRIGGER trg_guard_acknowledged")
            connection.execute("UPDATE receipts SET id = NULL WHERE id <> ?", (receipt_id,))
        assert [receipt_id] == [receipt.id for receipt in repository.get_pending_receipts()]
        assert "a row has no primary key" in caplog.text

    def test_text(self, file_engine):
        """A setting that is not UTF-8, read on the driver."""
        repository = ReceiptRepository(file_engine)
        with file_engine.begin() as connection:
            connection.execute(text("UPDATE config SET value = CAST(X'32f1' AS TEXT) WHERE key = 'buffer_capacity'"))
        with pytest.raises(BufferDamagedError, match="text that is not UTF-8"):
            repository.get_buffer_status()


def test_stray_bytes(repository, caplog):
    """One stray byte in one document does not keep the others from being delivered."""
    for _ in range(3):
        repository.insert_receipt(new_receipt())
    with repository.transaction() as session:
        session.execute(text("DROP TRIGGER trg_guard_acknowledged"))
        session.execute(text("UPDATE receipts SET fiscal_doc = CAST(X'7B22CF' AS TEXT) WHERE rowid = 2"))
    claimed = repository.claim_pending()
    assert ['{"\\xcf'] == [found.fiscal_doc for found in claimed][1:2]
    assert len(claimed) == 3
    assert "contains text that is not UTF-8" in caplog.text
