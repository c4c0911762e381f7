"""
`deliver_pending`: claim the receipts that are due, send each one, and record its outcome.

The database is used only through the repository, and no transaction is open while a receipt is sent. `streak`
decides whether several failures are an outage.
"""

import contextlib
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from kkt_buffer import arguments
from kkt_buffer.errors import (
    DeliveryRejected,
    DeliveryUnavailable,
    InvalidTransitionError,
    LeaseLostError,
    ReceiptBufferError,
    ReceiptNotFoundError,
)
from kkt_buffer.lanes import Lanes
from kkt_buffer.models import EventType, Receipt, ReceiptStatus
from kkt_buffer.repository import ReceiptRepository

logger = logging.getLogger(__name__)

Send: TypeAlias = Callable[[Receipt], int]

# Errors that mean that the OFD cannot be reached. They say nothing about the receipt.
OUTAGE = (DeliveryUnavailable, ConnectionError, TimeoutError)


def check_sender(send: Send, outage: tuple[type[Exception], ...]) -> None:
    """Raise `TypeError` if these are no arguments for `deliver_pending`."""
    if not callable(send) or inspect.iscoroutinefunction(send):
        raise TypeError(f"send: expected a plain function of a receipt, got {send!r}; nothing was claimed")
    if not isinstance(outage, tuple) or not all(
        isinstance(kind, type) and issubclass(kind, Exception) for kind in outage
    ):
        raise TypeError(f"outage: expected a tuple of exception classes, got {outage!r}; nothing was claimed")


class Outcome(StrEnum):
    """The outcome of a claimed receipt."""

    SYNCED = "synced"
    RETRY = "retry"  # an attempt was counted; the receipt waits for its backoff
    DEAD_LETTERED = "dead_lettered"
    RELEASED = "released"  # handed back, no attempt counted
    LEASE_LOST = "lease_lost"  # another worker has the receipt, or it was deleted


_LEVELS = {
    Outcome.SYNCED: logging.INFO,
    Outcome.RETRY: logging.WARNING,
    Outcome.DEAD_LETTERED: logging.ERROR,
    Outcome.RELEASED: logging.INFO,
    Outcome.LEASE_LOST: logging.WARNING,
}


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """The outcome of each receipt of one call, by its id, in the order of claiming; and the outage, if there is one."""

    outcomes: dict[str, Outcome]
    outage: str | None = None

    def count(self, outcome: Outcome) -> int:
        """How many receipts had this outcome."""
        return sum(found == outcome for found in self.outcomes.values())


def deliver_pending(  # noqa: PLR0913 (all but three are keywords)
    repository: ReceiptRepository,
    send: Send,
    limit: int = 50,
    *,
    outage: tuple[type[Exception], ...] = (),
    should_stop: Callable[[], bool] | None = None,
    concurrency: int = 1,
) -> DeliveryReport:
    """
    Send the receipts that are due, at most `limit`, in HLC order.

    Up to `concurrency` threads call `send` at the same time, never two of them for receipts of the same `pos_id`.

    `send(receipt)` returns the OFD's time (whole Unix seconds). If it raises

    - `DeliveryRejected`, the receipt is dead-lettered at once;
    - `DeliveryUnavailable`, `ConnectionError`, `TimeoutError` or one of the types in `outage`, the OFD is down: this
      receipt and the rest of the batch are released, and no attempt is counted. Nothing is sent until
      `DeliveryUnavailable.retry_after` has passed, for an hour at most;
    - any other `Exception`, that is a failed attempt, and the next receipt is sent. `circuit_breaker_threshold`
      different receipts that fail in a row are an outage too: no attempt is counted, and they wait `retry_backoff_max`.

    While the OFD is down, each call tries one receipt, the one that was tried least recently. The first one that is
    accepted or rejected ends the outage, and the call goes on. All calls with the same repository know of the outage.

    `should_stop` is asked before each receipt; if it returns true, the rest is released. A `BaseException` such as
    `KeyboardInterrupt` releases the receipts without an outcome and propagates. A document that differs from its digest
    is not sent but dead-lettered. One send must take less than `lease_seconds`.

    Each receipt is sent at least once. It is sent again if this process dies, is interrupted or loses the lease between
    the send and its record, if its outcome cannot be stored, and if `send` raises although the OFD has accepted the
    receipt. Each call that claimed something logs events; during an outage only the first call does, and then the first
    one after it. Every outcome is one log record of `kkt_buffer.delivery` with the fields `receipt_id`, `pos_id`,
    `outcome` and `error`.

    Raises `ReceiptBufferError` inside `transaction()`, where an outcome cannot be committed at once.
    """
    check_sender(send, outage)
    if not (should_stop is None or callable(should_stop)):
        raise TypeError(f"should_stop: expected a function without arguments, got {should_stop!r}; nothing was claimed")
    limit = arguments.whole_number("limit", limit, 1)
    concurrency = arguments.whole_number("concurrency", concurrency, 1)
    if repository.in_transaction:
        raise ReceiptBufferError(
            "deliver_pending was called inside transaction(): the outcomes would not be stored before that commit, and "
            "other writers would have to wait. Nothing was sent. Call it outside."
        )
    if pause := repository.streak.pause:
        return DeliveryReport({}, pause)
    return _Run(repository, send, (*OUTAGE, *outage), should_stop or _never, concurrency).deliver(limit)


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class _Failure:
    """A failed attempt that is not recorded yet."""

    receipt: Receipt
    error: str
    is_outage: bool  # the sender reported an outage


class _Run:
    """One call of `deliver_pending`."""

    def __init__(
        self,
        repository: ReceiptRepository,
        send: Send,
        outage_types: tuple[type[Exception], ...],
        should_stop: Callable[[], bool],
        concurrency: int,
    ) -> None:
        self._repository = repository
        self._streak = repository.streak
        self._send = send
        self._outage_types = outage_types
        self._should_stop = should_stop
        self._concurrency = concurrency
        self._lock = threading.Lock()  # of the leases and the failures
        self._leased: set[str] = set()
        self._leased_at = 0.0
        self._outcomes: dict[str, Outcome | None] = {}  # of everything that was claimed; None: not known yet
        self._failures: list[_Failure] = []  # since the last answer: whether they count is not known yet

    def deliver(self, limit: int) -> DeliveryReport:
        if self._streak.outage:
            self._send_all(self._claim(1, retries_last=True), is_logged=False)
        if not self._streak.outage:
            rest = limit - len(self._outcomes)
            batch = self._claim(rest, retries_last=self._streak.is_in_doubt) if rest else []
            if self._outcomes:
                self._send_all(batch, is_logged=True)
                self._log_end()
        known = {receipt_id: outcome for receipt_id, outcome in self._outcomes.items() if outcome is not None}
        return DeliveryReport(known, self._streak.outage)

    def _claim(self, limit: int, *, retries_last: bool) -> list[Receipt]:
        self._leased_at = self._repository.now()
        batch = self._repository.claim_pending(limit, retries_last=retries_last)
        self._leased = {receipt.id for receipt in batch}
        self._outcomes.update((receipt.id, None) for receipt in batch)
        return batch

    def _send_all(self, batch: list[Receipt], *, is_logged: bool) -> None:
        try:
            if is_logged:
                self._repository.log_event(EventType.SYNC_STARTED, metadata={"claimed": len(self._outcomes)})
            Lanes(batch, self._send_one).run(self._concurrency)
            self._settle(batch)
        except BaseException:
            # The buffer itself failed, or the process was asked to stop.
            with contextlib.suppress(ReceiptBufferError):
                self._settle(batch)
            raise

    def _send_one(self, receipt: Receipt) -> bool:
        """Send a receipt, unless its lease was lost; False if nothing more should be sent."""
        if self._should_stop():
            return False
        self._renew(receipt)
        if receipt.id in self._leased:
            return self._deliver(receipt)
        self._finish(receipt, Outcome.LEASE_LOST)
        return True

    def _renew(self, receipt: Receipt) -> None:
        """Once half of the lease is over, renew it for the whole batch."""
        seconds = (receipt.lease_expires_at or 0) - (receipt.lease_taken_at or 0)
        with self._lock:
            now = self._repository.now()
            # A clock that was set back is a reason too.
            if not 0 <= now - self._leased_at < seconds / 2:
                self._leased = set(self._repository.renew_leases(str(receipt.lease_token), lease_seconds=seconds))
                self._leased_at = now

    def _deliver(self, receipt: Receipt) -> bool:
        """Send a receipt and record the outcome, if it is known; False if the rest should not be sent."""
        if not receipt.is_intact:
            self._dead_letter(receipt, "damaged: the stored document differs from its digest. It was not sent")
            return True
        try:
            answer = self._send(receipt)
        except DeliveryRejected as error:
            self._dead_letter(receipt, f"rejected by the OFD: {_describe(error)}")
            self._answered(receipt)
            return True
        except self._outage_types as error:
            pause = error.retry_after if isinstance(error, DeliveryUnavailable) else None
            self._streak.unavailable(
                receipt.id, _describe(error), self._repository.get_config("circuit_breaker_threshold"), pause
            )
            with self._lock:
                self._failures.append(_Failure(receipt, _describe(error), is_outage=True))
            return False
        except Exception as error:  # noqa: BLE001 (any other error of a sender is a failed attempt)
            return self._fail(receipt, error)
        try:
            server_time = arguments.whole_number("the answer of send", answer, 0)
        except (TypeError, ValueError) as error:
            return self._fail(receipt, error)
        is_recorded = self._repository.mark_synced(receipt.id, server_time)
        self._finish(receipt, Outcome.SYNCED if is_recorded else Outcome.LEASE_LOST)
        self._answered(receipt)
        return True

    def _answered(self, receipt: Receipt) -> None:
        self._streak.answered(receipt.id)
        self._settle()

    def _fail(self, receipt: Receipt, error: Exception) -> bool:
        self._streak.failed(receipt.id, _describe(error), self._repository.get_config("circuit_breaker_threshold"))
        with self._lock:
            self._failures.append(_Failure(receipt, _describe(error), is_outage=False))
        return self._streak.outage is None

    def _dead_letter(self, receipt: Receipt, reason: str) -> None:
        try:
            self._repository.move_to_dlq(receipt.id, reason)
        except InvalidTransitionError:  # another worker has delivered it
            self._finish(receipt, Outcome.LEASE_LOST, reason)
        else:
            self._finish(receipt, Outcome.DEAD_LETTERED, reason)

    def _settle(self, batch: Sequence[Receipt] = ()) -> None:
        """Record the failures since the last answer, and release what else of the batch has no outcome."""
        with self._lock:
            failures, self._failures = self._failures, []
        failed = {failure.receipt.id for failure in failures}
        unsent = [one for one in batch if self._outcomes[one.id] is None and one.id not in failed]
        if not (failures or unsent):
            return
        outage = self._streak.outage
        with self._repository.transaction():  # one commit
            recorded = [self._record(failure, counts=outage is None) for failure in failures]
            released = [self._release(receipt) for receipt in unsent]
        for failure, outcome in zip(failures, recorded, strict=True):
            self._finish(failure.receipt, outcome, failure.error)
        for receipt, outcome in zip(unsent, released, strict=True):
            self._finish(receipt, outcome, outage)

    def _record(self, failure: _Failure, *, counts: bool) -> Outcome:
        receipt = failure.receipt
        if failure.is_outage and not self._streak.is_suspect(receipt.id):
            return self._release(receipt, wait_seconds=0)
        if failure.is_outage or not counts:
            return self._release(receipt, wait_seconds=self._repository.get_config("retry_backoff_max"))
        try:
            status = self._repository.record_failure(receipt.id, failure.error, str(receipt.lease_token))
        except (LeaseLostError, ReceiptNotFoundError):
            return Outcome.LEASE_LOST
        return Outcome.RETRY if status is ReceiptStatus.PENDING else Outcome.DEAD_LETTERED

    def _release(self, receipt: Receipt, wait_seconds: int | None = None) -> Outcome:
        try:
            self._repository.release(receipt.id, str(receipt.lease_token), wait_seconds=wait_seconds)
        except (LeaseLostError, ReceiptNotFoundError):
            return Outcome.LEASE_LOST
        return Outcome.RELEASED

    def _finish(self, receipt: Receipt, outcome: Outcome, error: str | None = None) -> None:
        self._outcomes[receipt.id] = outcome
        fields = {"receipt_id": receipt.id, "pos_id": receipt.pos_id, "outcome": str(outcome), "error": error}
        logger.log(
            _LEVELS[outcome], "receipt %s: %s%s", receipt.id, outcome, f" ({error})" if error else "", extra=fields
        )

    def _log_end(self) -> None:
        counts: dict[str, object] = dict(Counter(str(outcome) for outcome in self._outcomes.values()))
        outage = self._streak.outage  # once: another thread may end it
        if outage:
            counts["error"] = arguments.note("error", outage)
        event_type = EventType.SYNC_FAILED if outage else EventType.SYNC_COMPLETED
        self._repository.log_event(event_type, metadata=counts)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
