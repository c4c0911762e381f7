"""
The write gate: writers of one database queue here before SQLite sees them.

SQLite's own busy handler sleeps and polls, so under load some writer always loses; processes that wait in the kernel's
`flock` queue do not, and a lock is gone with the process that held it. Readers never come here.
"""

import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from kkt_buffer.errors import BufferBusyError


class WriteGate:
    """
    A lock that one holder in one process has at a time.

    `path` is the lock file beside the database, or None for a database that only this process sees. `timeout` is in
    seconds. A holder is any object; every step can be repeated, so that an exception out of a signal handler, which
    may come between any two of them, leaves nothing that `release` does not put right.
    """

    def __init__(self, path: Path | None, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._descriptor: int | None = None
        self._queued: set[int] = set()  # descriptors that helpers wait with
        # The holder and its thread, in a dict of at most one item: dict.setdefault takes the place in one step.
        self._place: dict[str, tuple[object, int]] = {}
        # The threads that wait for it, in the order in which they came, each with the bell that wakes it.
        self._waiting: deque[tuple[object, threading.Lock]] = deque()

    def acquire(self, holder: object) -> None:
        """Wait for the gate. Raises `BufferBusyError` when the timeout is over, or when waiting could never end."""
        if self.is_mine:
            raise BufferBusyError(
                "this thread is inside a write transaction of this engine already, and a second one would wait for "
                "it for ever. Nothing was written by the second. Join the first through ReceiptRepository.transaction()"
            )
        deadline = time.monotonic() + self._timeout
        try:
            self._take_place(holder, deadline)
            self._lock_file(deadline)
        except BaseException:
            self.release(holder)
            raise

    def release(self, holder: object) -> None:
        """Let the next writer in, if it is this holder that keeps it out."""
        if not self._is_held_by(holder):
            return
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._place.clear()
        with contextlib.suppress(RuntimeError, IndexError):  # it has been rung already; nobody waits
            self._waiting[0][1].release()

    @property
    def is_mine(self) -> bool:
        """Whether the present thread has passed the gate."""
        return self._place.get("", (None, None))[1] == threading.get_ident()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the gate for a block; inside a write transaction of this thread it is held anyway."""
        if self.is_mine:
            yield
            return
        holder = object()
        self.acquire(holder)
        try:
            yield
        finally:
            self.release(holder)

    @contextmanager
    def held_if_free(self) -> Iterator[None]:
        """Hold the gate for a block unless somebody else does, or its file cannot be opened."""
        holder = object()
        try:
            if not self.is_mine and self._place.setdefault("", (holder, threading.get_ident()))[0] is holder:
                with contextlib.suppress(OSError):
                    self._open_and_lock()
            yield
        finally:
            self.release(holder)

    def close(self) -> None:
        """Close the lock file unless it is in use; the next writer opens it again."""
        holder = object()
        if self._place.setdefault("", (holder, threading.get_ident()))[0] is holder:
            self._close()
            self.release(holder)

    def forget(self) -> None:
        """Start afresh in a forked child: the parent's lock is not ours, and its threads are not here."""
        self._close()
        for descriptor in self._queued:  # else this child would keep the lock of a parent that is killed later
            os.close(descriptor)
        self._queued = set()
        self._place = {}
        self._waiting = deque()

    def _is_held_by(self, holder: object) -> bool:
        return self._place.get("", (None, None))[0] is holder

    def _take_place(self, holder: object, deadline: float) -> None:
        place = (holder, threading.get_ident())
        if not self._waiting and self._place.setdefault("", place)[0] is holder:
            return
        me, looks = (holder, _bell()), 0
        try:
            self._waiting.append(me)
            while not (self._may_go(me, looks) and self._place.setdefault("", place)[0] is holder):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._busy("another thread of this process")
                # Everybody looks now and then, should the bell be lost on one who was interrupted.
                me[1].acquire(timeout=min(left, 0.01))
                looks = 0 if self._place else looks + 1
        finally:
            with contextlib.suppress(ValueError):  # one who was in a hurry has taken us for lost
                self._waiting.remove(me)

    def _may_go(self, me: tuple[object, threading.Lock], looks: int) -> bool:
        with contextlib.suppress(IndexError):
            if looks > 1 and self._waiting[0] is not me:
                # Nobody takes the place: whoever is first was interrupted on the way, and is not here any more.
                self._waiting.popleft()
            return looks > 1 or self._waiting[0] is me
        return True

    def _open_and_lock(self) -> int | None:
        if self._path is None:
            return None
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._descriptor

    def _lock_file(self, deadline: float) -> None:
        try:
            self._open_and_lock()
        except BlockingIOError:
            self._queue(deadline)

    def _queue(self, deadline: float) -> None:
        # flock knows no timeout, and polling it would lose our place: a helper waits in the kernel's queue instead. It
        # has the descriptor to itself until it is granted.
        descriptor, self._descriptor = self._descriptor, None
        assert descriptor is not None  # noqa: S101 (it has just been locked by somebody else)
        self._queued.add(descriptor)
        granted: Future[None] = Future()
        try:
            threading.Thread(
                target=_wait, args=(descriptor, granted, self._queued), daemon=True, name="kkt-buffer gate"
            ).start()
            granted.result(max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            # Either the helper closes it when its turn comes, or it has come already.
            if granted.cancel():
                if isinstance(error, TimeoutError):
                    raise self._busy("another process") from None
                raise
            self._descriptor = descriptor
            self._queued.discard(descriptor)
            if not isinstance(error, TimeoutError):
                raise
        self._descriptor = descriptor
        self._queued.discard(descriptor)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _busy(self, holder: str) -> BufferBusyError:
        return BufferBusyError(
            f"{holder} has kept the write lock of this buffer for {self._timeout:g} s. Nothing was written, what the "
            f"buffer holds is safe. Try again; if it persists, look for a hung process that has {self._path} open."
        )


def _bell() -> threading.Lock:
    """A lock that is released to wake one who waits for it. A Condition can be left locked by a signal; this cannot."""
    bell = threading.Lock()
    bell.acquire()
    return bell


def _wait(descriptor: int, granted: "Future[None]", queued: set[int]) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if granted.set_running_or_notify_cancel():
        granted.set_result(None)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have a copy of the descriptor
        queued.discard(descriptor)
        os.close(descriptor)
