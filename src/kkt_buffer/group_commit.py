"""
Group commit: operations that several threads call at one moment share a transaction, and its wait for the disk.

A thread puts its operation into a queue. If no other thread is committing, it takes the lock, runs all operations that
wait in one transaction, and commits it; else it waits until its own is done, or the lock is free. So no leader can be
lost, and there is no delay. An operation counts as refused until the COMMIT has returned.
"""

import contextlib
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
from kkt_buffer.transaction import NotTogetherError, Transaction, Transactions

POLL_SECONDS = 0.05  # in case a wake-up was lost
MAX_BATCH = 64  # operations of one transaction: other processes wait for its end

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shareable(Generic[A, R]):
    """
    An operation that may share a transaction: `one` does it for one argument.

    `many` does it for several at once, faster; it raises `NotTogetherError` where they must be done one by one.
    """

    one: Callable[[Transaction, A], R]
    many: Callable[[Transaction, list[A]], list[R]] | None = None


class _Member:
    """One call that waits: what it wants done, and what became of it."""

    def __init__(self, work: Shareable[Any, Any], argument: object) -> None:
        self.work = work
        self.argument = argument
        self.result: Any = None
        self.error: Exception | None = None
        self.is_committing = False
        self.is_done = False
        self.bell = threading.Lock()
        self.bell.acquire()

    def tell(self) -> None:
        """Wake the thread that waits: its call was committed, or refused."""
        self.is_done = True
        self.wake()

    def wake(self) -> None:
        """Let the waiting thread look again."""
        with contextlib.suppress(RuntimeError):  # it was woken already
            self.bell.release()


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
            while not member.is_done:
                if self._lock.locked():
                    member.bell.acquire(timeout=POLL_SECONDS)
                    continue
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
            leader.is_done = True
            return
        members = [leader]
        try:
            try:
                self._commit(tx, members, self._all_together)
            except _REFUSED:
                if len(members) == 1:
                    raise
                self._commit(tx, members, _one_by_one)
        except (ReceiptBufferError, SQLAlchemyError) as error:
            for member in members[1:]:
                member.error = _own_copy(error)
                member.tell()
            raise
        finally:
            with contextlib.suppress(IndexError):
                self._waiting[0].wake()  # it may lead now

    def _commit(
        self, tx: Transaction, members: list[_Member], run: Callable[[Transaction, list[_Member]], None]
    ) -> None:
        is_begun = False
        try:
            with self._transactions.explained(), self._transactions.begun(tx):
                is_begun = True
                run(tx, members)
                for member in members:
                    member.is_committing = True
        finally:
            if not is_begun:
                self._gather(members)  # they would wait for the same
        for member in members:
            member.tell()

    def _all_together(self, tx: Transaction, members: list[_Member]) -> None:
        """Do what the leader wants, and what all others want who have come by now, and come meanwhile."""
        done = 0
        while done < len(members):
            self._gather(members)
            for work, group in groupby(members[done:], key=lambda member: member.work):
                alike = list(group)
                done += len(alike)
                arguments = [member.argument for member in alike]
                if work.many is None or len(alike) == 1:
                    results = [work.one(tx, argument) for argument in arguments]
                else:
                    results = work.many(tx, arguments)
                for member, result in zip(alike, results, strict=True):
                    member.result = result
            self._gather(members)

    def _gather(self, members: list[_Member]) -> None:
        while self._waiting and len(members) < MAX_BATCH:
            member = self._waiting.popleft()
            if member is not members[0] and not member.is_done:
                members.append(member)


_REFUSED = (NotTogetherError, ReceiptBufferError, SQLAlchemyError)


def _one_by_one(tx: Transaction, members: list[_Member]) -> None:
    """Do each in a savepoint: one that is refused leaves the others alone."""
    for member in members:
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
