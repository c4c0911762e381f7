"""
`deliver_pending`: claim the receipts that are due, send each one, and record its outcome at once.

The database is used only through the repository, and no transaction is open while a receipt is sent.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic

from kkt_buffer import arguments
from kkt_buffer.errors import (
    DeliveryRejected,
    DeliveryUnavailable,
    InvalidTransitionError,
    LeaseLostError,
    ReceiptBufferError,
    ReceiptNotFoundError,
)
from kkt_buffer.models import EventType, Receipt, ReceiptStatus
from kkt_buffer.repository import ReceiptRepository

Send = Callable[[Receipt], int]

# Errors that mean that the OFD cannot be reached. They say nothing about the receipt.
OUTAGE = (DeliveryUnavailable, ConnectionError, TimeoutError)


class Outcome(StrEnum):
    """The outcome of a claimed receipt."""

    SYNCED = "synced"
    RETRY = "retry"  # an attempt was counted; the receipt waits for its backoff
    DEAD_LETTERED = "dead_lettered"
    RELEASED = "released"  # handed back, no attempt counted
    LEASE_LOST = "lease_lost"  # another worker has the receipt, or it was deleted


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """The outcome of each receipt of one call, by its id, in HLC order; and the outage, if there was one."""

    outcomes: dict[str, Outcome]
    outage: str | None = None

    def count(self, outcome: Outcome) -> int:
        """How many receipts had this outcome."""
        return sum(found == outcome for found in self.outcomes.values())


def deliver_pending(repository: ReceiptRepository, send: Send, limit: int = 50) -> DeliveryReport:
    """
    Send the receipts that are due, at most `limit`, in HLC order.

    `send(receipt)` returns the OFD's time (whole Unix seconds). If it raises `DeliveryRejected`, the receipt is
    dead-lettered at once. `DeliveryUnavailable`, `ConnectionError` and `TimeoutError` mean an outage: the receipt and
    the rest of the batch are released, and no attempt is counted. Any other `Exception` counts an attempt, and the next
    receipt is sent. A `BaseException` such as `KeyboardInterrupt` releases the unsent receipts and propagates.

    Each receipt is sent at least once. It is sent again if this process dies, is interrupted or loses the lease between
    the send and its record, and if `send` raises although the OFD has accepted the receipt. Each call that claimed
    something logs events; during an outage only the first call does, and then the first one after it.

    Raises `ReceiptBufferError` inside `transaction()`, where an outcome cannot be committed at once.
    """
    if not callable(send) or inspect.iscoroutinefunction(send):
        raise TypeError(f"send: expected a plain function of a receipt, got {send!r}; nothing was claimed")
    if repository.in_transaction:
        raise ReceiptBufferError(
            "deliver_pending was called inside transaction(): the outcomes would not be stored before that commit, and "
            "other writers would have to wait. Nothing was sent. Call it outside."
        )
    batch = repository.claim_pending(limit)
    if not batch:
        return DeliveryReport({})
    return _Run(repository, send, batch).deliver()


class _Run:
    """The delivery of one claimed batch."""

    def __init__(self, repository: ReceiptRepository, send: Send, batch: list[Receipt]) -> None:
        self._repository = repository
        self._send = send
        self._batch = batch
        self._claimed = monotonic()
        self._outcomes: dict[str, Outcome] = {}
        self._is_start_logged = False

    def deliver(self) -> DeliveryReport:
        was_offline = _is_offline(self._repository)
        if not was_offline:
            self._log_start()
        outage: str | None = None
        for position, receipt in enumerate(self._batch):
            try:
                self._outcomes[receipt.id] = self._deliver(receipt)
            except OUTAGE as error:
                outage = _describe(error)
                self._release(position)
                break
            except BaseException:
                # The buffer itself failed, or the process was asked to stop.
                with contextlib.suppress(ReceiptBufferError):
                    self._release(position)
                raise
        self._log_end(outage)
        return DeliveryReport(self._outcomes, outage)

    def _deliver(self, receipt: Receipt) -> Outcome:
        try:
            self._keep_lease(receipt)
            return self._record(receipt, self._attempt(receipt))
        except (LeaseLostError, ReceiptNotFoundError, InvalidTransitionError):
            return Outcome.LEASE_LOST

    def _keep_lease(self, receipt: Receipt) -> None:
        """Raise `LeaseLostError` if another worker may have the receipt; renew the lease after half of its time."""
        token, taken, expires = str(receipt.lease_token), receipt.lease_taken_at or 0, receipt.lease_expires_at or 0
        present = self._repository.get_receipt_by_id(receipt.id)
        if present is None or present.lease_token != token:
            raise LeaseLostError(receipt.id, "gone" if present is None else present.status)
        if monotonic() - self._claimed > (expires - taken) / 2:
            self._repository.renew_lease(receipt.id, token, lease_seconds=expires - taken)

    def _attempt(self, receipt: Receipt) -> int | Exception:
        """Send the receipt; returns the OFD's time, or the error that counts as an attempt. Raises on an outage."""
        try:
            return arguments.whole_number("the answer of send", self._send(receipt), 0)
        except OUTAGE:
            raise
        except Exception as error:  # noqa: BLE001 (any other error of a sender is a failed attempt)
            return error

    def _record(self, receipt: Receipt, answer: int | Exception) -> Outcome:
        if isinstance(answer, int):
            self._log_start()
            self._repository.mark_synced(receipt.id, answer)
            return Outcome.SYNCED
        if isinstance(answer, DeliveryRejected):
            self._log_start()
            self._repository.move_to_dlq(receipt.id, f"rejected by the OFD: {_describe(answer)}")
            return Outcome.DEAD_LETTERED
        status = self._repository.record_failure(receipt.id, _describe(answer), str(receipt.lease_token))
        return Outcome.RETRY if status is ReceiptStatus.PENDING else Outcome.DEAD_LETTERED

    def _release(self, position: int) -> None:
        for receipt in self._batch[position:]:
            try:
                self._repository.release(receipt.id, str(receipt.lease_token))
                self._outcomes[receipt.id] = Outcome.RELEASED
            except (LeaseLostError, ReceiptNotFoundError):
                self._outcomes[receipt.id] = Outcome.LEASE_LOST

    def _log_start(self) -> None:
        if not self._is_start_logged:
            self._repository.log_event(EventType.SYNC_STARTED, metadata={"claimed": len(self._batch)})
            self._is_start_logged = True

    def _log_end(self, outage: str | None) -> None:
        counts: dict[str, object] = dict(Counter(str(outcome) for outcome in self._outcomes.values()))
        if outage is None:
            self._log_start()
            self._repository.log_event(EventType.SYNC_COMPLETED, metadata=counts)
        elif self._is_start_logged:
            counts["error"] = arguments.note("error", outage)
            self._repository.log_event(EventType.SYNC_FAILED, metadata=counts)


def _is_offline(repository: ReceiptRepository) -> bool:
    """Whether the last logged run ended in an outage."""
    failed, completed = (
        repository.get_events(1, event_type=kind) for kind in (EventType.SYNC_FAILED, EventType.SYNC_COMPLETED)
    )
    return bool(failed) and (not completed or failed[0].id > completed[0].id)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
