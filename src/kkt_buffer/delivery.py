"""
`deliver_pending`: claim what is due, send each receipt, record at once what became of it.

Nothing here touches the database but through the repository, and no transaction is open while a receipt is sent.
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

# What says that the operator cannot be reached, and nothing about the receipt.
OUTAGE = (DeliveryUnavailable, ConnectionError, TimeoutError)


class Outcome(StrEnum):
    """What became of a claimed receipt."""

    SYNCED = "synced"
    RETRY = "retry"  # an attempt was counted, it waits for its backoff
    DEAD_LETTERED = "dead_lettered"
    RELEASED = "released"  # handed back unharmed
    LEASE_LOST = "lease_lost"  # another worker has it, or it is gone


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """What one call did: the outcome of each receipt by its id, in HLC order, and the outage if there was one."""

    outcomes: dict[str, Outcome]
    outage: str | None = None

    def count(self, outcome: Outcome) -> int:
        """How many receipts had this outcome."""
        return sum(found == outcome for found in self.outcomes.values())


def deliver_pending(repository: ReceiptRepository, send: Send, limit: int = 50) -> DeliveryReport:
    """
    Send the receipts that are due, at most `limit`, in HLC order.

    `send(receipt)` returns the operator's time (whole Unix seconds). If it raises `DeliveryRejected` the receipt is
    dead-lettered at once. `DeliveryUnavailable`, `ConnectionError` and `TimeoutError` mean an outage: the receipt and
    the rest of the batch are released, and no attempt is counted. Any other exception counts an attempt, and the next
    receipt has its turn. What is no `Exception` (`KeyboardInterrupt`) releases what is not yet sent, and propagates.

    Each receipt is sent at least once. It is sent again if this process dies or is interrupted, or its lease runs out,
    between the send and its record, and if `send` raises although the operator has taken it. Events tell of each call
    that found something; of an outage, of its first call and of the first one after it.

    Raises `ReceiptBufferError` inside `transaction()`, where nothing could be recorded at once.
    """
    if not callable(send) or inspect.iscoroutinefunction(send):
        raise TypeError(f"send: expected a plain function of a receipt, got {send!r}; nothing was claimed")
    if repository.in_transaction:
        raise ReceiptBufferError(
            "deliver_pending was called inside transaction(): what it records would wait for that commit while other "
            "writers wait for it. Nothing was sent. Call it outside."
        )
    batch = repository.claim_pending(limit)
    if not batch:
        return DeliveryReport({})
    return _Run(repository, send, batch).deliver()


class _Run:
    """One call's batch, on its way."""

    def __init__(self, repository: ReceiptRepository, send: Send, batch: list[Receipt]) -> None:
        self._repository = repository
        self._send = send
        self._batch = batch
        self._claimed = monotonic()
        self._outcomes: dict[str, Outcome] = {}
        self._told_start = False

    def deliver(self) -> DeliveryReport:
        was_offline = _is_offline(self._repository)
        if not was_offline:
            self._tell_start()
        outage: str | None = None
        for position, receipt in enumerate(self._batch):
            try:
                self._outcomes[receipt.id] = self._deliver(receipt)
            except OUTAGE as error:
                outage = _told(error)
                self._release(position)
                break
            except BaseException:
                # The buffer itself failed, or somebody wants to stop.
                with contextlib.suppress(ReceiptBufferError):
                    self._release(position)
                raise
        self._tell_end(outage)
        return DeliveryReport(self._outcomes, outage)

    def _deliver(self, receipt: Receipt) -> Outcome:
        try:
            self._keep_lease(receipt)
            return self._record(receipt, self._ask(receipt))
        except (LeaseLostError, ReceiptNotFoundError, InvalidTransitionError):
            return Outcome.LEASE_LOST

    def _keep_lease(self, receipt: Receipt) -> None:
        """Do not send what another worker may be sending; and let nobody have it while we do."""
        token, taken, expires = str(receipt.lease_token), receipt.lease_taken_at or 0, receipt.lease_expires_at or 0
        present = self._repository.get_receipt_by_id(receipt.id)
        if present is None or present.lease_token != token:
            raise LeaseLostError(receipt.id, "gone" if present is None else present.status)
        if monotonic() - self._claimed > (expires - taken) / 2:
            self._repository.renew_lease(receipt.id, token, lease_seconds=expires - taken)

    def _ask(self, receipt: Receipt) -> int | Exception:
        """The operator's time, or what is wrong with the receipt; an outage is raised."""
        try:
            return arguments.whole_number("the answer of send", self._send(receipt), 0)
        except OUTAGE:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a sender raises is a failed attempt)
            return error

    def _record(self, receipt: Receipt, answer: int | Exception) -> Outcome:
        if isinstance(answer, int):
            self._tell_start()
            self._repository.mark_synced(receipt.id, answer)
            return Outcome.SYNCED
        if isinstance(answer, DeliveryRejected):
            self._tell_start()
            self._repository.move_to_dlq(receipt.id, f"rejected by the operator: {_told(answer)}")
            return Outcome.DEAD_LETTERED
        status = self._repository.record_failure(receipt.id, _told(answer), str(receipt.lease_token))
        return Outcome.RETRY if status is ReceiptStatus.PENDING else Outcome.DEAD_LETTERED

    def _release(self, position: int) -> None:
        for receipt in self._batch[position:]:
            try:
                self._repository.release(receipt.id, str(receipt.lease_token))
                self._outcomes[receipt.id] = Outcome.RELEASED
            except (LeaseLostError, ReceiptNotFoundError):
                self._outcomes[receipt.id] = Outcome.LEASE_LOST

    def _tell_start(self) -> None:
        if not self._told_start:
            self._repository.log_event(EventType.SYNC_STARTED, metadata={"claimed": len(self._batch)})
            self._told_start = True

    def _tell_end(self, outage: str | None) -> None:
        counts: dict[str, object] = dict(Counter(str(outcome) for outcome in self._outcomes.values()))
        if outage is None:
            self._tell_start()
            self._repository.log_event(EventType.SYNC_COMPLETED, metadata=counts)
        elif self._told_start:
            counts["error"] = arguments.note("error", outage)
            self._repository.log_event(EventType.SYNC_FAILED, metadata=counts)


def _is_offline(repository: ReceiptRepository) -> bool:
    """Whether the last run that is on record ended in an outage."""
    failed, completed = (
        repository.get_events(1, event_type=kind) for kind in (EventType.SYNC_FAILED, EventType.SYNC_COMPLETED)
    )
    return bool(failed) and (not completed or failed[0].id > completed[0].id)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
