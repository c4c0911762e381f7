"""The nightly work of a worker: prune, and a checked backup."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, time, timedelta
from pathlib import Path

from kkt_buffer.backend import backend_of
from kkt_buffer.errors import BufferDamagedError, with_traceback
from kkt_buffer.models import EventType
from kkt_buffer.repository import ReceiptRepository
from kkt_buffer.rotation import back_up

logger = logging.getLogger(__name__)

RETRY_SECONDS = 3600  # no maintenance takes longer: if it is not complete by then, it failed or its process died


class Maintenance:
    """
    Done once a day, at the local time `at` or at the first call after it, by one of all workers of the buffer.

    The events of the buffer tell whether another worker has done it or is doing it. `error`: why the last run failed;
    None if it succeeded.
    """

    def __init__(
        self, repository: ReceiptRepository, at: time | None, backup_to: str | os.PathLike[str] | None
    ) -> None:
        if at is not None and (not isinstance(at, time) or at.tzinfo is not None):
            raise TypeError(f"maintenance_at: expected a datetime.time without a time zone, got {at!r}")
        if backup_to is not None and at is None:
            raise ValueError("backup_to: expected maintenance_at too, the time of day of the backup")
        if backup_to is not None:
            backend_of(repository.engine).refuse_backup()
        self._repository = repository
        self._at = at
        self._backup_to = backup_to
        self._looked_at = 0.0
        self._done: datetime | None = None
        self.error: str | None = None

    def run_if_due(self, now: float) -> None:
        """Do what is due; a failure is logged, kept in `error`, and tried again after an hour."""
        if self._at is None or 0 <= now - self._looked_at < RETRY_SECONDS:
            return
        local = datetime.fromtimestamp(now)  # noqa: DTZ006 (the time of day at the till)
        due = datetime.combine(local.date(), self._at)
        if local < due:
            due -= timedelta(days=1)  # the till may have been off at that time
        if self._done == due:
            return
        self._looked_at = now
        if not self._is_ours(due, now):
            return
        failures = [failure for step in (self._prune, self._back_up) if (failure := _failure_of(step))]
        self.error = "; ".join(failures) or None
        if not failures:
            self._repository.log_event(EventType.MAINTENANCE_COMPLETED)
            self._done = due

    def _is_ours(self, due: datetime, now: float) -> bool:
        """Whether this worker should do it. If so, `maintenance_started` is logged, so that no other worker starts."""
        with alone(self._repository):
            if self._last(EventType.MAINTENANCE_COMPLETED) >= due.timestamp():
                self._done = due
                self.error = None
                return False
            if 0 <= now - self._last(EventType.MAINTENANCE_STARTED) < RETRY_SECONDS:
                return False
            self._repository.log_event(EventType.MAINTENANCE_STARTED)
        return True

    def _last(self, event_type: EventType) -> int:
        return max((event.timestamp for event in self._repository.get_events(1, event_type=event_type)), default=0)

    def _prune(self) -> None:
        logger.info("maintenance: %s", self._repository.prune())

    def _back_up(self) -> None:
        if self._backup_to is None:
            return
        name = Path(str(self._repository.engine.url.database)).stem
        copy, report = back_up(self._repository, self._backup_to, name=name, now=self._repository.now)
        if report.is_damaged:
            raise BufferDamagedError(
                f"the backup {copy} is damaged, as the buffer is: {report}. No older backup was deleted. Stop the till "
                "and see `kkt-buffer verify`."
            )
        logger.info("maintenance: the backup %s is complete", copy)


@contextmanager
def alone(repository: ReceiptRepository) -> Iterator[None]:
    """A transaction that no other worker is in: what is read in it stays true until it is written."""
    with repository.transaction() as session:
        backend_of(repository.engine).lock(session.connection())
        yield


def _failure_of(step: Callable[[], None]) -> str | None:
    try:
        step()
    except Exception as error:
        logger.error(  # noqa: TRY400 (not every error needs a traceback)
            "maintenance has failed (%s); delivery goes on, and it is tried again after an hour",
            error,
            exc_info=with_traceback(error),
        )
        return f"{type(error).__name__}: {error}"
    return None
