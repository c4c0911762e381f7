"""
Reading and writing receipts: one transaction per public method, or the one that this thread has open.

What a status may become is in `models`; counters, events and guards are triggers, in `schema`; how a transaction
begins, commits and fails is in `engine`; what an argument may be, in `arguments`.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Connection, Engine, Select, Table, bindparam, insert, literal_column, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from kkt_buffer import arguments
from kkt_buffer.engine import READ_ONLY
from kkt_buffer.errors import (
    BufferFullError,
    DuplicateReceiptError,
    InvalidConfigError,
    InvalidTransitionError,
    ReceiptBufferError,
    ReceiptNotFoundError,
)
from kkt_buffer.hlc import HybridTimestamp, successor
from kkt_buffer.models import (
    COMMON_EVENTS,
    CONFIG_RULES,
    HLC_ORDER,
    PENDING_ONLY,
    RARE_EVENTS,
    TRANSITIONS,
    UNDELIVERED,
    BufferEvent,
    ConfigEntry,
    DeadLetter,
    EventType,
    Receipt,
    ReceiptStatus,
)
from kkt_buffer.schema import buffer_status

SECONDS_PER_DAY = 86_400

_receipts = cast("Table", Receipt.__table__)
_dlq = cast("Table", DeadLetter.__table__)

# The hot statements, built once: building one costs more than running it. Literals in the terms that a partial index
# must match, never bound parameters.

# By idx_receipts_hlc.
LAST_HLC = (
    select(_receipts.c.hlc_local_time, _receipts.c.hlc_logical_counter)
    .order_by(_receipts.c.hlc_local_time.desc(), _receipts.c.hlc_logical_counter.desc())
    .limit(1)
)

# By idx_receipts_status.
PENDING = (
    select(Receipt)
    .where(text(PENDING_ONLY))
    .order_by(text(HLC_ORDER), Receipt.hlc_logical_counter)
    .limit(bindparam("limit"))
)

# By the counters, and idx_receipts_undelivered. A failed receipt counts as long as its dead letter is open: the
# operator has not had it. Once that was resolved the receipt is out, on record.
STATUS = select(
    buffer_status,
    select(_receipts.c.created_at)
    .where(
        text(
            UNDELIVERED + " AND (status <> 'failed' OR EXISTS"  # noqa: S608 (our own constant)
            " (SELECT 1 FROM dlq WHERE original_receipt_id = receipts.id AND resolved_at IS NULL))"
        )
    )
    .order_by(_receipts.c.created_at)
    .limit(1)
    .scalar_subquery()
    .label("oldest_undelivered_at"),
    *(
        select(ConfigEntry.value).where(ConfigEntry.key == key).scalar_subquery().label(key)
        for key in ("buffer_capacity", "ofd_deadline_days")
    ),
)

ADD = insert(_receipts)
RECEIPT = select(Receipt).where(Receipt.id == bindparam("receipt_id"))
STATUS_OF = select(_receipts.c.status).where(_receipts.c.id == bindparam("receipt_id"))

_delivered = update(_receipts).values(
    status=literal_column("'synced'"),
    synced_at=bindparam("now"),
    changed_at=bindparam("now"),
    hlc_server_time=bindparam("server_time"),
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
    .values(status=literal_column("'failed'"), changed_at=bindparam("now"))
)
CLOSE_DEAD_LETTER = (
    update(_dlq)
    .where(text("original_receipt_id = :receipt_id AND resolved_at IS NULL"))
    .values(resolved_at=bindparam("now"), resolved_by=bindparam("who"), resolution_reason=bindparam("why"))
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


# The transactions that were opened in this context. A thread may run many asyncio tasks: what one of them has opened
# is no business of the others.
_opened: ContextVar[tuple[Session, ...]] = ContextVar("kkt_buffer_transactions", default=())


class ReceiptRepository:
    """
    The buffer, for any number of threads.

    `engine` comes from `create_buffer_engine`; `now` is the wall clock, in Unix seconds. Every method opens a
    transaction of its own, or joins the one that `transaction()` has open in this thread. What is returned is
    detached and complete.

    Besides what each method names, every one of them raises `BufferStorageError` when the file cannot be read or
    written, and `TypeError` or `ValueError` for an argument of the wrong kind; nothing is changed then.
    """

    def __init__(self, engine: Engine, *, now: Callable[[], float] = time.time) -> None:
        self._readers = sessionmaker(engine.execution_options(**{READ_ONLY: True}))
        self._sessions = scoped_session(sessionmaker(engine, expire_on_commit=False))
        self._now = now

    # Transactions.

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """
        Open a write transaction, or join this thread's, and yield its session.

        Commits at the end of the outermost block; an exception rolls back the block that it leaves, so that whoever
        catches it inside an outer block can go on there. Every operation called inside belongs to the transaction,
        and is as durable as its commit: not before. Rows of your own that you add to the session are committed with
        the receipts. Keep it short, as other writers wait; in asyncio code, never await inside it.
        """
        session = self._sessions()
        if session.in_transaction():
            if session not in _opened.get():
                raise ReceiptBufferError(
                    "another asyncio task of this thread has a transaction open and waits inside it. Nothing was "
                    "done. Never await inside transaction(); run it whole in a thread, with asyncio.to_thread."
                )
            with session.begin_nested():
                yield session
            return
        outer = _opened.get()
        _opened.set((*outer, session))
        try:
            with session.begin():
                yield session
        finally:
            _opened.set(outer)
            self._sessions.remove()

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        if self._sessions.registry.has():
            with self.transaction() as session:
                yield session
        else:
            with self._readers() as session:
                yield session

    def _load(self, statement: Select[Any], **parameters: object) -> list[Any]:
        """Read rows, detached and complete."""
        with self._reading() as session:
            # The session may be the caller's, and know an older state of the same row.
            options = {"populate_existing": True}
            rows = list(session.scalars(statement, parameters, execution_options=options))
            if self._sessions.registry.has():
                for row in rows:
                    session.expunge(row)
        return rows

    def _seconds(self) -> int:
        return int(self._now())

    # Receipts.

    def insert_receipt(self, receipt_data: Mapping[str, Any], *, exist_ok: bool = False) -> str:
        """
        Store a receipt and return its id; when this returns, the receipt is on disk.

        `receipt_data` has `pos_id` (a text), `fiscal_doc` (JSON text, kept byte for byte, or a mapping) and, if the
        caller has one, `id` (a UUID that makes a repetition recognisable). With `exist_ok`, an identical repetition
        returns the id.

        Raises `BufferFullError` at capacity, `DuplicateReceiptError` for a known id.
        """
        return self._insert([arguments.new_receipt(receipt_data)], exist_ok=exist_ok)[0]

    def insert_receipts(self, many: Iterable[Mapping[str, Any]], *, exist_ok: bool = False) -> list[str]:
        """Store all of these receipts, in their order and with one commit, or none. Else like `insert_receipt`."""
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
            with self.transaction() as session:
                self._add(session.connection(), receipts)
        except IntegrityError:
            # The database refused one. Only now is it worth asking which and why.
            with self.transaction() as session:
                connection = session.connection()
                new = self._unknown(connection, receipts, exist_ok=exist_ok)
                self._refuse_if_full(len(new))
                self._add(connection, new)
        return [receipt.id for receipt in receipts]

    def _add(self, connection: Connection, receipts: list[arguments.NewReceipt]) -> None:
        now = self._seconds()
        last = connection.execute(LAST_HLC).first()
        hlc = HybridTimestamp(*last) if last else None
        rows = []
        for receipt in receipts:
            hlc = successor(hlc, now)
            rows.append(
                {
                    "id": receipt.id,
                    "pos_id": receipt.pos_id,
                    "created_at": now,
                    "hlc_local_time": hlc.local_time,
                    "hlc_logical_counter": hlc.logical_counter,
                    "fiscal_doc": receipt.fiscal_doc,
                }
            )
        if rows:
            connection.execute(ADD, rows)

    def _unknown(
        self, connection: Connection, receipts: list[arguments.NewReceipt], *, exist_ok: bool
    ) -> list[arguments.NewReceipt]:
        columns = (_receipts.c.id, _receipts.c.pos_id, _receipts.c.fiscal_doc)
        known: dict[str, tuple[str, str]] = {}
        new = []
        for receipt in receipts:
            stored = connection.execute(select(*columns).where(_receipts.c.id == receipt.id)).first()
            if stored is not None:
                known[receipt.id] = (stored.pos_id, stored.fiscal_doc)
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

    def _refuse_if_full(self, wanted: int) -> None:
        status = self.get_buffer_status()
        undelivered = status.pending + status.syncing
        if wanted and undelivered + wanted > status.capacity:
            raise BufferFullError(undelivered, status.capacity, wanted)

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
        with self.transaction() as session:
            connection = session.connection()
            if connection.execute(MARK_SYNCED, parameters).rowcount:
                return True
            status = _status(connection, receipt_id)
            if status is ReceiptStatus.FAILED:
                connection.execute(
                    CLOSE_DEAD_LETTER,
                    {"receipt_id": receipt_id, "now": now, "who": "delivery", "why": "the receipt was delivered"},
                )
                connection.execute(MARK_FAILED_SYNCED, parameters)
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
        with self.transaction() as session:
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
        with self.transaction() as session:
            connection = session.connection()
            letter = {"receipt_id": receipt_id, "letter_id": str(uuid.uuid4()), "now": now, "why": why}
            if connection.execute(DEAD_LETTER, letter).rowcount:
                connection.execute(FAIL, {"receipt_id": receipt_id, "now": now})
                return True
            status = _status(connection, receipt_id)
            if status is ReceiptStatus.SYNCED:
                raise InvalidTransitionError(receipt_id, status, ReceiptStatus.FAILED)
            return status is not None

    def update_receipt_status(self, receipt_id: str | uuid.UUID, status: str) -> bool:
        """
        Move the receipt to another status; False if there is none, True and no change if it has it already.

        `synced` is `mark_synced` at the present time, `failed` is `move_to_dlq`. Raises `ValueError` for a status
        that does not exist, `InvalidTransitionError` for a move that is not allowed.
        """
        receipt_id = arguments.lookup_id(receipt_id)
        if not isinstance(status, str) or status not in set(ReceiptStatus):
            raise ValueError(f"Invalid status: {status!r}; expected {', '.join(ReceiptStatus)}")
        wanted = ReceiptStatus(status)
        now = self._seconds()
        with self.transaction() as session:
            connection = session.connection()
            found = _status(connection, receipt_id)
            if found is None or found is wanted:
                return found is not None
            if wanted not in TRANSITIONS[found]:
                raise InvalidTransitionError(receipt_id, found, wanted)
            if wanted is ReceiptStatus.SYNCED:
                return self.mark_synced(receipt_id, now)
            if wanted is ReceiptStatus.FAILED:
                return self.move_to_dlq(receipt_id, "status set to failed")
            connection.execute(
                update(_receipts).where(_receipts.c.id == receipt_id).values(status=wanted, changed_at=now)
            )
            return True

    def get_buffer_status(self) -> BufferStatus:
        """How full the buffer is, and until when the operator must have what waits; at the cost of a few lookups."""
        with self._reading() as session:
            row = session.execute(STATUS).one()
        _number("buffer_capacity", row.buffer_capacity)
        days = _number("ofd_deadline_days", row.ofd_deadline_days)
        oldest = row.oldest_undelivered_at
        return BufferStatus(
            **{column: row._mapping[column] for column in buffer_status.c.keys()},  # noqa: SLF001, SIM118 (public API; no dict)
            oldest_undelivered_at=oldest,
            deadline_at=None if oldest is None else oldest + days * SECONDS_PER_DAY,
        )

    # Events and settings.

    def log_event(
        self,
        event_type: str,
        *,
        receipt_id: str | uuid.UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """
        Record an event of the caller's own (a circuit breaker's, a sync run's) and return its number.

        Raises `ValueError` for an unknown type, and for those that begin with `receipt_`: triggers write these.
        """
        if not isinstance(event_type, str) or event_type not in set(EventType) or EventType(event_type).is_fact:
            own = ", ".join(kind for kind in EventType if not kind.is_fact)
            raise ValueError(f"event_type: expected one of {own}, got {event_type!r}")
        event = BufferEvent(
            event_type=event_type,
            receipt_id=None if receipt_id is None else arguments.lookup_id(receipt_id),
            timestamp=self._seconds(),
            details=arguments.details(metadata),
        )
        with self.transaction() as session:
            session.add(event)
            session.flush()
            return event.id

    def get_events(
        self, limit: int = 100, *, event_type: str | None = None, receipt_id: str | uuid.UUID | None = None
    ) -> list[BufferEvent]:
        """The last events, newest first, at most `limit`; of one type or one receipt if that is given."""
        limit = arguments.whole_number("limit", limit, 1)
        statement = select(BufferEvent).order_by(BufferEvent.id.desc()).limit(limit)
        if receipt_id is not None:
            statement = statement.where(
                BufferEvent.receipt_id.is_not(None), BufferEvent.receipt_id == arguments.lookup_id(receipt_id)
            )
        if event_type is not None:
            if not isinstance(event_type, str) or event_type not in set(EventType):
                raise ValueError(f"event_type: expected one of {', '.join(EventType)}, got {event_type!r}")
            statement = statement.where(BufferEvent.event_type == event_type)
            if event_type not in COMMON_EVENTS:
                statement = statement.where(text(RARE_EVENTS))
        return self._load(statement)

    def get_config(self, key: str) -> int | str | None:
        """
        A setting: a whole number for the keys that the buffer reads, the text for others, None if it is not there.

        Raises `InvalidConfigError` if somebody has put nonsense where the buffer needs a number.
        """
        key = arguments.name("key", key)
        with self._reading() as session:
            value = session.scalar(select(ConfigEntry.value).where(ConfigEntry.key == key))
        return _number(key, value) if key in CONFIG_RULES else value

    def set_config(self, key: str, value: int | str) -> None:
        """
        Change a setting. The keys that the buffer reads take a whole number within bounds, others a text.

        Raises `ValueError` for a number out of bounds, or something that is none.
        """
        key = arguments.name("key", key)
        rule = CONFIG_RULES.get(key)
        if rule is None:
            stored = arguments.name("value", value)
        else:
            number = rule.parse(value)
            if number is None:
                raise ValueError(f"{key}: expected {rule.expected}, got {value!r}")
            stored = str(number)
        with self.transaction() as session:
            session.merge(ConfigEntry(key=key, value=stored, updated_at=self._seconds()))
            session.flush()


def _status(connection: Connection, receipt_id: str) -> ReceiptStatus | None:
    return connection.execute(STATUS_OF, {"receipt_id": receipt_id}).scalar()


def _number(key: str, value: str | None) -> int:
    rule = CONFIG_RULES[key]
    number = rule.default if value is None else rule.parse(value)
    if number is None:
        raise InvalidConfigError(key, str(value), rule.expected)
    return number
