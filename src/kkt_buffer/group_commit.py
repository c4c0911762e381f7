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
from kkt_buffer.errors import (
    BufferBusyError,
    BufferStorageError,
    DuplicateReceiptError,
    OutcomeUnknownError,
    ReceiptBufferError,
)
from kkt_buffer.transaction import NOT_STORED, PAUSES_SECONDS, NotTogetherError, Transaction, Transactions

POLL_SECONDS = 0.05  # in case a wake-up was lost
MAX_BATCH = 64  # operations in one transaction: other processes wait for its end

A = TypeVar("A", bound=tuple[Any, ...])
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shareable(Generic[A, R]):
    """
    An operation that may share a transaction: `one` runs it for one argument, which begins with the id of a receipt.

    `many` runs it for several arguments with one statement. It raises `NotTogetherError` if that is not possible.
    `again` makes the argument with which it is repeated if its outcome is unknown. With `one_statement`, `one` and
    `many` need no transaction.
    """

    one: Callable[[Transaction, A], R]
    many: Callable[[Transaction, list[A]], list[R]] | None = None
    again: Callable[[A], A] | None = None
    one_statement: bool = False


class _Member:
    """A queued call: its operation, and its result or error."""

    def __init__(self, work: Shareable[Any, Any], argument: tuple[Any, ...]) -> None:
        self.work = work
        self.argument = argument
        self.result: Any = None
        self.error: Exception | None = None
        self.unknown: ReceiptBufferError | None = None  # it was tried, and may be stored
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
            interrupted = "the thread that committed it was interrupted"
            leader.error = OutcomeUnknownError(tx.backend, [str(leader.argument[0])], interrupted)
            leader.is_done = True
            return
        members = [leader]
        try:
            try:
                self._commit_together(tx, members)
            except BufferBusyError:
                raise  # each of them would wait for the lock once more
            except _RETRY_ONE_BY_ONE as error:
                if len(members) == 1 and not isinstance(error, _REPEAT):
                    raise
                self._commit_one_by_one(tx, members, error)
        except (ReceiptBufferError, SQLAlchemyError) as error:
            for member in members[1:]:
                member.error = member.unknown or _own_error(tx, member, error)
                member.finish()
            if leader.unknown is not None or isinstance(error, OutcomeUnknownError):
                raise leader.unknown or _own_error(tx, leader, error) from error
            raise
        finally:
            with contextlib.suppress(IndexError):
                self._waiting[0].bell.ring()  # it becomes the next leader

    def _commit_together(self, tx: Transaction, members: list[_Member]) -> None:
        if tx.backend.is_server:
            self._gather(members)
            if all(member.work.one_statement and member.work is members[0].work for member in members):
                self._commit(tx, members, _in_one_statement, one_statement=True)
                return
        self._commit(tx, members, self._all_together)

    def _commit_one_by_one(self, tx: Transaction, members: list[_Member], error: Exception) -> None:
        for pause in PAUSES_SECONDS:
            _note_unknown(tx, members, error)
            time.sleep(pause)
            try:
                self._commit(tx, members, _one_by_one)
            except _REPEAT as repeat:
                error = repeat
            else:
                return
        _note_unknown(tx, members, error)
        raise error

    def _commit(
        self,
        tx: Transaction,
        members: list[_Member],
        run: Callable[[Transaction, list[_Member]], None],
        *,
        one_statement: bool = False,
    ) -> None:
        is_begun = False
        try:
            with self._transactions.begun(tx, one_statement=one_statement):
                is_begun = True
                for member in members:
                    # One statement commits inside of `run`.
                    member.is_committing = one_statement or member.unknown is not None
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
            for _, group in groupby(batch, key=lambda member: member.work):
                _in_one_statement(tx, list(group))
            if self._is_shared or len(members) > 1:
                time.sleep(0)  # yields the GIL: threads that the last commit has woken may call again already
            self._gather(members)

    def _gather(self, members: list[_Member]) -> None:
        while self._waiting and len(members) < MAX_BATCH:
            member = self._waiting.popleft()
            if member is not members[0] and not member.is_done:
                members.append(member)


_REPEAT = (*NOT_STORED, OutcomeUnknownError)
_RETRY_ONE_BY_ONE = (NotTogetherError, ReceiptBufferError, SQLAlchemyError)


def _in_one_statement(tx: Transaction, members: list[_Member]) -> None:
    """Run the same operation of several calls, with one statement if it can do that."""
    work, arguments = members[0].work, [member.argument for member in members]
    if work.many is None or len(members) == 1:
        results = [work.one(tx, argument) for argument in arguments]
    else:
        results = work.many(tx, arguments)
    for member, result in zip(members, results, strict=True):
        member.result = result


def _note_unknown(tx: Transaction, members: list[_Member], error: Exception) -> None:
    """Note for each operation that was to be committed, and not refused before, that it may be stored."""
    if isinstance(error, OutcomeUnknownError):
        for member in members:
            if member.is_committing and member.error is None:
                member.unknown = _own_error(tx, member, error)


def _one_by_one(tx: Transaction, members: list[_Member]) -> None:
    """
    Run each operation in its own savepoint, so that a refused one does not affect the others.

    A failure says nothing about an earlier try whose outcome is unknown, unless the id is taken.
    """
    for member in members:
        argument = member.argument
        if member.unknown is not None:
            member.error = member.unknown
            if member.work.again is None:
                continue
            argument = member.work.again(argument)
        try:
            with tx.connection.begin_nested():
                member.result = member.work.one(tx, argument)
                member.error = None
        except (ReceiptBufferError, SQLAlchemyError) as error:
            if tx.connection.invalidated or isinstance(error, (*_REPEAT, BufferBusyError)):
                raise
            if member.unknown is None or isinstance(error, DuplicateReceiptError):
                member.error = tx.explain(error)


def _own_error(tx: Transaction, member: _Member, cause: Exception) -> ReceiptBufferError:
    """The error for one of the operations: two threads must not raise the same object, nor learn each other's ids."""
    error = tx.explain(cause)
    if isinstance(error, OutcomeUnknownError):
        return OutcomeUnknownError(tx.backend, [str(member.argument[0])], error.problem)
    if isinstance(error, ReceiptBufferError):
        own = copy.copy(error)
    else:
        own = BufferStorageError(
            f"the transaction that this operation shared with other threads failed ({type(error).__name__}: {error}). "
            "This operation was not stored; what was acknowledged before is safe. Try again."
        )
    own.__cause__ = error
    return own
