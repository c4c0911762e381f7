"""
Group commit: operations that several threads call at the same time share a transaction and its wait for the disk.

A thread puts its operation into a queue. If no other thread is committing, it becomes the leader: it takes the lock,
runs all queued operations in one transaction, and commits it. Otherwise it waits until its operation is done or the
lock is free. There is no delay, and a leader that dies is replaced by the next waiting thread.
"""

import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from kkt_buffer.bell import Bell
from kkt_buffer.errors import BufferStorageError, ReceiptBufferError
from kkt_buffer.transaction import NotTogetherError, Transaction, Transactions

POLL_SECONDS = 0.05  # in case a wake-up was lost
MAX_BATCH = 64  # operations in one transaction: other processes wait for its end

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shareable(Generic[A, R]):
    """
    An operation that may share a transaction: `one` runs it for one argument.

    `many` runs it for several arguments with one statement. It raises `NotTogetherError` if that is not possible.
    """

    one: Callable[[Transaction, A], R]
    many: Callable[[Transaction, list[A]], list[R]] | None = None


class _Member:
    """A queued call: its operation, and its result or error."""

    def __init__(self, work: Shareable[Any, Any], argument: object) -> None:
        self.work = work
        self.argument = argument
        self.result: Any = None
        self.error: Exception | None = None
        self.is_committing = False
        self.is_done = False
        self.bell = Bell()

    def finish(self) -> None:
        """Mark the call as committed or refused, and wake its thread."""
        self.is_done = True
        self.bell.ring()


class GroupCommit:
    """The queue of one repository for calls that commit together."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[_Member] = deque()
        self._is_shared = False  # the last commit had several operations

    def run(self, work: Shareable[A, R], argument: A) -> R:
        """Run the operation and return its result once it is committed; inside this thread's transaction, join that."""
        with self._transactions.operation(write=True) as tx:
            if tx.is_begun:
                with tx.connection.begin_nested():
                    return work.one(tx, argument)
            if self._pid != os.getpid():
                self._reset()  # in a forked child the queued threads do not exist
            member = _Member(work, argument)
            try:
                self._waiting.append(member)
                while not member.is_done:
                    if self._lock.locked():
                        member.bell.wait(POLL_SECONDS)
                        continue
                    with self._lock:
                        if not member.is_done:  # pragma: no branch (another thread can be faster, but seldom is)
                            self._lead(tx, member)
            except BaseException:
                # The caller is told of a failure, so no later leader may run this call.
                with contextlib.suppress(ValueError):
                    self._waiting.remove(member)
                raise
            if member.error is not None:
                raise member.error
            result: R = member.result
            return result

    def _lead(self, tx: Transaction, leader: _Member) -> None:
        if leader.is_committing:
            leader.error = BufferStorageError(
                "the transaction that this operation shared with other threads was interrupted while it was "
                "committed, so this operation may be stored or not. What was acknowledged before is safe. Try again: a "
                "receipt with the same id is stored once."
            )
            leader.is_done = True
            return
        members = [leader]
        try:
            try:
                self._commit(tx, members, self._all_together)
            except _RETRY_ONE_BY_ONE:
                if len(members) == 1:
                    raise
                self._commit(tx, members, _one_by_one)
        except (ReceiptBufferError, SQLAlchemyError) as error:
            for member in members[1:]:
                member.error = _copy_for_thread(tx.explain(error))
                member.finish()
            raise
        finally:
            with contextlib.suppress(IndexError):
                self._waiting[0].bell.ring()  # it becomes the next leader

    def _commit(
        self, tx: Transaction, members: list[_Member], run: Callable[[Transaction, list[_Member]], None]
    ) -> None:
        is_begun = False
        try:
            with self._transactions.begun(tx):
                is_begun = True
                run(tx, members)
                for member in members:
                    member.is_committing = True
        finally:
            if not is_begun:
                self._gather(members)  # they would meet the same error
        self._is_shared = len(members) > 1
        for member in members:
            member.finish()

    def _all_together(self, tx: Transaction, members: list[_Member]) -> None:
        """Run the leader's operation and all queued ones, those queued meanwhile included."""
        done = 0
        self._gather(members)
        while done < len(members):
            batch, done = members[done:], len(members)
            for work, group in groupby(batch, key=lambda member: member.work):
                same_work = list(group)
                arguments = [member.argument for member in same_work]
                if work.many is None or len(same_work) == 1:
                    results = [work.one(tx, argument) for argument in arguments]
                else:
                    results = work.many(tx, arguments)
                for member, result in zip(same_work, results, strict=True):
                    member.result = result
            if self._is_shared or len(members) > 1:
                time.sleep(0)  # yields the GIL: threads that the last commit has woken may call again already
            self._gather(members)

    def _gather(self, members: list[_Member]) -> None:
        while self._waiting and len(members) < MAX_BATCH:
            member = self._waiting.popleft()
            if member is not members[0] and not member.is_done:
                members.append(member)


_RETRY_ONE_BY_ONE = (NotTogetherError, ReceiptBufferError, SQLAlchemyError)


def _one_by_one(tx: Transaction, members: list[_Member]) -> None:
    """Run each operation in its own savepoint, so that a refused one does not affect the others."""
    for member in members:
        try:
            with tx.connection.begin_nested():
                member.result = member.work.one(tx, member.argument)
        except (ReceiptBufferError, SQLAlchemyError) as error:
            if tx.connection.invalidated:
                raise
            member.error = tx.explain(error)


def _copy_for_thread(error: Exception) -> ReceiptBufferError:
    """A copy of the error for another thread: two threads must not raise the same exception object."""
    if isinstance(error, ReceiptBufferError):
        own = copy.copy(error)
    else:
        own = BufferStorageError(
            f"the transaction that this operation shared with other threads failed ({type(error).__name__}: {error}). "
            "This operation was not stored; what was acknowledged before is safe. Try again."
        )
    own.__cause__ = error
    return own
