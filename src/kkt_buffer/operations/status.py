"""The state of the buffer as a whole: counts, fullness, deadline."""

from dataclasses import dataclass
from typing import cast

from sqlalchemy import Table, bindparam, select, text

from kkt_buffer import arguments
from kkt_buffer.config import number_of
from kkt_buffer.direct import Driver
from kkt_buffer.errors import BufferDamagedError
from kkt_buffer.models import ConfigEntry, Receipt
from kkt_buffer.operations.settings import SECONDS_PER_DAY, Settings
from kkt_buffer.sqlite.schema import buffer_status

_receipts = cast("Table", Receipt.__table__)

# A failed receipt counts as long as its dead letter is open: the operator has not had it.
# Once that was resolved the receipt is out, on record.
OWED = text(
    "status <> 'synced' AND (status <> 'failed' OR EXISTS"
    " (SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id AND resolved_at IS NULL))"
)

# The view takes its figures from the counters.
STATUS = select(
    buffer_status,
    select(_receipts.c.created_at)
    .where(OWED)
    .order_by(_receipts.c.created_at)
    .limit(1)
    .scalar_subquery()
    .label("oldest_undelivered_at"),
    *(
        select(ConfigEntry.value).where(ConfigEntry.key == key).scalar_subquery().label(key)
        for key in ("buffer_capacity", "ofd_deadline_days")
    ),
)

_FIGURES = tuple(buffer_status.c.keys())

DUE = (
    select(Receipt)
    .where(OWED, Receipt.created_at < bindparam("created"))
    .order_by(Receipt.created_at)
    .limit(bindparam("limit"))
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
        with self._direct(write=False) as driver:
            return status_by(driver)

    def get_receipts_due(self, before: int, *, limit: int = 100) -> list[Receipt]:
        """
        The receipts that the operator must have before the moment `before` (Unix seconds), most urgent first.

        Those are the undelivered ones, open dead letters included, that are `ofd_deadline_days` old by then.
        """
        before = arguments.whole_number("before", before, 0)
        limit = arguments.whole_number("limit", limit, 1)
        with self._reading():
            days = self._numbers("ofd_deadline_days")["ofd_deadline_days"]
            return self._load(DUE, created=before - days * SECONDS_PER_DAY, limit=limit)


def status_by(driver: Driver) -> BufferStatus:
    """The state of the buffer within a transaction."""
    found = driver.first(STATUS, {})
    if found is None:
        raise BufferDamagedError.found(driver.connection.database, "buffer_state has no row")
    *figures, oldest, capacity, deadline_days = found
    number_of("buffer_capacity", capacity)
    days = number_of("ofd_deadline_days", deadline_days)
    if not isinstance(oldest, int | None):
        raise BufferDamagedError.found(driver.connection.database, f"the oldest receipt was made at {oldest!r}")
    return BufferStatus(
        **dict(zip(_FIGURES, figures, strict=True)),
        oldest_undelivered_at=oldest,
        deadline_at=None if oldest is None else oldest + days * SECONDS_PER_DAY,
    )
