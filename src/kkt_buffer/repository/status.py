"""The state of the buffer as a whole: counts, fullness, deadline."""

from dataclasses import dataclass
from typing import cast

from sqlalchemy import Table, select, text

from kkt_buffer.models import UNDELIVERED, ConfigEntry, Receipt
from kkt_buffer.repository.settings import Settings, number_of
from kkt_buffer.schema import buffer_status

SECONDS_PER_DAY = 86_400

_receipts = cast("Table", Receipt.__table__)

# By the counters, and idx_receipts_undelivered. A failed receipt counts as long as its dead letter is open: the
# operator has not had it. Once that was resolved the receipt is out, on record.
STATUS = select(
    buffer_status,
    select(_receipts.c.created_at)
    .where(
        text(
            UNDELIVERED + " AND (status <> 'failed' OR EXISTS"  # noqa: S608 (our own constant)
            " (SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id AND resolved_at IS NULL))"
        )
    )
    .order_by(_receipts.c.created_at)
    .limit(1)
    .scalar_subquery()
    .label("oldest_undelivered_at"),
    *(
        select(ConfigEntry.value).where(ConfigEntry.key == key).scalar_subquery().label(key)
        for key in ("buffer_capacity", "ofd_deadline_days")
    ),
)


@dataclass(frozen=True, slots=True)
class BufferStatus:
    """
    How full the buffer is. Times are Unix seconds.

    `dlq_size` counts open dead letters, `percent_full` is undelivered / capacity × 100. `oldest_undelivered_at` is
    when the oldest receipt was added that the operator does not have, dead-lettered ones included, and `deadline_at`
    when its time is up (54-ФЗ: 30 calendar days, `ofd_deadline_days`); both are None when there is none.
    """

    total_receipts: int
    pending: int
    syncing: int
    synced: int
    failed: int
    dlq_size: int
    capacity: int
    percent_full: float
    oldest_undelivered_at: int | None
    deadline_at: int | None


class Status(Settings):
    """The operations on the buffer as a whole."""

    def get_buffer_status(self) -> BufferStatus:
        """How full the buffer is, and until when the operator must have what waits; at the cost of a few lookups."""
        with self._reading() as session:
            row = session.execute(STATUS).one()
        number_of("buffer_capacity", row.buffer_capacity)
        days = number_of("ofd_deadline_days", row.ofd_deadline_days)
        oldest = row.oldest_undelivered_at
        return BufferStatus(
            **{column: row._mapping[column] for column in buffer_status.c.keys()},  # noqa: SLF001, SIM118 (public API; no dict)
            oldest_undelivered_at=oldest,
            deadline_at=None if oldest is None else oldest + days * SECONDS_PER_DAY,
        )
