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
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import time
from typing import Self

from kkt_buffer import arguments
from kkt_buffer.backend import backend_of
from kkt_buffer.bell import Bell
from kkt_buffer.delivery import DeliveryReport, Send, check_sender, deliver_pending
from kkt_buffer.maintenance import Maintenance
from kkt_buffer.models import EventType
from kkt_buffer.repository import ReceiptRepository

logger = logging.getLogger(__name__)

MAX_POLL_SECONDS = 3600

# The worker that runs in this thread, or in the thread that has started this one to send.
_present: ContextVar["DeliveryWorker | None"] = ContextVar("kkt_buffer_worker", default=None)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """
    The state of a worker. Times are Unix seconds.

    `is_open`: the circuit is open, so the OFD is only probed; `since`: the time at which it opened or closed, or at
    which the worker was made. `report`: of the last delivery that claimed something. `error`: why the worker cannot
    deliver at present, and since when; an OFD that is down is no error. `maintenance_error`: why the last maintenance
    has failed.
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
    each of the `concurrency` senders. A commit in this process wakes the worker at once. It notices receipts of other
    processes within `poll_seconds`; looking for them locks nobody.

    The circuit opens after `circuit_breaker_threshold` failed attempts in a row, if they are an outage (see
    `deliver_pending`). Then one receipt is tried every `circuit_breaker_timeout` seconds. The first answer closes it.
    The events `circuit_opened` and `circuit_closed` are logged once per outage of the buffer, by whichever worker.

    Every day at the local time `maintenance_at`, or at the first look after it, one worker of the buffer prunes it and
    writes a backup into the folder `backup_to`, which is checked; the last seven are kept. Delivery in that worker
    waits. What fails is logged, shown in `status`, and tried again after an hour.

    `on_report` is called with each `DeliveryReport` that is not empty, for example a `BufferCollector`.

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
        self._is_noted_open: bool | None = None  # the circuit, in the events
        self._bell = Bell()
        self._is_stopping = False
        self._is_called = False
        self._running = threading.Lock()  # held from start to end
        self._status = WorkerStatus(repository.now())

    @property
    def status(self) -> WorkerStatus:
        """The present state."""
        return replace(self._status, is_running=self._running.locked(), maintenance_error=self._maintenance.error)

    def run(self) -> None:
        """
        Work in this thread until `stop` is called, or a signal asks for it.

        In the main thread, SIGTERM and SIGINT stop the worker: it hands back what it has not sent and returns, within
        one `send`. A second signal does what it would do without the worker, so it ends the program at once. In another
        thread, signals are left alone.
        """
        self._begin()
        with _signals(self._request_stop):
            self._work()

    def start(self) -> None:
        """Work in a new thread until `stop` is called. The end of the program does not wait for it."""
        self._begin()
        threading.Thread(target=self._work, name="kkt-buffer worker", daemon=True).start()

    def stop(self, timeout: float | None = None) -> bool:
        """
        Stop, and wait for the end, at most `timeout` seconds; returns whether the worker has ended.

        That takes one `send` at most, or the present maintenance. Called by `send` or by a signal handler,
        it does not wait.
        """
        self._request_stop()
        if _present.get() is self:
            return False
        has_ended = self._running.acquire(timeout=-1 if timeout is None else timeout)
        if has_ended:
            self._running.release()
        return has_ended

    def wake(self) -> None:
        """Look at once, for example because the line is up again: the circuit may be open, a pause is kept."""
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

        Raises what `deliver_pending` raises.
        """
        now = self._repository.now()
        is_called, self._is_called = self._is_called, False
        self._maintenance.run_if_due(now)
        if seconds := self._pause(now, is_called=is_called):
            return seconds
        due_at = self._repository.next_due_at()
        if due_at is None or due_at > now:
            return self._poll_seconds if due_at is None else min(self._poll_seconds, due_at - now)
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
            self._on_report(report)
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
        is_open = streak.is_open
        if not is_open and (streak.outage is not None or streak.is_in_doubt):
            return  # too few failures to open it, and no answer to close it
        if is_open == self._is_noted_open:
            return
        with self._repository.transaction():
            was_open = self._repository.get_buffer_status().circuit_opened_at is not None
            if is_open and not was_open:
                error = arguments.note("error", streak.outage)
                self._repository.log_event(EventType.CIRCUIT_OPENED, metadata={"error": error})
            elif was_open and not is_open:
                self._repository.log_event(EventType.CIRCUIT_CLOSED)
        self._is_noted_open = is_open
        if is_open != self._status.is_open:
            self._status = replace(self._status, is_open=is_open, since=self._repository.now())
            logger.log(logging.WARNING if is_open else logging.INFO, "circuit %s", "opened" if is_open else "closed")

    # Start and end.

    def _begin(self) -> None:
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this worker is running already")
        self._is_stopping = False

    def _request_stop(self) -> None:
        self._is_stopping = True
        self._bell.ring()

    def _work(self) -> None:
        bells = backend_of(self._repository.engine).bells
        token = _present.set(self)
        bells.add(self._bell)
        try:
            while not self._is_stopping:
                self._bell.wait(self._guarded_tick())
        finally:
            bells.discard(self._bell)
            _present.reset(token)
            self._running.release()

    def _guarded_tick(self) -> float:
        """A tick; an error is logged once for as long as it lasts, and the next tick tries again."""
        try:
            seconds = self.tick()
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            if told != self._status.error:
                logger.exception("the worker cannot deliver; the receipts are safe, and it tries again")
                self._status = replace(self._status, error=told, error_since=self._repository.now())
            return self._poll_seconds
        if self._status.error is not None:
            logger.info("the worker delivers again")
            self._status = replace(self._status, error=None, error_since=None)
        return seconds


@contextmanager
def _signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """In the main thread, make the first SIGTERM or SIGINT a request; the next one meets the handler of before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A handler that was not set by Python is None, and cannot be set again.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: object) -> None:
        restore()
        logger.info("%s: the worker stops", signal.Signals(number).name)
        request_stop()

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        restore()
