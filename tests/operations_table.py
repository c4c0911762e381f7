"""Every operation of the repository, each once: how it is called with good arguments, and whether it writes."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from builders import NOON, STATUSES, a_receipt, an_id, new_receipt

from kkt_buffer import Receipt, ReceiptRepository

BY_ANNA = {"actor": "Anna", "reason": "the tax table was put right"}


@dataclass(frozen=True)
class Known:
    """What the arguments name: receipts that are there, in `prepared`; some that are not, in `Known.nothing`."""

    pending: str
    failed: str
    synced: str
    claimed: str
    held: str
    lease_token: str

    @classmethod
    def nothing(cls) -> "Known":
        return cls(*(an_id() for _ in range(6)))


class Operation(NamedTuple):
    call: Callable[[Any, Known], Any]
    writes: bool = False


def prepared(repository: ReceiptRepository) -> Known:
    """Store a receipt of each status, of which one is leased to a worker, and a held one."""
    a_receipt(repository)
    [claimed] = repository.claim_pending(1)
    receipts: dict[str, Receipt] = {status: a_receipt(repository, status) for status in ("pending", "failed", "synced")}
    ids = {status: receipt.id for status, receipt in receipts.items()}
    held = repository.insert_receipt(new_receipt(), hold=True)
    return Known(**ids, claimed=claimed.id, held=held, lease_token=str(claimed.lease_token))


def _entered(block: contextlib.AbstractContextManager[Any]) -> None:
    with block:
        pass


# Each is called as on a repository; the functions of `kkt_buffer.buffer` have the same names and arguments.
OPERATIONS = {
    "check_integrity": Operation(lambda buffer, _: buffer.check_integrity()),
    "claim_pending": Operation(lambda buffer, _: buffer.claim_pending(), writes=True),
    "discard_held": Operation(lambda buffer, known: buffer.discard_held(known.held, **BY_ANNA), writes=True),
    "get_buffer_status": Operation(lambda buffer, _: buffer.get_buffer_status()),
    "get_config": Operation(lambda buffer, _: buffer.get_config("buffer_capacity")),
    "get_events": Operation(lambda buffer, _: buffer.get_events(5)),
    "get_pending_receipts": Operation(lambda buffer, _: buffer.get_pending_receipts()),
    "get_receipt_by_id": Operation(lambda buffer, known: buffer.get_receipt_by_id(known.pending)),
    "get_receipts_due": Operation(lambda buffer, _: buffer.get_receipts_due(2 * NOON)),
    "increment_retry_count": Operation(
        lambda buffer, known: buffer.increment_retry_count(known.pending, "an error"), writes=True
    ),
    "insert_receipt": Operation(lambda buffer, _: buffer.insert_receipt(new_receipt()), writes=True),
    "insert_receipts": Operation(lambda buffer, _: buffer.insert_receipts([new_receipt(), new_receipt()]), writes=True),
    "list_dead_letters": Operation(lambda buffer, _: buffer.list_dead_letters()),
    "list_held": Operation(lambda buffer, _: buffer.list_held()),
    "list_receipts": Operation(
        lambda buffer, _: [buffer.list_receipts(status=status, pos_id="till-1") for status in STATUSES]
    ),
    "log_event": Operation(lambda buffer, _: buffer.log_event("circuit_opened"), writes=True),
    "mark_synced": Operation(lambda buffer, known: buffer.mark_synced(known.pending, NOON), writes=True),
    "move_to_dlq": Operation(lambda buffer, known: buffer.move_to_dlq(known.pending, "a reason"), writes=True),
    "why_refused": Operation(lambda buffer, _: buffer.why_refused()),
    "seconds_until_due": Operation(lambda buffer, _: buffer.seconds_until_due()),
    "prune": Operation(lambda buffer, _: buffer.prune(), writes=True),
    "reading": Operation(lambda buffer, _: _entered(buffer.reading())),
    "record_failure": Operation(
        lambda buffer, known: buffer.record_failure(known.claimed, "an error", known.lease_token), writes=True
    ),
    "recover_expired_leases": Operation(lambda buffer, _: buffer.recover_expired_leases(), writes=True),
    "release": Operation(lambda buffer, known: buffer.release(known.claimed, known.lease_token), writes=True),
    "renew_lease": Operation(lambda buffer, known: buffer.renew_lease(known.claimed, known.lease_token), writes=True),
    "renew_leases": Operation(lambda buffer, known: buffer.renew_leases(known.lease_token), writes=True),
    "requeue": Operation(lambda buffer, known: buffer.requeue(known.failed, **BY_ANNA), writes=True),
    "requeue_all": Operation(lambda buffer, _: buffer.requeue_all(**BY_ANNA), writes=True),
    "resolve": Operation(lambda buffer, known: buffer.resolve(known.failed, **BY_ANNA), writes=True),
    "set_config": Operation(lambda buffer, _: buffer.set_config("buffer_capacity", 100), writes=True),
    "transaction": Operation(lambda buffer, _: _entered(buffer.transaction()), writes=True),
    "update_receipt_fiscal_doc": Operation(
        lambda buffer, known: buffer.update_receipt_fiscal_doc(known.held, {"fiscalSign": 3141592653}), writes=True
    ),
    "update_receipt_status": Operation(
        lambda buffer, known: buffer.update_receipt_status(known.pending, "syncing"), writes=True
    ),
}
# These cannot stand in the table: a property, one that writes a file wherever it is told to, and one that closes.
OTHERS = {"backup", "close", "in_transaction"}


def public_names() -> set[str]:
    return {name for name in dir(ReceiptRepository) if not name.startswith("_")}
