"""What a monitor sees of the buffer."""

import pytest
from builders import NOON, STATUSES, a_foreign_receipt, a_receipt
from sqlalchemy import text

from kkt_buffer import DeliveryUnavailable, deliver_pending


class TestGetBufferStatus:
    def test_empty(self, repository):
        status = repository.get_buffer_status()
        assert (0, 0, 200, 0.0, None, None) == (
            status.total_receipts,
            status.dlq_size,
            status.capacity,
            status.percent_full,
            status.oldest_undelivered_at,
            status.deadline_at,
        )

    def test_counts(self, repository):
        """Every count is right, and only what is undelivered fills the buffer."""
        for number, status in enumerate(STATUSES, start=1):
            for _ in range(number):
                a_receipt(repository, status)
        status = repository.get_buffer_status()
        assert (1, 2, 3, 4, 10, 4) == (
            status.pending,
            status.syncing,
            status.synced,
            status.failed,
            status.total_receipts,
            status.dlq_size,
        )
        assert status.percent_full == 1.5

    def test_percent(self, repository):
        """Two decimals, and more than a hundred if the capacity was lowered."""
        repository.set_config("buffer_capacity", 3)
        a_receipt(repository)
        assert repository.get_buffer_status().percent_full == 33.33
        a_receipt(repository)
        repository.set_config("buffer_capacity", 1)
        assert repository.get_buffer_status().percent_full == 200.0

    @pytest.mark.parametrize("status", ["pending", "syncing", "failed"])
    def test_deadline(self, repository, clock, status):
        """The oldest receipt that the OFD does not have, a dead-lettered one too, sets the deadline."""
        a_receipt(repository, "synced")
        clock.seconds += 100
        oldest = a_receipt(repository, status)
        clock.seconds += 100
        a_receipt(repository)
        found = repository.get_buffer_status()
        assert (NOON + 100, NOON + 100 + 30 * 86_400) == (found.oldest_undelivered_at, found.deadline_at)
        repository.set_config("ofd_deadline_days", 1)
        assert NOON + 100 + 86_400 == repository.get_buffer_status().deadline_at
        repository.mark_synced(oldest.id, NOON)
        assert NOON + 200 == repository.get_buffer_status().oldest_undelivered_at

    def test_resolved(self, repository, engine):
        """A dead letter that was closed takes its receipt out of the deadline."""
        a_receipt(repository, "failed")
        with engine.begin() as connection:
            connection.execute(text("UPDATE dlq SET resolved_at = 1, resolved_by = 'Anna'"))
        status = repository.get_buffer_status()
        assert (1, 0, None) == (status.failed, status.dlq_size, status.oldest_undelivered_at)

    def test_never(self, repository):
        """Before anything has happened there is no last delivery and no last outage, and nothing is held."""
        status = repository.get_buffer_status()
        assert (0, 0, None, None) == (status.held, status.expired_leases, status.last_synced_at, status.last_outage_at)

    def test_held(self, repository, engine):
        """A held receipt fills the buffer and has a deadline, but is not to be delivered yet."""
        a_foreign_receipt(engine, "held", created_at=NOON, held_at=NOON)
        a_receipt(repository)
        status = repository.get_buffer_status()
        assert (1, 2, NOON) == (status.held, status.pending, status.oldest_undelivered_at)
        assert "held" not in [receipt.id for receipt in repository.get_pending_receipts()]
        repository.move_to_dlq("held", "never printed")
        assert repository.get_buffer_status().held == 0

    def test_expired_leases(self, repository, clock):
        """A lease counts as expired from its end on, until somebody takes the receipt back."""
        a_receipt(repository, "syncing")
        clock.seconds += 59
        assert repository.get_buffer_status().expired_leases == 0
        clock.seconds += 1
        assert (1, 1) == (repository.get_buffer_status().expired_leases, repository.get_buffer_status().syncing)
        repository.recover_expired_leases()
        assert repository.get_buffer_status().expired_leases == 0

    def test_last_synced_at(self, repository, clock):
        """The last delivery by the clock of this machine; pruning does not forget it."""
        a_receipt(repository, "synced")
        clock.seconds += 100
        a_receipt(repository, "synced")
        assert NOON + 100 == repository.get_buffer_status().last_synced_at
        clock.seconds += 100 * 86_400
        assert repository.prune().receipts == 2
        assert NOON + 100 == repository.get_buffer_status().last_synced_at
        clock.seconds = NOON
        a_receipt(repository, "synced")
        assert NOON + 100 == repository.get_buffer_status().last_synced_at

    def test_last_outage_at(self, repository, clock):
        """The end of the last delivery run that met an outage; a good one since does not take it away."""

        def send(receipt):
            clock.seconds += 10
            if clock.seconds < NOON + 20:
                raise DeliveryUnavailable
            return NOON

        a_receipt(repository)
        deliver_pending(repository, send)
        assert NOON + 10 == repository.get_buffer_status().last_outage_at
        deliver_pending(repository, send)
        status = repository.get_buffer_status()
        assert (NOON + 10, NOON + 20) == (status.last_outage_at, status.last_synced_at)
