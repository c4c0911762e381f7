"""
Group commit: operations that several threads call at one moment share a transaction, and its wait for the disk.

Whoever wants to commit puts its operation into a queue and takes one lock. Who gets the lock runs all operations that
wait, in one transaction, and commits it; who finds its own done returns. So there is no leader that could be lost, and
no delay. An operation counts as refused until the COMMIT has returned.
"""

import copy
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from kkt_buffer.errors import BufferStorageError, ReceiptBufferError
from kkt_buffer.transaction import Transaction, Transactions

MAX_BATCH = 64  # operations of one transaction: other processes wait for its end

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shareable(Generic[A, R]):
    """
    An operation that may share a transaction: `one` does it for one argument.

    `many` does it for several at once, faster; it returns None, or raises, where they must be done one by one.
    """

    one: Callable[[Transaction, A], R]
    many: Callable[[Transaction, list[A]], list[R] | None] | None = None


class _Member:
    """One call that waits: what it wants done, and what became of it."""

    def __init__(self, work: Shareable[Any, Any], argument: object) -> None:
        self.work = work
        self.argument = argument
        self.result: Any = None
        self.error: Exception | None = None
        self.is_committing = False
        self.is_done = False


class GroupCommit:
    """The calls of one repository that want to commit together."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[_Member] = deque()

    def run(self, work: Shareable[A, R], argument: A) -> R:
        """Do it, and return its result when it is committed; inside a transaction of this thread, do it there."""
        with self._transactions.operation(write=True) as (tx, is_joined):
            if is_joined:
                with self._transactions.explained(), tx.connection.begin_nested():
                    return work.one(tx, argument)
            if self._pid != os.getpid():
                self._reset()  # a forked child: the threads that waited are not here
            member = _Member(work, argument)
            self._waiting.append(member)
            with self._lock:
                if not member.is_done:
                    self._lead(tx, member)
            if member.error is not None:
                raise member.error
            result: R = member.result
            return result

    def _lead(self, tx: Transaction, leader: _Member) -> None:
        if leader.is_committing:
            leader.error = BufferStorageError(
                "the transaction that this operation shared with other threads was interrupted while it was "
                "committed, so it may be stored or not. What was acknowledged before is safe. Try again: a receipt "
                "with the same id is stored once."
            )
            return
        members = [leader]
        is_begun = False
        try:
            with self._transactions.explained(), self._transactions.begun(tx):
                is_begun = True
                self._gather(members)
                _run(tx, members)
                for member in members:
                    member.is_committing = True
            for member in members:
                member.is_done = True
        except (ReceiptBufferError, SQLAlchemyError) as error:
            if not is_begun:
                self._gather(members)  # they would wait for the same
            for member in members[1:]:
                member.error = _own_copy(error)
                member.is_done = True
            raise

    def _gather(self, members: list[_Member]) -> None:
        """Add those who have come by now, in their order, to the one who leads."""
        while self._waiting and len(members) < MAX_BATCH:
            member = self._waiting.popleft()
            if member is not members[0] and not member.is_done:
                members.append(member)


def _run(tx: Transaction, members: list[_Member]) -> None:
    if len(members) == 1:
        members[0].result = members[0].work.one(tx, members[0].argument)
        return
    for work, group in groupby(sorted(members, key=lambda member: id(member.work)), key=lambda member: member.work):
        alike = list(group)
        if not _run_together(tx, work, alike):
            for member in alike:
                _run_alone(tx, member)


def _run_together(tx: Transaction, work: Shareable[Any, Any], members: list[_Member]) -> bool:
    if work.many is None:
        return False
    savepoint = tx.connection.begin_nested()
    try:
        results = work.many(tx, [member.argument for member in members])
    except (ReceiptBufferError, SQLAlchemyError):
        results = None  # which one, and why, is seen when they are done one by one
    if results is None:
        savepoint.rollback()
        return False
    savepoint.commit()
    for member, result in zip(members, results, strict=True):
        member.result = result
    return True


def _run_alone(tx: Transaction, member: _Member) -> None:
    try:
        with tx.connection.begin_nested():
            member.result = member.work.one(tx, member.argument)
    except (ReceiptBufferError, SQLAlchemyError) as error:
        if tx.connection.invalidated:
            raise
        member.error = tx.explained(error)


def _own_copy(error: Exception) -> ReceiptBufferError:
    """An exception belongs to one thread: each of the others gets its own."""
    if isinstance(error, ReceiptBufferError):
        own = copy.copy(error)
    else:
        own = BufferStorageError(
            f"the transaction that this operation shared with other threads failed ({type(error).__name__}: {error}). "
            "Nothing of it was stored; what was acknowledged before is safe. Try again."
        )
    own.__cause__ = error
    return own
