"""
Committing together: what several threads want to write at one moment shares a transaction, and the wait for the disk.

There is no thread for it, and nobody waits for company. Who comes when nobody writes *leads*: it opens the transaction,
takes in all who have come by then and while it writes, commits once, tells each what became of its own, and hands the
lead to the first who came too late. The others wait until they are told. What a batch writes and how it is committed is
the repository's; who is in it, who leads, and that everybody is told the truth, is here.

Python runs signal handlers in the main thread alone, and out of them an exception can come between any two steps. So
the main thread neither leads nor waits: it commits for itself. No other thread ever depends on one that a signal can
interrupt.
"""

import copy
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from kkt_buffer.errors import BufferStorageError, ReceiptBufferError

MAX_BATCH = 64  # members of one transaction: other processes wait for its end


class Member:
    """Something to be committed, and what became of it: no `error` means that it is on disk."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._leads = False
        self._told = threading.Lock()  # released once there is something to know
        self._told.acquire()

    def wait(self) -> bool:
        """Wait to be told; returns whether it is that we lead now."""
        self._told.acquire()
        return self._leads

    def tell(self, *, leads: bool) -> None:
        """End the wait: it was committed or has its error, or has to lead."""
        self._leads = leads
        self._told.release()


M = TypeVar("M", bound=Member)


class Batch(Generic[M]):
    """
    The members of one transaction: whoever has come by the time that the next one is asked for.

    Who commits them says so in `committed`.
    """

    def __init__(self, waiting: deque[M]) -> None:
        self._waiting = waiting
        self.members: list[M] = []
        self.committed = False

    def __iter__(self) -> Iterator[M]:
        while self._waiting and len(self.members) < MAX_BATCH:
            self.members.append(self._waiting.popleft())
            yield self.members[-1]

    def fail(self, error: BaseException) -> None:
        """Nothing was committed: that is the error of all of them, or, if it has not even begun, of all who wait."""
        members = self.members or list(self)
        for member in members:
            member.error = _shared(error)


class GroupCommit(Generic[M]):
    """Those who want to commit together."""

    def __init__(self) -> None:
        self.forget()
        _groups.add(self)

    def forget(self) -> None:
        """Start afresh, in a forked child: the threads that waited and led are not here."""
        self._lock = threading.Lock()  # for the two below, and never for longer than it takes to change them
        self._waiting: deque[M] = deque()
        self._is_led = False

    def add(self, member: M, commit: Callable[[Batch[M]], None]) -> None:
        """
        Return when it is committed; raises what kept it from that.

        `commit` is called if it is for us to lead, for a batch that our member is in.
        """
        if threading.get_ident() == threading.main_thread().ident:
            commit(Batch(deque((member,))))
        else:
            with self._lock:
                self._waiting.append(member)
                leads, self._is_led = not self._is_led, True
            if leads or member.wait():
                self._lead(member, commit)
        if member.error is not None:
            raise member.error

    def _lead(self, leader: M, commit: Callable[[Batch[M]], None]) -> None:
        batch = Batch(self._waiting)
        try:
            commit(batch)
        except BaseException as error:  # noqa: BLE001 (whatever it is, `add` raises it; nobody may be left waiting)
            if not batch.committed:
                batch.fail(error)
            leader.error = error
        finally:
            with self._lock:
                following = self._waiting[0] if self._waiting else None
                self._is_led = following is not None
            for member in batch.members:
                if member is not leader:
                    member.tell(leads=False)
            if following is not None:
                following.tell(leads=True)


def _shared(error: BaseException) -> ReceiptBufferError:
    """An exception belongs to one thread: the others get their own."""
    if isinstance(error, ReceiptBufferError):
        own = copy.copy(error)
    else:
        own = BufferStorageError(
            f"the transaction that this shared with other threads was given up ({type(error).__name__}: {error}). "
            "Nothing of it was acknowledged; what was acknowledged before is safe. Try again."
        )
    own.__cause__ = error
    return own


_groups: "weakref.WeakSet[GroupCommit[Any]]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for group in _groups:
        group.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
