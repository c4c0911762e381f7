"""What a monitor sees of the buffer."""

import pytest
from builders import NOON, STATUSES, a_receipt
from sqlalchemy import text


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
