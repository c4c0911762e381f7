"""
`DeliveryWorker`: deliver for as long as the program runs.

Here: when to deliver next, the events of the circuit breaker, start and stop. What becomes of each receipt is decided
in `delivery`, and what an outage is in `streak`; the nightly work is in `maintenance`.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import time
from typing import Self, TypeVar

from kkt_buffer import arguments
from kkt_buffer.backend import backend_of
from kkt_buffer.bell import Bell, own_bell
from kkt_buffer.delivery import DeliveryReport, Send, check_sender, deliver_pending
from kkt_buffer.errors import with_traceback
from kkt_buffer.maintenance import Maintenance, alone
from kkt_buffer.models import EventType
from kkt_buffer.repository import ReceiptRepository

logger = logging.getLogger(__name__)

MAX_POLL_SECONDS = 3600

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """
    The state of a worker. Times are Unix seconds.

    `is_open`: the circuit is open, so the OFD is only probed; `since`: the time at which it opened or closed, or at
    which the worker was made. `report`: of the last delivery that claimed something. `error`: why the worker cannot
    deliver now, and since when; an OFD that is down is no error. `maintenance_error`: why the last maintenance
    failed.
    """

    since: float
    is_running: bool = False
    is_open: bool = False
    report: DeliveryReport | None = None
    error: str | None = None
    error_since: float | None = None
    maintenance_error: str | None = None


class DeliveryWorker:
    """
    Delivers what is due, in this thread (`run`) or in one of its own (`start`, or `with`).

    `send`, `outage` and `concurrency` are those of `deliver_pending`; up to `batch` receipts are claimed at a time for
    each of the `concurrency` senders. A commit through the same engine wakes the worker at once. It notices other
    receipts within `poll_seconds`; looking for them takes no lock.

    The circuit opens after `circuit_breaker_threshold` failed attempts in a row, if they are an outage (see
    `deliver_pending`). Then one receipt is tried every `circuit_breaker_timeout` seconds. The first answer closes it.
    The events `circuit_opened` and `circuit_closed` are logged once per outage, by the worker that notices it first.

    Every day at the local time `maintenance_at`, or as soon as a worker runs after that time, one worker of the buffer
    prunes it and writes a backup into the folder `backup_to`, which is checked; the last seven are kept. Delivery in
    that worker waits. What fails is logged, shown in `status`, and tried again after an hour.

    `on_report` is called with each `DeliveryReport` that is not empty, for example a `BufferCollector`. An error that
    it raises is logged.

    >>> with DeliveryWorker(repository, lambda receipt: 1_772_366_400):
    ...     receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
    """

    def __init__(  # noqa: PLR0913 (all but two are keywords)
        self,
        repository: ReceiptRepository,
        send: Send,
        *,
        batch: int = 50,
        concurrency: int = 1,
        poll_seconds: float = 1.0,
        outage: tuple[type[Exception], ...] = (),
        maintenance_at: time | None = None,
        backup_to: str | os.PathLike[str] | None = None,
        on_report: Callable[[DeliveryReport], object] | None = None,
    ) -> None:
        check_sender(send, outage)
        if isinstance(poll_seconds, bool) or not isinstance(poll_seconds, int | float):
            raise TypeError(f"poll_seconds: expected a number of seconds, got {poll_seconds!r}")
        if not 0 < poll_seconds <= MAX_POLL_SECONDS:
            raise ValueError(f"poll_seconds: expected more than 0 and at most {MAX_POLL_SECONDS}, got {poll_seconds!r}")
        self._repository = repository
        self._send = send
        self._outage = outage
        self._concurrency = arguments.whole_number("concurrency", concurrency, 1)
        self._limit = arguments.whole_number("batch", batch, 1) * self._concurrency
        self._poll_seconds = poll_seconds
        self._maintenance = Maintenance(repository, maintenance_at, backup_to)
        self._on_report = on_report
        self._bell = Bell()
        self._is_stopping = False
        self._is_called = False
        self._running = threading.Lock()  # held from start to end
        self._status = WorkerStatus(repository.now())

    @property
    def status(self) -> WorkerStatus:
        """The current state."""
        streak = self._repository.streak
        return replace(
            self._status,
            since=max(self._status.since, streak.changed_at),
            is_running=self._running.locked(),
            is_open=streak.is_open,
            maintenance_error=self._maintenance.error,
        )

    def run(self) -> None:
        """
        Work in this thread until `stop` is called, or a signal asks for it.

        In the main thread, SIGTERM and SIGINT stop the worker: it hands back what it has not sent and returns, within
        one `send`. A second signal does what it would do without the worker, so it ends the program at once. In another
        thread, signals are left alone.
        """
        self._begin()
        self._do(self._loop_until_signal)

    def start(self) -> None:
        """Work in a new thread until `stop` is called. The end of the program does not wait for it."""
        self._begin()
        try:
            threading.Thread(target=self._do, args=[self._loop], name="kkt-buffer worker", daemon=True).start()
        except BaseException:
            self._end()
            raise

    def stop(self, timeout: float | None = None) -> bool:
        """
        Stop, and wait for the end, at most `timeout` seconds; returns whether the worker has ended.

        That takes one `send` at most, or the current maintenance. Called in the worker's own thread, by `send` or by a
        signal handler, it does not wait. From a signal handler of another thread pass `timeout=0`.
        """
        self._request_stop()
        if own_bell.get() is self._bell:
            return False
        has_ended = self._running.acquire(timeout=-1 if timeout is None else timeout)
        if has_ended:
            self._end()
        return has_ended

    def wake(self) -> None:
        """
        Try now, for example when the connection is back.

        Skips the wait of an open circuit, but not a `retry_after` of the OFD.
        """
        self._is_called = True
        self._bell.ring()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tick(self) -> float:
        """
        Do what is due now; returns the seconds until the next tick. For tests, and for a loop of your own.

        Raises what `deliver_pending` raises, and `RuntimeError` if the worker is running.
        """
        self._begin()
        return self._do(self._tick)

    def _tick(self) -> float:
        now = self._repository.now()
        is_called, self._is_called = self._is_called, False
        self._maintenance.run_if_due(now)
        if seconds := self._pause(now, is_called=is_called):
            return seconds
        wait = self._repository.seconds_until_due()
        if wait is None or wait > 0:
            return self._poll_seconds if wait is None else min(self._poll_seconds, wait)
        report = deliver_pending(
            self._repository,
            self._send,
            self._limit,
            outage=self._outage,
            should_stop=lambda: self._is_stopping,
            concurrency=self._concurrency,
        )
        self._note_circuit()
        if not report.outcomes:  # another worker was faster
            return self._poll_seconds
        self._status = replace(self._status, report=report)
        if self._on_report is not None:
            try:
                self._on_report(report)
            except Exception:
                logger.exception("on_report failed; the outcomes are stored, and delivery goes on")
        return self._pause(self._repository.now())

    def _pause(self, now: float, *, is_called: bool = False) -> float:
        """For how many seconds, up to the next tick, the OFD should be left alone."""
        streak = self._repository.streak
        if streak.outage is None or is_called:
            return 0
        timeout = self._repository.get_config("circuit_breaker_timeout") if streak.is_open else self._poll_seconds
        since = now - streak.failed_at
        # If the clock was set back, the pause is over.
        return min(self._poll_seconds, timeout - since) if 0 <= since < timeout else 0

    def _note_circuit(self) -> None:
        """Log that the circuit was opened or closed, unless another worker of the buffer has done so."""
        streak = self._repository.streak
        outage = streak.outage  # once: another thread may end it
        is_open = outage is not None and streak.is_open
        if not (is_open or streak.has_answered):
            return  # too few failures to open it, and no answer to close it
        if is_open == self._is_logged_open():
            return
        with alone(self._repository):
            if is_open == self._is_logged_open():  # pragma: no cover (another worker can be faster, but seldom is)
                return
            if is_open:
                metadata = {"error": arguments.note("error", outage)}
                self._repository.log_event(EventType.CIRCUIT_OPENED, metadata=metadata)
                logger.warning("circuit opened: %s", outage)
            else:
                self._repository.log_event(EventType.CIRCUIT_CLOSED)
                logger.info("circuit closed")

    def _is_logged_open(self) -> bool:
        return self._repository.get_buffer_status().circuit_opened_at is not None

    # Start and end.

    def _begin(self) -> None:
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this worker is running already")

    def _request_stop(self) -> None:
        self._is_stopping = True
        self._bell.ring()

    def _do(self, work: Callable[[], T]) -> T:
        """Run `work` as this worker, which was begun, and end."""
        token = own_bell.set(self._bell)
        try:
            return work()
        finally:
            own_bell.reset(token)
            self._end()

    def _end(self) -> None:
        self._is_stopping = False  # only here: a stop that is requested while it begins is not forgotten
        self._running.release()

    def _loop(self) -> None:
        bells = backend_of(self._repository.engine).bells
        bells.add(self._bell)
        try:
            while not self._is_stopping:
                self._bell.wait(self._guarded_tick())
        finally:
            bells.discard(self._bell)

    def _loop_until_signal(self) -> None:
        with _signals(self._request_stop):
            self._loop()

    def _guarded_tick(self) -> float:
        """A tick; an error is logged once for as long as it lasts, and the next tick tries again."""
        try:
            seconds = self._tick()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if message != self._status.error:
                logger.error(  # noqa: TRY400 (not every error needs a traceback)
                    "the worker cannot deliver (%s); the receipts are safe, and it tries again",
                    error,
                    exc_info=with_traceback(error),
                )
                self._status = replace(self._status, error=message, error_since=self._repository.now())
            return self._poll_seconds
        if self._status.error is not None:
            logger.info("the worker delivers again")
            self._status = replace(self._status, error=None, error_since=None)
        return seconds


@contextmanager
def _signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """
    In the main thread: the first SIGTERM or SIGINT requests a stop and restores the earlier handlers, which get the
    next signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A handler that was not set by Python is None, and cannot be set again.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}

    received: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: object) -> None:
        # Nothing else is safe here: the log may have been interrupted while it holds a lock.
        restore()
        request_stop()
        received.append(number)

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        restore()
        for name in map(signal.Signals, received):
            logger.info("%s: the worker has stopped", name.name)
