"""
The write gate: a queue for the writers of one database, before they reach SQLite.

SQLite's own busy handler sleeps and polls, so under load some writers always time out. Threads of one process wait for
a lock; processes wait in the kernel's `flock` queue, which frees a lock when its holder dies. Readers do not use it.
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
    A lock with one holder at a time, across threads and processes.

    `path` is the lock file beside the database, or None for an in-memory database. `timeout` is in seconds. A holder is
    any object; the gate becomes free when it is garbage-collected. `release` is idempotent, so that a clean-up after an
    exception need not know whether `acquire` succeeded.
    """

    def __init__(self, path: Path | None, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # between the threads of this process
        self._holder: weakref.ref[object] | None = None
        self._mutex = threading.Lock()  # for the clean-up after a garbage-collected holder
        self._thread = 0  # of the holder
        self._descriptor: int | None = None  # of the lock file, between processes
        self._place: _QueuePlace | None = None  # in the queue of processes, while this one waits

    def acquire(self, holder: object) -> None:
        """Wait for the gate. Raises `BufferBusyError` after the timeout, or at once if this thread holds it."""
        self.refuse_second()
        deadline = time.monotonic() + self._timeout
        if not self._take(holder, self._timeout) and not (gc.collect() and self._take(holder, 0)):
            raise self._busy("another thread of this process", "; then restart this process")
        try:
            if self._path is not None:
                self._lock_file(self._path, deadline)
        except BaseException:
            if self._place is not None and self._place.was_taken:
                self._place = None  # pragma: no cover (one instruction wide: see `_take`)
            self._unlock()
            raise

    def release(self, holder: object) -> None:
        """Free the gate if this holder has it."""
        if self._holder is not None and self._holder() is holder:
            self._unlock()

    @property
    def holder_here(self) -> object:
        """The holder of the gate, if this thread took it."""
        return self._holder() if self._holder is not None and self._thread == threading.get_ident() else None

    def refuse_second(self) -> None:
        """Raise if this thread holds the gate: waiting for it would be a deadlock."""
        if self.holder_here is not None:
            raise BufferBusyError(
                "this thread is inside a write transaction of this engine already, and a second one would wait for "
                "it for ever. Nothing was written by the second. Join the first through "
                "ReceiptRepository.transaction(). If an exception was thrown into this thread before, restart this "
                "process."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the gate for a block; inside a write transaction of this thread it is held already."""
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
        """Hold the gate for a block if it is free and its file can be opened; run the block in any case."""
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
        """Reset the gate in a forked child: the parent's lock and threads do not exist here."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._reset()

    def _take(self, holder: object, seconds: float) -> bool:
        """Take the lock of this process and note its holder; False if it was not free in time."""
        thread, held = threading.get_ident(), weakref.ref(holder, self._release_lost)
        taken: list[bool] = []
        try:
            # One call in C: no asynchronous exception can come between taking the lock and recording that in `taken`.
            taken.extend(map(self._lock.acquire, (seconds > 0,), (seconds or -1,)))
            if taken[0]:
                self._thread, self._holder = thread, held
        except BaseException:
            if taken and taken[0] and self._holder is not held:
                self._lock.release()  # pragma: no cover (one instruction wide: test_interruptions tries to hit it)
            raise
        return taken[0]

    def _unlock(self) -> None:
        if self._descriptor is not None and self._place is None:  # else the helper thread has, or awaits, the file lock
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._holder = None
        self._lock.release()

    def _release_lost(self, held: "weakref.ref[object]") -> None:
        """Free the gate if its holder was garbage-collected: an exception prevented closing the connection."""
        with self._mutex:
            if self._holder is held:  # pragma: no branch (else it was released at this very moment)
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
                    self._place = _QueuePlace(descriptor)
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
            f"{holder} has kept the write lock of this buffer for {self._timeout:g} s. Nothing was written; the stored "
            f"receipts are safe. Try again; if it persists, look for a hung process that has {self._path} open"
            f"{last_resort}."
        )


class _Holder:
    """The holder for a block. (`object()` cannot be weakly referenced.)"""


class _QueuePlace:
    """
    A place in the kernel's queue for the lock file, kept by a helper thread: `flock` has no timeout, and polling would
    lose the place.

    When a wait times out, the helper stays, and the next wait uses its place; so a gate has at most one helper. If the
    lock is granted while no thread waits for it, the helper releases it after a second.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.is_granted = False
        self.is_returned = False
        self._ownership = threading.Lock()  # of the file lock: the waiter or the helper, whichever acquires it first
        # Plain locks, released to wake the other thread: an exception could leave a Condition locked.
        self._wakeup, self._accepted = threading.Lock(), threading.Lock()
        self._wakeup.acquire()
        self._accepted.acquire()
        threading.Thread(target=self._run, daemon=True, name="kkt-buffer gate").start()

    def wait(self, seconds: float) -> None:
        """Return when the lock is granted, or the time is over."""
        if not self.is_granted:
            self._wakeup.acquire(timeout=seconds)

    def take(self) -> bool:
        """Take over the file lock; False if the helper has released it already."""
        if not self._ownership.acquire(blocking=False):
            return False
        self._accepted.release()
        return True

    @property
    def was_taken(self) -> bool:
        """Whether a waiter took the lock."""
        return self._ownership.locked() and not self.is_returned

    def _run(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.is_granted = True
        self._wakeup.release()
        if not self._accepted.acquire(timeout=_HANDOVER_SECONDS) and self._ownership.acquire(blocking=False):
            self.is_returned = True
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
