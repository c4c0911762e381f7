"""
The write gate: writers of one database queue here before SQLite sees them.

SQLite's own busy handler sleeps and polls, so under load some writer always loses. Threads of one process wait for a
lock, processes in the kernel's `flock` queue, which frees a lock when its holder dies. Readers never come here.
"""

import contextlib
import fcntl
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kkt_buffer.errors import BufferBusyError

_HANDOVER_SECONDS = 1.0


class WriteGate:
    """
    A lock that one holder in one process has at a time.

    `path` is the lock file beside the database, or None for a database that only this process sees. `timeout` is in
    seconds. A holder is any object; the gate is free again when it is gone. `release` may be called twice, so that a
    clean-up after an exception need not know how far `acquire` came.
    """

    def __init__(self, path: Path | None, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # between the threads of this process
        self._holder: weakref.ref[object] | None = None
        self._mutex = threading.Lock()  # for the clean-up after a holder that is gone
        self._thread = 0  # of the holder
        self._descriptor: int | None = None  # of the lock file, between processes
        self._place: _Place | None = None  # in the queue of processes, while we wait there

    def acquire(self, holder: object) -> None:
        """Wait for the gate. Raises `BufferBusyError` after the timeout, or at once if this thread holds it."""
        self.refuse_second()
        if self._holder is not None and self._holder() is None:
            self._lost(self._holder)
        deadline = time.monotonic() + self._timeout
        if not self._take(holder, self._timeout) and not (gc.collect() and self._take(holder, 0)):
            raise self._busy("another thread of this process", "; then restart this process")
        try:
            if self._path is not None:
                self._lock_file(self._path, deadline)
        except BaseException:
            if self._place is not None and self._place.was_taken:
                self._place = None
            self._unlock()
            raise

    def release(self, holder: object) -> None:
        """Let the next writer in, if it is this holder that keeps it out."""
        if self._holder is not None and self._holder() is holder:
            self._unlock()

    @property
    def holder_here(self) -> object:
        """Who holds the gate, if it is in this thread."""
        return self._holder() if self._holder is not None and self._thread == threading.get_ident() else None

    def refuse_second(self) -> None:
        """Raise if this thread holds the gate: it would wait for itself."""
        if self.holder_here is not None:
            raise BufferBusyError(
                "this thread is inside a write transaction of this engine already, and a second one would wait for "
                "it for ever. Nothing was written by the second. Join the first through "
                "ReceiptRepository.transaction(). If an exception was thrown into this thread before, restart this "
                "process."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the gate for a block; inside a write transaction of this thread it is held anyway."""
        if self.holder_here is not None:
            yield
            return
        holder = _Holder()
        self.acquire(holder)
        try:
            yield
        finally:
            self.release(holder)

    @contextmanager
    def held_if_free(self) -> Iterator[None]:
        """Hold the gate for a block unless somebody else does, or its file cannot be opened."""
        holder = _Holder()
        if not self._take(holder, 0):
            yield
            return
        try:
            if self._path is not None and self._place is None:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._open(self._path), fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            self.release(holder)

    def close(self) -> None:
        """Close the lock file unless it is in use; the next writer opens it again."""
        if self._lock.acquire(blocking=False):
            try:
                if self._place is None and self._descriptor is not None:
                    os.close(self._descriptor)
                    self._descriptor = None
            finally:
                self._lock.release()

    def forget(self) -> None:
        """Start afresh in a forked child: the parent's lock is not ours, and its threads are not here."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._reset()

    def _take(self, holder: object, seconds: float) -> bool:
        """Take the lock of this process and note its holder; False if it was not free in time."""
        thread, held = threading.get_ident(), weakref.ref(holder, self._lost)
        taken: list[bool] = []
        try:
            # One call in C: no exception can come between the lock and the note that we have it.
            taken.extend(map(self._lock.acquire, (seconds > 0,), (seconds or -1,)))
            if taken[0]:
                self._thread, self._holder = thread, held
        except BaseException:
            if taken and taken[0] and self._holder is not held:
                self._lock.release()
            raise
        return taken[0]

    def _unlock(self) -> None:
        if self._descriptor is not None and self._place is None:  # else a helper has the file lock, or waits for it
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._holder = None
        self._lock.release()

    def _lost(self, held: "weakref.ref[object]") -> None:
        """Free the gate from a holder that is gone: an exception kept its connection from being closed."""
        with self._mutex:
            if self._holder is held:
                self._unlock()

    def _open(self, path: Path) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._descriptor

    def _lock_file(self, path: Path, deadline: float) -> None:
        while True:
            descriptor = self._open(path)
            if self._place is None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._place = _Place(descriptor)
                else:
                    return
            self._place.wait(max(0.0, deadline - time.monotonic()))
            if not self._place.is_granted:
                raise self._busy("another process", "")
            is_ours = self._place.take()
            self._place = None
            if is_ours:
                return

    def _busy(self, holder: str, last_resort: str) -> BufferBusyError:
        return BufferBusyError(
            f"{holder} has kept the write lock of this buffer for {self._timeout:g} s. Nothing was written, what the "
            f"buffer holds is safe. Try again; if it persists, look for a hung process that has {self._path} open"
            f"{last_resort}."
        )


class _Holder:
    """Somebody who holds the gate for a block."""


class _Place:
    """
    A place in the kernel's queue for the lock file, kept by a helper thread: `flock` knows no timeout, and polling
    would lose the place.

    When a wait times out the helper stays, and the next wait uses its place; so a gate has at most one. A lock that is
    granted when nobody waits for it is given back after a second.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.is_granted = False
        self.is_returned = False
        self._offer = threading.Lock()  # the file lock belongs to whoever gets this: the waiter, or the helper
        # Plain locks, released to wake the other side: an exception can leave a Condition locked, but not these.
        self._bell, self._answer = threading.Lock(), threading.Lock()
        self._bell.acquire()
        self._answer.acquire()
        threading.Thread(target=self._run, daemon=True, name="kkt-buffer gate").start()

    def wait(self, seconds: float) -> None:
        """Return when the lock is granted, or the time is over."""
        if not self.is_granted:
            self._bell.acquire(timeout=seconds)

    def take(self) -> bool:
        """Whether the file lock is ours now; if not, the helper has given it back."""
        if not self._offer.acquire(blocking=False):
            return False
        self._answer.release()
        return True

    @property
    def was_taken(self) -> bool:
        """Whether a waiter took the lock."""
        return self._offer.locked() and not self.is_returned

    def _run(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.is_granted = True
        self._bell.release()
        if not self._answer.acquire(timeout=_HANDOVER_SECONDS) and self._offer.acquire(blocking=False):
            self.is_returned = True
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
