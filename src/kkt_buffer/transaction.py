"""
Transactions: opened for one operation, or joined.

The backend begins and commits them on its database; the statements of each operation are in `operations`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from sqlalchemy import Connection, CursorResult, Engine, Select, select
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from kkt_buffer import arguments
from kkt_buffer.backend import Backend, Parameters, backend_of
from kkt_buffer.bell import own_bell
from kkt_buffer.config import number_of
from kkt_buffer.errors import (
    BufferBusyError,
    BufferDamagedError,
    BufferStorageError,
    ConnectionLostError,
    DuplicateReceiptError,
    OutcomeUnknownError,
    ReceiptBufferError,
    TransactionConflictError,
)
from kkt_buffer.models import ConfigEntry

logger = logging.getLogger(__name__)

# An operation is repeated after these pauses if the server gave it up, or its connection was lost.
PAUSES_SECONDS = (0.0, 0.05, 0.5, 1.0)

P = ParamSpec("P")
R = TypeVar("R")

_SETTINGS = select(ConfigEntry.key, ConfigEntry.value)


class Transaction:
    """
    The transaction of an operation.

    `connection` is in a transaction all the time. The current time and the settings are read once, at first use. In a
    write transaction this happens under the write lock.
    """

    def __init__(self, backend: Backend, now: Callable[[], float] | None, *, write: bool) -> None:
        self.backend = backend
        self.write = write
        self.receipt_ids: list[str] = []  # added or changed here, for an outcome that is not known
        self.connection: Connection
        self.session: Session  # set in the caller's `transaction()` or `reading()`
        self._clock = now
        self._now: int | None = None
        self._settings: dict[str, str] | None = None
        # Only operations of this thread may join, and only while no other operation runs in it.
        self.thread = threading.get_ident()
        self.is_begun = False
        self.is_busy = True
        self.is_over = False
        self.outer: Transaction | None = None

    @property
    def now(self) -> int:
        """The time of this transaction, in Unix seconds."""
        if self._now is None:
            self._now = arguments.moment(self._clock() if self._clock else self.backend.now(self.connection))
        return self._now

    @property
    def given_now(self) -> int | None:
        """The time of this transaction; None if the server tells it, after the lock was granted."""
        return None if self._clock is None and self.backend.is_server else self.now

    def number(self, key: str) -> int:
        """A setting of the buffer. Raises `InvalidConfigError` if the stored value is invalid."""
        if self._settings is None:
            self._settings = {row.key: row.value for row in self.connection.execute(_SETTINGS)}
        return number_of(key, self._settings.get(key))

    def start_on(self, connection: Connection) -> None:
        """Use this connection from now on, and forget the time and the settings."""
        self.connection = connection
        self.receipt_ids.clear()
        self.is_begun = True
        self._now = self._settings = None

    def changed(self, *receipt_ids: str) -> None:
        """Note that receipts are added or changed here."""
        self.receipt_ids += receipt_ids

    def forget_settings(self) -> None:
        """Read the settings again at their next use."""
        self._settings = None

    def explain(self, error: Exception) -> Exception:
        """The domain error for an error of a statement; the same error if there is none."""
        return (self.backend.explain(error) if isinstance(error, DBAPIError) else None) or error

    def run(self, sql: str, parameters: Parameters) -> CursorResult[Any]:
        """Run a constant statement with `:name` parameters."""
        return self.backend.run(self.connection, sql, parameters)

    def load(self, statement: Select[Any], **parameters: object) -> list[Any]:
        """Read rows as detached, fully loaded objects."""
        # A separate session, so that the objects of the caller's session stay attached.
        with Session(self.connection, join_transaction_mode="rollback_only") as session:
            try:
                rows = list(session.scalars(statement, parameters))
            except BufferDamagedError as error:
                # Invalid UTF-8 in one document must not stop the delivery of the others.
                logger.error("%s Invalid bytes are read as escapes; see check_integrity().", error)  # noqa: TRY400 (it is handled)
                with self.backend.lenient_text(self.connection):
                    rows = list(session.scalars(statement, parameters))
        if None in rows:
            logger.error("a row has no primary key: the file is damaged. The row is skipped; see check_integrity().")
            rows = [row for row in rows if row is not None]
        return rows


# Nothing of the operation was stored, so it can be repeated.
NOT_STORED = (ConnectionLostError, TransactionConflictError)
Opener: TypeAlias = Callable[[], AbstractContextManager[Transaction]]
Operation: TypeAlias = Callable[Concatenate[Transaction, P], R]


def _once(opened: Opener, operation: Operation[P, R], *args: P.args, **options: P.kwargs) -> R:
    with opened() as tx:
        return operation(tx, *args, **options)


class NotTogetherError(Exception):
    """Several operations cannot be run with one statement: roll back and run them one by one."""


# The innermost transaction of this context: one thread may run many asyncio tasks, each with its own context.
_innermost: ContextVar[Transaction | None] = ContextVar("kkt_buffer_transaction", default=None)


class _Here(threading.local):
    """All open transactions of this thread, in any context."""

    transactions: tuple[Transaction, ...] = ()


_here = _Here()


class Transactions:
    """Opens transactions on one engine, or joins the open transaction of the thread."""

    def __init__(self, engine: Engine, now: Callable[[], float] | None) -> None:
        self.backend = backend_of(engine)
        self._engine = engine
        self._now = now
        # One session per thread.
        self._sessions = scoped_session(sessionmaker(expire_on_commit=False, join_transaction_mode="rollback_only"))

    @property
    def current(self) -> Transaction | None:
        """
        The open transaction of this thread on this engine, or None.

        Raises `ReceiptBufferError` if an operation is running in it: this call comes from inside that operation.
        """
        tx = _innermost.get()
        while tx is not None and (tx.backend is not self.backend or tx.is_over):
            tx = tx.outer
        if tx is None or tx.thread != threading.get_ident():
            if any(other.backend is self.backend and not other.is_over for other in _here.transactions):
                raise ReceiptBufferError(
                    "another asyncio task of this thread has a transaction open and waits inside it. Nothing was "
                    "done. Never await inside transaction(); run it whole in a thread, with asyncio.to_thread."
                )
            return None
        if tx.is_busy:
            raise ReceiptBufferError(
                "an operation of this buffer was called from inside another one of the same thread: by a signal "
                "handler, __del__, an event listener or `now`. This call did nothing; the running operation continues. "
                "Call it afterwards, or in another thread."
            )
        return tx

    def read(self, operation: Operation[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Run an operation in a read transaction; again, if its connection was lost."""
        return self.repeated(lambda: _once(self.reading, operation, *args, **options))

    def write(self, operation: Operation[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Run an operation in a write transaction; again, if nothing of it was stored."""
        return self.repeated(lambda: _once(self.writing, operation, *args, **options))

    def write_one_statement(self, operation: Operation[P, R], *args: P.args, **options: P.kwargs) -> R:
        """The same for an operation of one statement, which needs no transaction around it."""
        return self.repeated(lambda: _once(partial(self.writing, one_statement=True), operation, *args, **options))

    def write_idempotent(
        self, unknown: OutcomeUnknownError | None, operation: Operation[P, R], *args: P.args, **options: P.kwargs
    ) -> R:
        """
        The same, and again if its outcome is unknown, because doing it twice is doing it once.

        `unknown`: the outcome of an earlier try. No later failure tells whether that one was stored.
        """
        return self.repeated(
            lambda: _once(self.writing, operation, *args, **options), (*NOT_STORED, OutcomeUnknownError), unknown
        )

    def repeated(
        self,
        run: Callable[[], R],
        again: tuple[type[Exception], ...] = NOT_STORED,
        unknown: OutcomeUnknownError | None = None,
    ) -> R:
        """Run it; if it raises one of the errors in `again`, run it again, a few times."""
        # Inside a transaction of the caller, only the caller can repeat it, as a whole.
        pauses = PAUSES_SECONDS if self.current is None else ()
        for pause in (*pauses, None):
            try:
                return run()
            except DuplicateReceiptError:
                raise
            except ReceiptBufferError as error:
                if isinstance(error, OutcomeUnknownError):
                    unknown = error
                if pause is None or not isinstance(error, again):
                    if unknown is None or unknown is error:
                        raise
                    raise unknown from error
            time.sleep(pause)
        raise AssertionError  # pragma: no cover (the last try has returned or raised)

    @contextmanager
    def writing(self, *, one_statement: bool = False) -> Iterator[Transaction]:
        """
        A write transaction for one operation: a savepoint in the thread's open transaction, else a new transaction.

        With `one_statement`, the operation needs no transaction around its only statement.
        """
        with (
            self.operation(write=True) as tx,
            tx.connection.begin_nested() if tx.is_begun else self.begun(tx, one_statement=one_statement),
        ):
            yield tx

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """A read transaction for one operation: the thread's open transaction, else a new one."""
        with self.operation(write=False) as tx:
            if tx.is_begun:
                yield tx
            else:
                with self.begun(tx):
                    yield tx

    @contextmanager
    def operation(self, *, write: bool) -> Iterator[Transaction]:
        """
        Mark this thread as inside an operation, and yield its transaction: the open one, or one that is not begun yet.

        An error of a statement is raised as the domain error for it.
        """
        tx = self._to_join(write=write)
        try:
            if tx is None:
                with self._as_innermost(Transaction(self.backend, self._now, write=write)) as tx:
                    yield tx
                return
            try:
                tx.is_busy = True
                tx.session.flush()
                yield tx
            finally:
                tx.is_busy = False
        except DBAPIError as error:
            raise self.backend.explain(error) or error from error.orig

    @contextmanager
    def begun(self, tx: Transaction, *, one_statement: bool = False) -> Iterator[None]:
        """
        Begin a transaction on a connection of the pool and commit it at the end; an exception rolls it back.

        With `one_statement`, the statement that runs in it commits itself, if the backend can do that.
        """
        one_statement = one_statement and self.backend.is_server
        may_be_stored = False
        try:
            with self._connection(write=tx.write, one_statement=one_statement) as connection:
                transaction = connection.begin()
                tx.start_on(connection)
                may_be_stored = one_statement
                try:
                    yield
                    if tx.write:
                        may_be_stored = True
                        transaction.commit()
                        for bell in self.backend.bells - {own_bell.get()}:
                            bell.ring()
                except ConnectionLostError as error:
                    if may_be_stored and not error.is_outcome_known:
                        raise OutcomeUnknownError(self.backend, tx.receipt_ids, error.problem) from error
                    raise
                except (DBAPIError, InvalidRequestError) as error:
                    if not connection.invalidated:
                        raise
                    raise BufferStorageError(
                        f"{self.backend}: the database had to roll the transaction back (see the error before this "
                        "one). Nothing in it was stored; what was acknowledged before is safe. Try again."
                    ) from error
        except DuplicateReceiptError:
            # It says that the receipt is stored. But its transaction was rolled back, and has not waited for replicas.
            if self.backend.is_server and not one_statement:
                with self._connection(write=True, one_statement=True) as connection:
                    self.backend.confirm(connection)
            raise
        finally:
            tx.is_begun = False
            if tx.write:
                self.backend.end()

    def _connection(self, *, write: bool, one_statement: bool) -> Connection:
        try:
            return self.backend.connect(self._engine, write=write, one_statement=one_statement)
        except PoolTimeoutError as error:
            raise BufferBusyError(
                f"{self.backend}: all connections of the pool are in use ({error}). Nothing was done; what was "
                "acknowledged before is safe. Try again, or give the engine a larger pool_size."
            ) from error

    @contextmanager
    def block(self, *, write: bool) -> Iterator[Session]:
        """The caller's transaction, which operations of this thread join; a savepoint if one is open already."""
        tx = self._to_join(write=write)
        if tx is None:
            with self._as_innermost(Transaction(self.backend, self._now, write=write)) as tx, self.begun(tx):
                self._sessions.remove()  # a session left by an exception at the end of this thread's last block
                tx.session = self._sessions(bind=tx.connection)
                try:
                    tx.is_busy = False
                    yield tx.session
                    tx.session.flush()
                finally:
                    tx.is_busy = True
                    self._sessions.remove()
        elif write:
            with tx.session.begin_nested():
                yield tx.session
        else:
            tx.session.flush()
            yield tx.session

    def _to_join(self, *, write: bool) -> Transaction | None:
        """The open transaction of this thread; None if a new one may begin."""
        tx = self.current
        if tx is None:
            if write:
                self.backend.refuse_second()
        elif write and not tx.write:
            raise ReceiptBufferError(
                "a write was asked for inside reading(). Nothing was changed. Call it outside, or use transaction()."
            )
        return tx

    @contextmanager
    def _as_innermost(self, tx: Transaction) -> Iterator[Transaction]:
        tx.outer = _innermost.get()
        try:
            _innermost.set(tx)
            _here.transactions = (*(other for other in _here.transactions if not other.is_over), tx)
            yield tx
        finally:
            tx.is_over = True
            _here.transactions = tuple(other for other in _here.transactions if other is not tx)
            _innermost.set(tx.outer)
