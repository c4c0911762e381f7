"""
Transactions: a scoped session for each thread, opened by the outermost block and joined by those inside.

How a transaction begins, commits and fails on the connection is in `engine`.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Engine, Select
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from kkt_buffer.direct import Direct, Driver, Place
from kkt_buffer.errors import BufferDamagedError, ReceiptBufferError
from kkt_buffer.migrate import require
from kkt_buffer.sqlite import refusals
from kkt_buffer.sqlite.engine import READ_ONLY, gate_of, lenient_text

logger = logging.getLogger(__name__)


class _Block:
    """One outermost `with repository.transaction()`, while it is open."""

    __slots__ = ("open", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.open = True


# The blocks of this context. A thread may run many asyncio tasks: what one of them has opened is no business of the
# others.
_opened: ContextVar[tuple[_Block, ...]] = ContextVar("kkt_buffer_transactions", default=())


class Transactions:
    """What every operation stands on."""

    def __init__(
        self,
        engine: Engine,
        *,
        now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._engine = engine
        self._gate = gate_of(engine)
        self._has_schema = False
        self._readers = sessionmaker(engine.execution_options(**{READ_ONLY: True}))
        self._sessions = scoped_session(sessionmaker(engine, expire_on_commit=False))
        self._local = threading.local()
        self._place = Place()
        self._now = now
        self._jitter = jitter

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """
        Open a write transaction, or join this thread's, and yield its session.

        Commits at the end of the outermost block; an exception rolls back the block that it leaves, so that whoever
        catches it inside an outer block can go on there. Every operation called inside belongs to the transaction,
        and is as durable as its commit: not before. Rows of your own that you add to the session are committed with
        the receipts. Keep it short, as other writers wait; in asyncio code, never await inside it.
        """
        outer = self._outer()
        if outer is not None:
            with outer.begin_nested():
                yield outer
            return
        self._require_schema()
        self._tidy()
        block = _Block(self._sessions())
        before = _opened.get()
        try:
            self._local.block = block
            _opened.set((*before, block))
            with block.session.begin():
                yield block.session
        finally:
            block.open = False  # first, and without a call that a signal could interrupt: nobody may join it any more
            _opened.set(before)
            self._sessions.remove()

    def _outer(self) -> Session | None:
        """The session of the block that this thread has open, if this is a task that may go on in it."""
        outer = self._block()
        if outer is None:
            return None
        if outer not in _opened.get():
            raise ReceiptBufferError(
                "another asyncio task of this thread has a transaction open and waits inside it. Nothing was "
                "done. Never await inside transaction(); run it whole in a thread, with asyncio.to_thread."
            )
        return outer.session

    def _tidy(self) -> None:
        """Put right what is left over if a signal interrupted the end of this thread's last block."""
        if self._sessions.registry.has():
            self._sessions.remove()
        self._place.tidy()

    def _direct(self, *, write: bool) -> AbstractContextManager[Driver]:
        """A transaction for one operation that a till runs all day; or the one that this thread has open."""
        if self._block() is not None:
            return self._joined()
        return self._alone(write=write)

    def _alone(self, *, write: bool) -> Direct:
        self._require_schema()
        if write:
            self._tidy()
        return Direct(self._engine, self._place, write=write)

    def _require_schema(self) -> None:
        """Refuse to work on the schema of another release, as long as it has not been seen to be this one's."""
        if not self._has_schema:
            require(self._engine)
            self._has_schema = True

    @contextmanager
    def _joined(self) -> Iterator[Driver]:
        with self._writing() as session:
            yield Driver.of(session)

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """A transaction for an operation, or a part of the one that this thread has open."""
        with refusals.explained(self._engine.url.database), self.transaction() as session:
            yield session

    def _block(self) -> _Block | None:
        block: _Block | None = getattr(self._local, "block", None)
        return block if block is not None and block.open else None

    @property
    def _is_writing(self) -> bool:
        """Whether this thread has a write transaction open, through us or in another way: others wait for it."""
        return self._block() is not None or self._gate.is_mine

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is inside `transaction()`."""
        return self._block() is not None

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        """A session that nobody else has; inside a transaction, it reads what that has written."""
        outer = self._outer()
        if outer is None:
            self._require_schema()
            session = self._readers()
        else:
            outer.flush()
            session = Session(outer.connection(), join_transaction_mode="rollback_only")
        with refusals.explained(self._engine.url.database), session:
            yield session

    def _load(self, statement: Select[Any], **parameters: object) -> list[Any]:
        """Read rows, detached and complete."""
        with self._reading() as session:
            try:
                rows = list(session.scalars(statement, parameters))
            except BufferDamagedError as error:
                # A stray byte in one document must not keep all the others from being delivered.
                logger.error("%s Reading on without them; see check_integrity().", error)  # noqa: TRY400 (it is handled)
                with lenient_text(session.connection()):
                    rows = list(session.scalars(statement, parameters))
        if None in rows:
            logger.error("a row without a key: the file is damaged. Reading on without it; see check_integrity().")
            rows = [row for row in rows if row is not None]
        return rows

    def _seconds(self) -> int:
        return int(self._now())
