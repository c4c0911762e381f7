"""
`ReceiptRepository`: every operation of a buffer.

The statements of each operation are in `operations`; the checks of its arguments are in `arguments`.
"""

import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, overload

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from kkt_buffer import arguments
from kkt_buffer.arguments import ReceiptData, StatusName
from kkt_buffer.backend import backend_of
from kkt_buffer.config import NumberKey
from kkt_buffer.errors import OutcomeUnknownError, ReceiptBufferError
from kkt_buffer.group_commit import A, GroupCommit, R, Shareable
from kkt_buffer.migrate import require
from kkt_buffer.models import BufferEvent, DeadLetter, Receipt, ReceiptStatus
from kkt_buffer.operations import (
    dead_letters,
    events,
    held,
    integrity,
    leases,
    pages,
    pruning,
    receipts,
    settings,
    status,
)
from kkt_buffer.operations.integrity import IntegrityReport
from kkt_buffer.operations.pruning import PruneReport
from kkt_buffer.operations.status import BufferStatus
from kkt_buffer.streak import Streak
from kkt_buffer.transaction import NotTogetherError, Operation, P, Transactions

__all__ = ["BufferStatus", "IntegrityReport", "PruneReport", "ReceiptData", "ReceiptRepository"]

_INSERT = Shareable(receipts.insert_one, receipts.insert_together, again=receipts.again, one_statement=True)
_MARK_SYNCED = Shareable(receipts.mark_synced, receipts.mark_synced_together, again=lambda delivery: delivery)
_RECORD_FAILURE = Shareable(leases.record_failure)


class ReceiptRepository:
    """
    The operations of one buffer. Safe for threads.

    `engine` comes from `create_buffer_engine`; `now` is a wall clock, in Unix seconds (default: that of this machine,
    or of the database server); `jitter` returns a number from 0 to 1, to spread retries. `streak` is the state of the
    deliveries with this repository. Every operation opens its own transaction, or joins the one that `transaction()`
    has open in this thread. Returned objects are detached and fully loaded.

    Besides the errors that each operation names, every one raises `BufferStorageError` when the file cannot be read or
    written, and `TypeError` or `ValueError` for a wrong argument; nothing is changed then. In the examples,
    `repository` is a new one.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        now: Callable[[], float] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.now = now or time.time
        self.streak = Streak(self.now)
        self.engine = engine
        self._transactions = Transactions(engine, now)
        self._group = GroupCommit(self._transactions)
        # On a server inserts have their own queue: their lock must not be held while other statements are on their way.
        self._inserts = GroupCommit(self._transactions) if self._transactions.backend.is_server else self._group
        self._jitter = jitter
        self._has_schema = False

    # Transactions.

    def transaction(self) -> AbstractContextManager[Session]:
        """
        Open a write transaction, or a savepoint in this thread's, and yield its session.

        Commits at the end of the outermost block. An exception rolls back the block that it leaves; if an outer block
        catches it, that block can continue. Every operation called inside belongs to the transaction and is durable
        only after its commit. Your own rows in the session are committed with the receipts. Keep the block short, as
        other writers wait; in asyncio code, never await inside it.

        >>> with repository.transaction() as session:
        ...     receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        ...     event = repository.log_event("sync_started")
        """
        self._require_schema()
        return self._transactions.block(write=True)

    def reading(self) -> AbstractContextManager[Session]:
        """
        Open a read transaction on a consistent snapshot, and yield its session. It blocks no writer.

        Operations that read join it; an operation that writes raises `ReceiptBufferError` before it begins. The
        database refuses the caller's own writes. Inside `transaction()`, it joins that.

        >>> with repository.reading() as session:
        ...     pending = repository.get_buffer_status().pending
        """
        self._require_schema()
        return self._transactions.block(write=False)

    @property
    def in_transaction(self) -> bool:
        """
        Whether this thread is inside `transaction()` or `reading()`.

        >>> repository.in_transaction
        False
        """
        return self._transactions.current is not None

    # Receipts.

    def insert_receipt(self, receipt_data: ReceiptData, *, exist_ok: bool = False, hold: bool = False) -> str:
        """
        Store a receipt and return its id; when this returns, the receipt is on disk.

        `receipt_data` has `pos_id` (str), `fiscal_doc` (JSON text or its UTF-8 bytes, stored byte for byte, or a
        mapping) and optionally `id` (a UUID; it lets the buffer recognise a repeated insert). With `exist_ok`, an
        identical repeated insert returns the id and stores nothing. With `hold`, the receipt is held: it is not
        delivered before `update_receipt_fiscal_doc` has completed it.

        Raises `BufferFullError` at capacity, `DuplicateReceiptError` for a known id.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": {"totalSum": 6490}})
        >>> repository.get_receipt_by_id(receipt_id).fiscal_doc
        '{"totalSum":6490}'
        """
        return self._shared(_INSERT, arguments.new_receipt(receipt_data, exist_ok=exist_ok, hold=hold))

    def insert_receipts(self, many: Iterable[ReceiptData], *, exist_ok: bool = False, hold: bool = False) -> list[str]:
        """
        Store all of these receipts, in their order and with one commit, or none. Otherwise like `insert_receipt`.

        >>> len(repository.insert_receipts({"pos_id": "till-1", "fiscal_doc": "{}"} for _ in range(3)))
        3
        """
        new = arguments.new_receipts(many, exist_ok=exist_ok, hold=hold)
        if not new:
            return []
        self._require_schema()
        try:
            try:
                return self._transactions.write_one_statement(receipts.insert_together, new)
            except NotTogetherError:
                # Only now check the receipts one by one, to name the refused one.
                return self._write(receipts.insert_unknown, new)
        except OutcomeUnknownError as unknown:
            again = [receipts.again(receipt) for receipt in new]
            return self._transactions.write_idempotent(unknown, receipts.insert_unknown, again)

    def get_pending_receipts(self, limit: int = 50) -> list[Receipt]:
        """
        The first pending receipts in HLC order, at most `limit`, without the held ones.

        >>> repository.get_pending_receipts(limit=10)
        []
        """
        limit = arguments.whole_number("limit", limit, 1)
        return self._read(receipts.list_pending, limit)

    def get_receipt_by_id(self, receipt_id: str | uuid.UUID) -> Receipt | None:
        """
        The receipt with this id, or None.

        >>> repository.get_receipt_by_id("123e4567-e89b-42d3-a456-426614174000") is None
        True
        """
        receipt_id = arguments.lookup_id(receipt_id)
        return self._read(receipts.get_receipt, receipt_id)

    def list_receipts(
        self, *, status: str, pos_id: str | None = None, after: Receipt | None = None, limit: int = 100
    ) -> list[Receipt]:
        """
        One page of the receipts of one status, at most `limit`; of one till if `pos_id` is given.

        In HLC order, synced ones in the order of their delivery. `after` is the last receipt of the page before.

        >>> repository.list_receipts(status="failed", limit=10)
        []
        """
        page = arguments.page(status, pos_id, after, limit)
        return self._read(pages.list_receipts, page)

    def mark_synced(self, receipt_id: str | uuid.UUID, server_time: int) -> bool:
        """
        Record that the OFD has accepted the receipt at `server_time` (the OFD's clock, Unix seconds).

        False if there is no such receipt. A delivery is recorded from any status, also by a worker without a lease. The
        first `server_time` is kept. An open dead letter is closed.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> repository.mark_synced(receipt_id, server_time=1_772_366_405)
        True
        """
        receipt_id = arguments.lookup_id(receipt_id)
        return self._shared(_MARK_SYNCED, (receipt_id, arguments.whole_number("server_time", server_time, 0)))

    def increment_retry_count(self, receipt_id: str | uuid.UUID, error: str) -> int:
        """
        Count a failed attempt, store `error` (which may be empty) as the last error, and return the new count.

        Changes neither the status nor the lease, and never dead-letters. Raises `ReceiptNotFoundError`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> repository.increment_retry_count(receipt_id, "HTTP 500")
        1
        """
        receipt_id, error = arguments.lookup_id(receipt_id), arguments.error_text(error)
        return self._write(receipts.increment_retry_count, receipt_id, error)

    def move_to_dlq(self, receipt_id: str | uuid.UUID, reason: str) -> bool:
        """
        Dead-letter the receipt, for an operator to decide. False if there is no such receipt. Idempotent.

        Raises `InvalidTransitionError` if it was delivered.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> repository.move_to_dlq(receipt_id, "unknown tax rate")
        True
        """
        receipt_id, reason = arguments.lookup_id(receipt_id), arguments.note("reason", reason)
        return self._write_idempotent(receipts.move_to_dlq, receipt_id, reason)

    def update_receipt_status(self, receipt_id: str | uuid.UUID, status: ReceiptStatus | StatusName) -> bool:
        """
        Move the receipt to another status; True, without a change, if it has this status already.

        False if there is no such receipt. `syncing` takes a lease for `lease_seconds`, `pending` gives it up, `synced`
        is `mark_synced` at the current time, `failed` is `move_to_dlq`. Raises `ValueError` for a status that does not
        exist, `InvalidTransitionError` for a move that is not allowed, such as `syncing` for a held receipt.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> repository.update_receipt_status(receipt_id, "syncing")
        True
        """
        receipt_id, wanted = arguments.lookup_id(receipt_id), arguments.status(status)
        return self._write(receipts.update_status, receipt_id, wanted)

    # Held receipts: print first, then deliver.

    def update_receipt_fiscal_doc(self, receipt_id: str | uuid.UUID, fields: Mapping[str, Any]) -> bool:
        """
        Merge the fields that the fiscal drive returned into the document of a held receipt, and release it.

        From this commit on it is delivered, in its place in the order. False if there is no such receipt. New fields
        are written before the closing brace, a value that differs is replaced where it stands, every other byte stays.
        Not held any more: True, without a change, if the document has all these fields with these values already. A
        dead-lettered receipt takes the fields too, and goes on waiting for an operator.

        Raises `InvalidTransitionError` for another change of a receipt that is not held, or was discarded.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": '{"totalSum": 10.10}'}, hold=True)
        >>> repository.update_receipt_fiscal_doc(receipt_id, {"fiscalSign": 3141592653})
        True
        >>> [receipt.fiscal_doc for receipt in repository.get_pending_receipts()]
        ['{"totalSum": 10.10,"fiscalSign":3141592653}']
        """
        receipt_id, new_fields = arguments.lookup_id(receipt_id), arguments.new_fields(fields)
        return self._write_idempotent(held.complete, receipt_id, new_fields)

    def list_held(self, limit: int = 100, *, pos_id: str | None = None) -> list[Receipt]:
        """
        The held receipts in HLC order, at most `limit`; of one till if `pos_id` is given.

        After a restart, a till asks its fiscal drive about each of its own: complete what was printed, print or discard
        what was not.

        >>> repository.list_held(pos_id="till-1")
        []
        """
        limit = arguments.whole_number("limit", limit, 1)
        pos_id = None if pos_id is None else arguments.name("pos_id", pos_id)
        return self._read(held.list_held, limit, pos_id)

    def discard_held(self, receipt_id: str | uuid.UUID, *, actor: str, reason: str) -> None:
        """
        Close a held receipt that was never printed. Final: it is dead-lettered and resolved in one commit.

        `actor` is the person or program that decided it, `reason` the reason; both are recorded. Raises
        `InvalidTransitionError` if the receipt is not held, `ReceiptNotFoundError`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"}, hold=True)
        >>> repository.discard_held(receipt_id, actor="till-1", reason="the customer left before it was printed")
        """
        receipt_id = arguments.lookup_id(receipt_id)
        actor, reason = arguments.note("actor", actor), arguments.note("reason", reason)
        self._write(held.discard, receipt_id, actor, reason)

    # Delivery. `kkt_buffer.deliver_pending` is built from these.

    def claim_pending(
        self,
        limit: int = 50,
        *,
        pos_id: str | None = None,
        lease_seconds: int | None = None,
        retries_last: bool = False,
    ) -> list[Receipt]:
        """
        Lease the receipts that are due, at most `limit`, in HLC order; of one till if `pos_id` is given.

        With `retries_last`, those that were never tried come first, then those that have been due for the longest time.

        A receipt is due if it is pending and not in its backoff, or if its lease is over: expired, or taken at a time
        that is now in the future because the clock was set back. All get the same new `lease_token`, valid for
        `lease_seconds` (default: the setting of that name). A worker that needs longer calls `renew_lease`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> [receipt.id == receipt_id for receipt in repository.claim_pending(limit=10)]
        [True]
        """
        limit = arguments.whole_number("limit", limit, 1)
        pos_id = None if pos_id is None else arguments.name("pos_id", pos_id)
        seconds = None if lease_seconds is None else arguments.setting("lease_seconds", lease_seconds)
        wanted = leases.Claim(limit, pos_id, seconds, bool(retries_last), token=str(uuid.uuid4()))
        return self._write_idempotent(leases.claim, wanted)

    def renew_lease(self, receipt_id: str | uuid.UUID, lease_token: str, *, lease_seconds: int | None = None) -> int:
        """
        Extend the lease to `lease_seconds` from now; returns the new expiry (Unix seconds).

        Raises `LeaseLostError` if the token is not the current one, `ReceiptNotFoundError`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> [receipt] = repository.claim_pending()
        >>> repository.renew_lease(receipt.id, receipt.lease_token) >= receipt.lease_expires_at
        True
        """
        receipt_id, token = arguments.lookup_id(receipt_id), arguments.name("lease_token", lease_token)
        seconds = None if lease_seconds is None else arguments.setting("lease_seconds", lease_seconds)
        return self._write_idempotent(leases.renew, receipt_id, token, seconds)

    def renew_leases(self, lease_token: str, *, lease_seconds: int | None = None) -> list[str]:
        """
        Extend every lease of one claim, with one statement; returns the ids of the receipts that are still leased.

        A receipt that is missing in it has an outcome, or another worker may have it: do not send it.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> [receipt] = repository.claim_pending()
        >>> repository.renew_leases(receipt.lease_token) == [receipt.id]
        True
        """
        token = arguments.name("lease_token", lease_token)
        seconds = None if lease_seconds is None else arguments.setting("lease_seconds", lease_seconds)
        return self._write_idempotent(leases.renew_all, token, seconds)

    def release(self, receipt_id: str | uuid.UUID, lease_token: str, *, wait_seconds: int | None = None) -> None:
        """
        Hand a leased receipt back: it is due at once, and no attempt is counted.

        Give `wait_seconds` for a receipt whose attempt failed: it is due again after that time, at most
        `retry_backoff_max`, less a random part of up to a half.

        Raises `LeaseLostError` if the token is not the current one, `ReceiptNotFoundError`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> [receipt] = repository.claim_pending()
        >>> repository.release(receipt.id, receipt.lease_token)
        """
        receipt_id, token = arguments.lookup_id(receipt_id), arguments.name("lease_token", lease_token)
        wait = None if wait_seconds is None else arguments.whole_number("wait_seconds", wait_seconds, 0)
        self._write(leases.release, receipt_id, token, wait, self._jitter)

    def record_failure(self, receipt_id: str | uuid.UUID, error: str, lease_token: str) -> ReceiptStatus:
        """
        Count a failed attempt: the receipt waits for its backoff, or is dead-lettered at `max_retry_attempts`.

        The backoff doubles with each attempt from `retry_backoff_initial` to `retry_backoff_max` seconds. A random part
        of up to a half is subtracted, so that tills do not retry at the same time. `error` (which may be empty) is
        stored, cut to 2,000 characters. Returns the new status, pending or failed.

        Raises `LeaseLostError` if the token is not the current one (nothing is counted then), `ReceiptNotFoundError`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> [receipt] = repository.claim_pending()
        >>> repository.record_failure(receipt.id, "HTTP 400", receipt.lease_token)
        <ReceiptStatus.PENDING: 'pending'>
        """
        receipt_id, error = arguments.lookup_id(receipt_id), arguments.error_text(error)
        token = arguments.name("lease_token", lease_token)
        return self._shared(_RECORD_FAILURE, leases.Failure(receipt_id, token, error, self._jitter))

    def seconds_until_due(self) -> int | None:
        """
        The seconds until `claim_pending` finds a receipt: 0 if it finds one now. None if nothing is waiting.

        That is the next attempt that is due, or the next lease that expires. Takes no lock.

        >>> repository.seconds_until_due() is None
        True
        """
        return self._read(leases.seconds_until_due)

    def recover_expired_leases(self) -> int:
        """
        Make receipts with expired leases pending; returns how many.

        `claim_pending` begins with the same step, so delivery does not need this; it makes the counts right at once.

        >>> repository.recover_expired_leases()
        0
        """
        return self._write_idempotent(leases.recover)

    # Dead letters.

    def list_dead_letters(self, open_only: bool = True, *, limit: int = 100) -> list[DeadLetter]:  # noqa: FBT001, FBT002 (the design's signature)
        """
        The dead letters, oldest first, at most `limit`: the open ones, or all.

        >>> repository.list_dead_letters()
        []
        """
        limit = arguments.whole_number("limit", limit, 1)
        return self._read(dead_letters.list_dead_letters, limit, open_only=open_only)

    def requeue(self, receipt_id: str | uuid.UUID, *, actor: str, reason: str) -> None:
        """
        Make a dead-lettered receipt pending again, with `retry_count` 0; it keeps its place and its deadline.

        `actor` is the person who decided it, `reason` the reason; both are recorded. Raises `BufferFullError` when
        there is no room (it counts as undelivered again), `InvalidTransitionError` when the receipt has no open dead
        letter, `ReceiptNotFoundError`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> repository.move_to_dlq(receipt_id, "unknown tax rate")
        True
        >>> repository.requeue(receipt_id, actor="Anna, support", reason="the OFD has corrected its tax table")
        """
        receipt_id = arguments.lookup_id(receipt_id)
        actor, reason = arguments.note("actor", actor), arguments.note("reason", reason)
        self._write(dead_letters.requeue, receipt_id, actor, reason)

    def requeue_all(self, *, actor: str, reason: str) -> int:
        """
        Requeue the open dead letters in HLC order, as many as fit; returns how many.

        Raises `BufferFullError` if there is an open dead letter and no room at all.

        >>> repository.requeue_all(actor="Anna, support", reason="the OFD has corrected its tax table")
        0
        """
        actor, reason = arguments.note("actor", actor), arguments.note("reason", reason)
        return self._write(dead_letters.requeue_all, actor, reason)

    def resolve(self, receipt_id: str | uuid.UUID, *, actor: str, reason: str) -> None:
        """
        Close a dead letter without sending the receipt. Final: it stays failed, and the 30-day rule ignores it.

        `actor` is the person who decided it, `reason` the reason; both are recorded. Raises
        `InvalidTransitionError` when the receipt has no open dead letter, `ReceiptNotFoundError`.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> repository.move_to_dlq(receipt_id, "a test of the till")
        True
        >>> repository.resolve(receipt_id, actor="Anna, support", reason="not a real sale")
        """
        receipt_id = arguments.lookup_id(receipt_id)
        actor, reason = arguments.note("actor", actor), arguments.note("reason", reason)
        self._write(dead_letters.resolve, receipt_id, actor, reason)

    # Events and settings.

    def log_event(
        self,
        event_type: str,
        *,
        receipt_id: str | uuid.UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """
        Record one of the caller's own events and return its number.

        `event_type` is a name of your own, or one of `EventType`. Raises `ValueError` for a name that begins with
        `receipt_`: the buffer itself records these.

        >>> repository.log_event("shift_opened", metadata={"cashier": "Anna"})
        1
        """
        event_type = arguments.own_event_type(event_type)
        about = None if receipt_id is None else arguments.lookup_id(receipt_id)
        details = arguments.details(metadata)
        return self._write(events.log_event, event_type, about, details)

    def get_events(
        self, limit: int = 100, *, event_type: str | None = None, receipt_id: str | uuid.UUID | None = None
    ) -> list[BufferEvent]:
        """
        The last events, newest first, at most `limit`; only those of one type or one receipt if given.

        >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        >>> [event.event_type for event in repository.get_events(receipt_id=receipt_id)]
        ['receipt_added']
        """
        limit = arguments.whole_number("limit", limit, 1)
        event_type = None if event_type is None else arguments.name("event_type", event_type)
        about = None if receipt_id is None else arguments.lookup_id(receipt_id)
        return self._read(events.get_events, limit, event_type, about)

    @overload
    def get_config(self, key: NumberKey) -> int: ...

    @overload
    def get_config(self, key: str) -> int | str | None: ...

    def get_config(self, key: str) -> int | str | None:
        """
        A setting: an int for the keys that the buffer reads, the text for other keys, None if it is not stored.

        Raises `InvalidConfigError` if the stored value is invalid.

        >>> repository.get_config("buffer_capacity")
        200
        """
        key = arguments.name("key", key)
        return self._read(settings.get_config, key)

    def set_config(self, key: str, value: int | str) -> None:
        """
        Change a setting. The keys that the buffer reads take an int within bounds, other keys a text.

        Raises `ValueError` for a value that is not a number, or out of bounds.

        >>> repository.set_config("buffer_capacity", 500)
        """
        key = arguments.name("key", key)
        stored = arguments.setting_text(key, value)
        self._write_idempotent(settings.set_config, key, stored)

    # The buffer as a whole.

    def get_buffer_status(self) -> BufferStatus:
        """
        The counts, the fill level and the deadline of the oldest undelivered receipt; a few lookups.

        >>> repository.get_buffer_status().percent_full
        0.0
        """
        return self._read(status.get_buffer_status)

    def why_refused(self) -> str | None:
        """
        Why the buffer takes no receipts at all, in words: it was moved, or its server would lose them. Else None.

        >>> repository.why_refused() is None
        True
        """
        return self._read(status.why_refused)

    def get_receipts_due(self, before: int, *, limit: int = 100) -> list[Receipt]:
        """
        The receipts with a deadline before `before` (Unix seconds), most urgent first.

        These are the undelivered receipts, open dead letters included, that are `ofd_deadline_days` old by then.

        >>> repository.get_receipts_due(before=1_772_366_400)
        []
        """
        before, limit = arguments.whole_number("before", before, 0), arguments.whole_number("limit", limit, 1)
        return self._read(status.get_receipts_due, before, limit)

    def prune(self) -> PruneReport:
        """
        Delete synced receipts, closed dead letters and events that are older than their retention.

        Undelivered receipts and receipts with an open dead letter are never deleted. A receipt that a row of any table
        refers to is kept as long as that row. A resolved receipt is deleted with its last dead letter. Uses short
        transactions, so that writers do not wait; inside `transaction()` it joins that.

        >>> repository.prune().receipts
        0
        """
        self._require_schema()
        return pruning.prune(self._transactions)

    def check_integrity(self) -> IntegrityReport:
        """
        Read all of the buffer and report problems. It changes nothing and blocks no writer.

        It checks the pages and indexes of the file, foreign keys, CHECK constraints, text encoding, dead letters,
        counts, settings, the order of timestamps, and each document against its digest. A million receipts take some
        seconds.

        >>> repository.check_integrity().is_sound
        True
        """
        self._require_schema()
        return integrity.check(self._transactions)

    def backup(self, path: str | os.PathLike[str]) -> None:
        """
        Copy a consistent snapshot of the buffer to the file `path`, readable by the owner only. Writers can continue.

        A file at `path` is replaced when the copy is complete and on disk: a crash leaves the old file or the new one.
        The copy is a complete buffer. If stderr is a terminal, progress is shown there.

        Raises `BufferStorageError` if the copy cannot be written, `ReceiptBufferError` inside `transaction()` (its
        changes would not be in the copy), `ValueError` if `path` is the buffer itself.

        >>> repository.backup(folder / "copy.db")
        """
        backend_of(self.engine).refuse_backup()
        self._require_schema()
        if self.in_transaction:
            raise ReceiptBufferError(
                "backup was called inside transaction(): its changes so far would not be in the copy. "
                "Nothing was copied. Call it outside."
            )
        backend_of(self.engine).backup(self.engine, path)

    def close(self) -> None:
        """
        Close the engine's connections that are not in use; the next operation opens one again. Idempotent.

        >>> repository.close()
        """
        self.engine.dispose()

    # The transaction of an operation.

    def _write(self, operation: Operation[P, R], *args: P.args, **options: P.kwargs) -> R:
        self._require_schema()
        return self._transactions.write(operation, *args, **options)

    def _write_idempotent(self, operation: Operation[P, R], *args: P.args, **options: P.kwargs) -> R:
        self._require_schema()
        return self._transactions.write_idempotent(None, operation, *args, **options)

    def _read(self, operation: Operation[P, R], *args: P.args, **options: P.kwargs) -> R:
        self._require_schema()
        return self._transactions.read(operation, *args, **options)

    def _shared(self, work: Shareable[A, R], argument: A) -> R:
        self._require_schema()
        return (self._inserts if work.one_statement else self._group).run(work, argument)

    def _require_schema(self) -> None:
        """Raise `SchemaError` unless the schema is that of this release; checked until it was right once."""
        if not self._has_schema and self._transactions.current is None:
            self._transactions.repeated(lambda: require(self.engine))
            self._has_schema = True
