"""Receipts: stored, read, and moved from status to status."""

import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from sqlalchemy import Connection, Engine, Table, bindparam, insert, literal_column, null, select, text, update
from sqlalchemy.exc import IntegrityError

from kkt_buffer import arguments
from kkt_buffer.direct import Driver
from kkt_buffer.errors import (
    BufferDamagedError,
    BufferFullError,
    DuplicateReceiptError,
    InvalidConfigError,
    InvalidTransitionError,
    ReceiptNotFoundError,
)
from kkt_buffer.group_commit import Batch, GroupCommit, Member
from kkt_buffer.hlc import HybridTimestamp, successor
from kkt_buffer.models import (
    PENDING_ONLY,
    TRANSITIONS,
    DeadLetter,
    Receipt,
    ReceiptStatus,
    Resolution,
    buffer_state,
)
from kkt_buffer.operations.status import Status, status_by
from kkt_buffer.sqlite import refusals

_receipts = cast("Table", Receipt.__table__)
_dlq = cast("Table", DeadLetter.__table__)

# The hot statements, built once: building one costs more than running it. Literals in the terms that a partial index
# must match, never bound parameters.

LAST_HLC = select(buffer_state.c.hlc_local_time, buffer_state.c.hlc_logical_counter)

# By idx_receipts_status.
PENDING = (
    select(Receipt)
    .where(text(PENDING_ONLY))
    .order_by(Receipt.hlc_local_time, Receipt.hlc_logical_counter)
    .limit(bindparam("limit"))
)

ADD = text(
    "INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc)"
    " VALUES (:id, :pos_id, :created_at, :hlc_local_time, :hlc_logical_counter, :fiscal_doc)"
)
KNOWN = select(_receipts.c.pos_id, _receipts.c.fiscal_doc).where(_receipts.c.id == bindparam("receipt_id"))
RECEIPT = select(Receipt).where(Receipt.id == bindparam("receipt_id"))
STATUS_OF = select(_receipts.c.status).where(_receipts.c.id == bindparam("receipt_id"))

# What a receipt has no more when it leaves a worker's hands.
NO_LEASE = {"lease_token": null(), "lease_taken_at": null(), "lease_expires_at": null()}
NOBODYS = {**NO_LEASE, "next_attempt_at": null()}

_delivered = update(_receipts).values(
    status=literal_column("'synced'"),
    synced_at=bindparam("now"),
    changed_at=bindparam("now"),
    hlc_server_time=bindparam("server_time"),
    **NOBODYS,
)
MARK_SYNCED = _delivered.where(text("id = :receipt_id AND status IN ('pending', 'syncing')"))
MARK_FAILED_SYNCED = _delivered.where(text("id = :receipt_id AND status = 'failed'"))

# The dead letter goes first: a receipt fails through it, and a guard sees to that.
DEAD_LETTER = insert(_dlq).from_select(
    ["id", "original_receipt_id", "failed_at", "reason", "fiscal_doc", "retry_attempts", "last_error"],
    select(
        bindparam("letter_id"),
        _receipts.c.id,
        bindparam("now"),
        bindparam("why"),
        _receipts.c.fiscal_doc,
        _receipts.c.retry_count,
        _receipts.c.last_error,
    ).where(text("id = :receipt_id AND status IN ('pending', 'syncing')")),
)
FAIL = (
    update(_receipts)
    .where(text("id = :receipt_id"))
    .values(status=literal_column("'failed'"), changed_at=bindparam("now"), **NOBODYS)
)
CLOSE_DEAD_LETTER = (
    update(_dlq)
    .where(text("original_receipt_id = :receipt_id AND resolved_at IS NULL"))
    .values(
        resolved_at=bindparam("now"),
        resolved_by=bindparam("who"),
        resolution_reason=bindparam("why"),
        resolution=bindparam("how"),
    )
)


class _Refused(Exception):  # noqa: N818 (never seen outside)
    """The database refused a new receipt."""


class _Insertion(Member):
    """A receipt on its way into the buffer."""

    def __init__(self, receipt: arguments.NewReceipt, *, exist_ok: bool) -> None:
        super().__init__()
        self.receipt = receipt
        self.exist_ok = exist_ok


class Receipts(Status):
    """The operations on receipts."""

    def __init__(
        self,
        engine: Engine,
        *,
        now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(engine, now=now, jitter=jitter)
        self._group: GroupCommit[_Insertion] = GroupCommit()

    def insert_receipt(self, receipt_data: Mapping[str, Any], *, exist_ok: bool = False) -> str:
        """
        Store a receipt and return its id; when this returns, the receipt is on disk.

        `receipt_data` has `pos_id` (a text), `fiscal_doc` (JSON text, kept byte for byte, or a mapping) and, if the
        caller has one, `id` (a UUID that makes a repetition recognisable). With `exist_ok`, an identical repetition
        returns the id.

        Raises `BufferFullError` at capacity, `DuplicateReceiptError` for a known id.
        """
        receipt = arguments.new_receipt(receipt_data)
        if self._is_writing:
            return self._insert([receipt], exist_ok=exist_ok)[0]
        self._group.add(_Insertion(receipt, exist_ok=exist_ok), self._commit)
        return receipt.id

    def insert_receipts(self, many: Iterable[Mapping[str, Any]], *, exist_ok: bool = False) -> list[str]:
        """Store all of these receipts, in their order and with one commit, or none. Else like `insert_receipt`."""
        if isinstance(many, Mapping) or not isinstance(many, Iterable):
            raise TypeError(f"many: expected several receipts, got a {type(many).__name__}")
        receipts = []
        for position, data in enumerate(many):
            try:
                receipts.append(arguments.new_receipt(data))
            except (TypeError, ValueError) as error:
                error.add_note(f"in receipt {position} of the batch, counting from 0; nothing was stored")
                raise
        return self._insert(receipts, exist_ok=exist_ok)

    def _insert(self, receipts: list[arguments.NewReceipt], *, exist_ok: bool) -> list[str]:
        try:
            with self._direct(write=True) as driver:
                try:
                    self._add(driver, receipts)
                except IntegrityError as error:
                    raise _Refused from error
        except _Refused:
            # Only now is it worth asking which and why.
            with self._direct(write=True) as driver:
                new = _unknown(driver, receipts, exist_ok=exist_ok)
                refuse_if_full(driver, len(new))
                self._add(driver, new)
        return [receipt.id for receipt in receipts]

    def _add(self, driver: Driver, receipts: list[arguments.NewReceipt]) -> None:
        now = self._seconds()
        hlc = _last_hlc(driver)
        rows = []
        for receipt in receipts:
            hlc = successor(hlc, now)
            rows.append(_row(receipt, hlc, now))
        driver.execute(ADD, rows)

    def _commit(self, batch: Batch[_Insertion]) -> None:
        """Store single receipts together: one that is refused leaves the others alone."""
        transaction = self._alone(write=True)
        try:
            with transaction as driver:
                now = self._seconds()
                last = _last_hlc(driver)
                for insertion in batch:
                    hlc = successor(last, now)
                    try:
                        driver.execute(ADD, _row(insertion.receipt, hlc, now))
                    except IntegrityError as error:
                        insertion.error = _reason(driver, insertion, error)
                    else:
                        last = hlc
        finally:
            batch.committed = transaction.committed

    def get_pending_receipts(self, limit: int = 50) -> list[Receipt]:
        """The pending receipts that come first in HLC order, at most `limit`."""
        return self._load(PENDING, limit=arguments.whole_number("limit", limit, 1))

    def get_receipt_by_id(self, receipt_id: str | uuid.UUID) -> Receipt | None:
        """The receipt with this id, or None."""
        found: list[Receipt] = self._load(RECEIPT, receipt_id=arguments.lookup_id(receipt_id))
        return found[0] if found else None

    def mark_synced(self, receipt_id: str | uuid.UUID, server_time: int) -> bool:
        """
        Record that the operator has the receipt, at its time `server_time` (Unix seconds); False if there is none.

        A delivery is a fact: it is recorded whatever the status, and whoever reports it. The first `server_time`
        stays. An open dead letter is resolved.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        now = self._seconds()
        parameters = {
            "receipt_id": receipt_id,
            "server_time": arguments.whole_number("server_time", server_time, 0),
            "now": now,
        }
        with self._direct(write=True) as driver:
            if driver.execute(MARK_SYNCED, parameters).rowcount:
                return True
            status = status_of(driver, receipt_id)
            if status is ReceiptStatus.FAILED:
                driver.execute(
                    CLOSE_DEAD_LETTER,
                    {
                        "receipt_id": receipt_id,
                        "now": now,
                        "who": "delivery",
                        "why": "the receipt was delivered",
                        "how": Resolution.DELIVERED,
                    },
                )
                driver.execute(MARK_FAILED_SYNCED, parameters)
            return status is not None

    def increment_retry_count(self, receipt_id: str | uuid.UUID, error: str) -> int:
        """
        Count a failed attempt, keep `error` as the last one, and return the new count.

        Touches neither the status nor a lease, and never dead-letters. Raises `ReceiptNotFoundError`.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        error = arguments.note("error", error)
        statement = (
            update(_receipts)
            .where(_receipts.c.id == receipt_id)
            .values(retry_count=_receipts.c.retry_count + 1, last_error=error, changed_at=self._seconds())
            .returning(_receipts.c.retry_count)
        )
        with self._writing() as session:
            count: int | None = session.connection().execute(statement).scalar_one_or_none()
        if count is None:
            raise ReceiptNotFoundError(receipt_id)
        return count

    def move_to_dlq(self, receipt_id: str | uuid.UUID, reason: str) -> bool:
        """
        Give the receipt up: dead-letter it for an operator to look at. False if there is none; twice is once.

        Raises `InvalidTransitionError` if it was delivered.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        why = arguments.note("reason", reason)
        now = self._seconds()
        with self._writing() as session:
            connection = session.connection()
            letter = {"receipt_id": receipt_id, "letter_id": str(uuid.uuid4()), "now": now, "why": why}
            if connection.execute(DEAD_LETTER, letter).rowcount:
                connection.execute(FAIL, {"receipt_id": receipt_id, "now": now})
                return True
            status = status_of(connection, receipt_id)
            if status is ReceiptStatus.SYNCED:
                raise InvalidTransitionError(receipt_id, status, ReceiptStatus.FAILED)
            return status is not None

    def update_receipt_status(self, receipt_id: str | uuid.UUID, status: str) -> bool:
        """
        Move the receipt to another status; False if there is none, True and no change if it has it already.

        `syncing` takes a lease for `lease_seconds`, `pending` gives it up, `synced` is `mark_synced` at the present
        time, `failed` is `move_to_dlq`. Raises `ValueError` for a status that does not exist, `InvalidTransitionError`
        for a move that is not allowed.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        if not isinstance(status, str) or status not in set(ReceiptStatus):
            raise ValueError(f"Invalid status: {status!r}; expected {', '.join(ReceiptStatus)}")
        wanted = ReceiptStatus(status)
        now = self._seconds()
        with self._writing() as session:
            connection = session.connection()
            found = status_of(connection, receipt_id)
            if found is None or found is wanted:
                return found is not None
            if wanted not in TRANSITIONS[found]:
                raise InvalidTransitionError(receipt_id, found, wanted)
            if wanted is ReceiptStatus.SYNCED:
                return self.mark_synced(receipt_id, now)
            if wanted is ReceiptStatus.FAILED:
                return self.move_to_dlq(receipt_id, "status set to failed")
            lease: dict[str, object] = {**NO_LEASE}
            if wanted is ReceiptStatus.SYNCING:
                lasts = self._numbers("lease_seconds")["lease_seconds"]
                lease = {"lease_token": str(uuid.uuid4()), "lease_taken_at": now, "lease_expires_at": now + lasts}
            connection.execute(update(_receipts).where(_receipts.c.id == receipt_id).values(status=wanted, **lease))
            return True


def status_of(connection: Connection | Driver, receipt_id: str) -> ReceiptStatus | None:
    """The status of a receipt; None if there is none."""
    row = connection.execute(STATUS_OF, {"receipt_id": receipt_id}).fetchone()
    return None if row is None else ReceiptStatus(row[0])


def refuse_if_full(driver: Driver, wanted: int) -> None:
    """Raise `BufferFullError` unless there is room for so many more."""
    status = status_by(driver)
    undelivered = status.pending + status.syncing
    if wanted and undelivered + wanted > status.capacity:
        raise BufferFullError(undelivered, status.capacity, wanted)


def _last_hlc(driver: Driver) -> HybridTimestamp | None:
    last = driver.first(LAST_HLC, {})
    if last is None:
        raise BufferDamagedError.found(driver.connection.database, "buffer_state has no row")
    return HybridTimestamp(*last) if last[1] >= 0 else None


def _row(receipt: arguments.NewReceipt, hlc: HybridTimestamp, now: int) -> dict[str, object]:
    return {
        "id": receipt.id,
        "pos_id": receipt.pos_id,
        "created_at": now,
        "hlc_local_time": hlc.local_time,
        "hlc_logical_counter": hlc.logical_counter,
        "fiscal_doc": receipt.fiscal_doc,
    }


def _reason(driver: Driver, insertion: _Insertion, refused: IntegrityError) -> Exception | None:
    """Why a receipt was refused; None if it is a replay that may be."""
    try:
        if not _unknown(driver, [insertion.receipt], exist_ok=insertion.exist_ok):
            return None
        refuse_if_full(driver, 1)
    except (BufferFullError, DuplicateReceiptError, InvalidConfigError) as error:
        return error
    return refusals.explanation(driver.connection.database, refused) or refused


def _unknown(driver: Driver, receipts: list[arguments.NewReceipt], *, exist_ok: bool) -> list[arguments.NewReceipt]:
    known: dict[str, tuple[str, str]] = {}
    new = []
    for receipt in receipts:
        stored = driver.first(KNOWN, {"receipt_id": receipt.id})
        if stored is not None:
            known[receipt.id] = stored
        if receipt.id in known:
            pos_id, fiscal_doc = known[receipt.id]
            error = DuplicateReceiptError(
                receipt.id,
                same_pos_id=pos_id == receipt.pos_id,
                same_document=fiscal_doc == receipt.fiscal_doc,
            )
            if not (exist_ok and error.identical):
                raise error
        else:
            known[receipt.id] = (receipt.pos_id, receipt.fiscal_doc)
            new.append(receipt)
    return new
