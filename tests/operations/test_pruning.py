"""What may be deleted when, and what never."""

import pytest
from builders import NOON, a_receipt, new_receipt
from sqlalchemy import text

from kkt_buffer import PruneReport, ReceiptRepository

DAY = 86_400
BY_ANNA = {"actor": "Anna", "reason": "a test receipt"}


def left(engine, table="receipts"):
    with engine.connect() as connection:
        return connection.scalar(text(f"SELECT COUNT(*) FROM {table}"))


class TestReceipts:
    def test_retention(self, repository, clock):
        """Synced receipts go when they were synced `retention_synced_days` ago, to the second."""
        receipt = a_receipt(repository, "synced")
        clock.seconds = NOON + 7 * DAY - 1
        assert repository.prune().receipts == 0
        clock.seconds += 1
        assert repository.prune() == PruneReport(receipts=1, dead_letters=0, events=0, kept_receipts=0)
        assert repository.get_receipt_by_id(receipt.id) is None
        assert repository.get_buffer_status().total_receipts == 0

    @pytest.mark.parametrize("status", ["pending", "syncing", "failed"])
    def test_never(self, repository, clock, status):
        """What the OFD does not have is never deleted."""
        receipt = a_receipt(repository, status)
        for key in ("retention_synced_days", "retention_dlq_days", "retention_events_days"):
            repository.set_config(key, 0)
        clock.seconds += 10_000 * DAY
        report = repository.prune()
        assert (0, 0) == (report.receipts, report.dead_letters)
        assert repository.get_receipt_by_id(receipt.id).status == status

    def test_clock_goes_on(self, repository, clock):
        """Every receipt was pruned and the wall clock was set back: the next timestamp is above theirs all the same."""
        for _ in range(3):
            a_receipt(repository, "synced")
        clock.seconds += 100 * DAY
        report = repository.prune()
        assert (3, 0) == (report.receipts, report.kept_receipts)
        clock.seconds = NOON - DAY
        receipt = a_receipt(repository)
        assert (NOON, 3) == (receipt.hlc_local_time, receipt.hlc_logical_counter)

    def test_referred_by_others(self, repository, engine, clock):
        """A receipt that a row of another table refers to stays until that row is gone, whatever it would cascade."""
        kept, gone = a_receipt(repository, "synced"), a_receipt(repository, "synced")
        with engine.begin() as connection:
            connection.execute(
                text('CREATE TABLE "cash: ""1""" (n INTEGER, "the receipt" TEXT REFERENCES receipts ON DELETE CASCADE)')
            )
            connection.execute(text('INSERT INTO "cash: ""1""" VALUES (1, :id)').bindparams(id=kept.id))
        clock.seconds += 8 * DAY
        report = repository.prune()
        assert (1, 1) == (report.receipts, report.kept_receipts)
        assert repository.get_receipt_by_id(gone.id) is None
        with engine.begin() as connection:
            connection.execute(text('DELETE FROM "cash: ""1"""'))
        assert repository.prune().receipts == 1

    def test_dead_letter_first(self, repository, clock):
        """A synced receipt that had been dead-lettered stays as long as its dead letter."""
        a_receipt(repository, "failed")
        repository.mark_synced(repository.list_dead_letters()[0].original_receipt_id, NOON)
        clock.seconds = NOON + 8 * DAY
        assert repository.prune() == PruneReport(receipts=0, dead_letters=0, events=0, kept_receipts=1)
        clock.seconds = NOON + 90 * DAY
        report = repository.prune()
        assert (1, 1, 0) == (report.receipts, report.dead_letters, report.kept_receipts)

    def test_many(self, repository, clock):
        """More than one batch."""
        repository.set_config("buffer_capacity", 10_000)
        for receipt_id in repository.insert_receipts(new_receipt() for _ in range(250)):
            repository.mark_synced(receipt_id, NOON)
        clock.seconds += 8 * DAY
        assert repository.prune().receipts == 250


class TestDeadLetters:
    def test_resolved(self, repository, clock, engine):
        """A resolved receipt leaves with its last dead letter."""
        receipt = a_receipt(repository, "failed")
        repository.requeue(receipt.id, **BY_ANNA)
        repository.move_to_dlq(receipt.id, "again")
        clock.seconds += DAY
        repository.resolve(receipt.id, **BY_ANNA)
        clock.seconds = NOON + 90 * DAY
        # The first one is history, and old enough; the last one tells why the receipt is failed.
        report = repository.prune()
        assert (0, 1) == (report.receipts, report.dead_letters)
        clock.seconds += DAY
        report = repository.prune()
        assert (1, 1) == (report.receipts, report.dead_letters)
        assert (0, 0) == (left(engine, "dlq"), left(engine))

    def test_open(self, repository, clock, engine):
        """An open dead letter stays, and so does the history of its receipt's status."""
        receipt = a_receipt(repository, "failed")
        repository.requeue(receipt.id, **BY_ANNA)
        repository.move_to_dlq(receipt.id, "again")
        clock.seconds += 1000 * DAY
        assert repository.prune().dead_letters == 1
        assert [letter.reason for letter in repository.list_dead_letters(open_only=False)] == ["again"]

    def test_resolved_but_needed(self, repository, engine, clock):
        """A resolved receipt that another table refers to keeps its dead letter too."""
        receipt = a_receipt(repository, "failed")
        repository.resolve(receipt.id, **BY_ANNA)
        clock.seconds += 100 * DAY
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE cash (receipt_id TEXT REFERENCES Receipts (id))"))
            connection.execute(text("INSERT INTO cash VALUES (:id)").bindparams(id=receipt.id))
        assert repository.prune().dead_letters == 0
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE cash"))
        report = repository.prune()
        assert (1, 1) == (report.receipts, report.dead_letters)

    def test_many(self, repository, clock, engine):
        """More than one batch of each kind."""
        repository.set_config("buffer_capacity", 10_000)
        for number in range(240):
            receipt = a_receipt(repository, "failed")
            if number % 2:
                repository.requeue(receipt.id, **BY_ANNA)
            else:
                repository.resolve(receipt.id, **BY_ANNA)
        clock.seconds += 100 * DAY
        report = repository.prune()
        assert (120, 240) == (report.receipts, report.dead_letters)
        assert (0, 120) == (left(engine, "dlq"), left(engine))


class TestEvents:
    def test_retention(self, repository, clock, engine):
        """Events go after `retention_events_days`, more than one batch of them."""
        for _ in range(150):
            repository.log_event("sync_started")
        clock.seconds += DAY
        repository.log_event("sync_completed")
        clock.seconds = NOON + 90 * DAY - 1
        assert repository.prune().events == 0
        clock.seconds += 1
        assert repository.prune().events == 150
        assert left(engine, "buffer_events") == 1

    def test_guard_goes_by_the_wall_clock(self, engine):
        """Where our clock is ahead of the wall clock, what the database's guard would refuse is not asked for."""
        ReceiptRepository(engine).log_event("sync_started")
        ahead = ReceiptRepository(engine, now=lambda: 10**10)
        assert ahead.prune().events == 0


def test_inside_transaction(repository, clock):
    """Inside a transaction it is part of it."""
    a_receipt(repository, "synced")
    clock.seconds += 8 * DAY
    with pytest.raises(RuntimeError), repository.transaction():
        assert repository.prune().receipts == 1
        raise RuntimeError
    assert repository.get_buffer_status().synced == 1
