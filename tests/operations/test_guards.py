"""What the database itself refuses and does, whoever writes: no operation of ours is needed for it."""

import pytest
from builders import NOON, STATUSES, a_foreign_receipt, a_receipt, drop_trigger, snapshot, story
from sqlalchemy import text
from sqlalchemy.orm import Session

from kkt_buffer import AcknowledgedReceiptError, Receipt

A_LETTER = "INSERT INTO dlq (id, original_receipt_id, failed_at, reason, fiscal_doc, retry_attempts)"


class TestGuards:
    """What the database itself refuses, whoever asks."""

    @pytest.mark.parametrize(
        ("status", "statement", "message"),
        [
            ("pending", "DELETE FROM receipts", "an undelivered receipt cannot be deleted"),
            ("syncing", "DELETE FROM receipts", "an undelivered receipt cannot be deleted"),
            ("pending", "UPDATE receipts SET status = 'failed'", "a receipt fails through its dead letter"),
            ("failed", "UPDATE receipts SET status = 'pending'", "a failed receipt has an open dead letter"),
            ("failed", "DELETE FROM receipts", "(?i)foreign key"),
            ("pending", "UPDATE receipts SET status = 'done'", "ck_receipts_status"),
            ("pending", "UPDATE receipts SET status = 'synced'", "ck_receipts_synced"),
            ("pending", "UPDATE receipts SET synced_at = 1", "ck_receipts_synced"),
            ("synced", "UPDATE receipts SET hlc_server_time = NULL", "ck_receipts_synced"),
            ("pending", "UPDATE receipts SET status = 'syncing'", "ck_receipts_lease"),
            ("pending", "UPDATE receipts SET lease_token = 'x'", "ck_receipts_lease"),
            ("syncing", "UPDATE receipts SET lease_expires_at = NULL", "ck_receipts_lease"),
            ("pending", "UPDATE receipts SET retry_count = -1", "ck_receipts_retry_count"),
            ("failed", "UPDATE dlq SET resolved_at = 1", "ck_dlq_resolved"),
            ("failed",
             f"{A_LETTER} SELECT 'x', original_receipt_id, 1, 'r', '{{}}', 0 FROM dlq",
             "a synced or failed receipt cannot be dead-lettered"),
            ("synced", f"{A_LETTER} SELECT 'x', id, 1, 'r', '{{}}', 0 FROM receipts",
             "a synced or failed receipt cannot be dead-lettered"),
        ],
    )  # fmt: skip
    def test_refused(self, repository, engine, status, statement, message):
        a_receipt(repository, status)
        before = snapshot(engine)
        with pytest.raises(Exception, match=message), engine.begin() as connection:
            connection.execute(text(statement))
        assert before == snapshot(engine)

    @pytest.mark.parametrize("status", STATUSES)
    @pytest.mark.parametrize(
        "change",
        [
            "id = 'another'",
            "pos_id = 'till-2'",
            "created_at = 1",
            "hlc_local_time = hlc_local_time + 1",
            "hlc_logical_counter = 7",
            "fiscal_doc = '{}'",
            "digest = NULL",
            "inserted_digest = 'x'",
        ],
    )
    def test_acknowledged(self, repository, engine, status, change):
        """What was acknowledged of a receipt does not change, and the file is not called damaged for the attempt."""
        a_receipt(repository, status)
        before = snapshot(engine)
        with pytest.raises(AcknowledgedReceiptError), engine.begin() as connection:
            connection.execute(text(f"UPDATE receipts SET {change}"))
        assert before == snapshot(engine)

    def test_acknowledged_through_orm(self, repository, engine):
        """Nor does it through the ORM, in a session of the service's own or in that of `transaction()`."""
        receipt = a_receipt(repository)
        before = snapshot(engine)
        with Session(engine) as session:
            session.get(Receipt, receipt.id).fiscal_doc = "{}"
            with pytest.raises(AcknowledgedReceiptError):
                session.commit()
        with pytest.raises(AcknowledgedReceiptError), repository.transaction() as session:
            session.get(Receipt, receipt.id).fiscal_doc = "{}"
        assert before == snapshot(engine)

    def test_acknowledged_while_held(self, repository, engine):
        """Of a held receipt only the document may change, with its digests."""
        a_foreign_receipt(engine, "held", held_at=NOON)
        for change in ("id = 'another'", "pos_id = 'till-2'", "created_at = 1", "hlc_local_time = 6"):
            with pytest.raises(AcknowledgedReceiptError), engine.begin() as connection:
                connection.execute(text(f"UPDATE receipts SET {change}"))
        with engine.begin() as connection:
            connection.execute(text("UPDATE receipts SET fiscal_doc = '{ }', digest = 'd', inserted_digest = 'i'"))
        assert repository.get_receipt_by_id("held").fiscal_doc == "{ }"

    def test_counter_without_its_guard(self, repository, engine):
        """A logical counter is never negative, even where somebody has dropped the guard."""
        a_receipt(repository)
        with engine.begin() as connection:
            drop_trigger(connection, "trg_guard_acknowledged")
        with pytest.raises(Exception, match="ck_receipts_hlc_logical_counter"), engine.begin() as connection:
            connection.execute(text("UPDATE receipts SET hlc_logical_counter = -1"))

    def test_first_schema_insert(self, repository, engine):
        """The plain INSERT of the first schema still works, and is counted, told and limited like any other."""
        repository.set_config("buffer_capacity", 1)
        a_foreign_receipt(engine, "receipt-1")
        assert repository.get_receipt_by_id("receipt-1").status == "pending"
        assert story(repository, "receipt-1") == ["receipt_added"]
        with pytest.raises(Exception, match="Buffer full"):
            a_foreign_receipt(engine, "receipt-2")

    def test_counts_follow(self, repository, engine):
        """The counters follow every way in which rows come, change and go."""
        for status in STATUSES:
            a_receipt(repository, status)
        with engine.begin() as connection:
            connection.execute(text("UPDATE dlq SET resolved_at = 1, resolved_by = 'Anna'"))
            connection.execute(text("UPDATE dlq SET resolved_at = NULL, resolved_by = NULL"))
            connection.execute(text("DELETE FROM receipts WHERE status = 'synced'"))
            connection.execute(text("DELETE FROM dlq"))
        status = repository.get_buffer_status()
        assert (1, 1, 0, 1, 0) == (status.pending, status.syncing, status.synced, status.failed, status.dlq_size)

    def test_changed_at_missing(self, repository, engine):
        """A program that does not know `changed_at` still gets its event dated."""
        a_receipt(repository)
        with engine.begin() as connection:
            connection.execute(text("UPDATE receipts SET retry_count = retry_count + 1"))
        assert repository.get_events(1)[0].timestamp > NOON
