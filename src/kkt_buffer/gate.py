"""
The write gate: writers of one database queue here before SQLite sees them.

SQLite's own busy handler sleeps and polls, so under load some writer always loses; the kernel's `flock` queue does
not, and a lock is gone with the process that held it. Readers never come here.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from kkt_buffer.errors import BufferBusyError


class WriteGate:
    """
    A lock that one thread of one process holds at a time.

    `path` is the lock file beside the database, or None for a database that only this process sees. `timeout` is in
    seconds.
    """

    def __init__(self, path: Path | None, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._descriptor: int | None = None
        self._owner: int | None = None
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """Wait for the gate. Raises `BufferBusyError` when the timeout is over, or when waiting could never end."""
        if self.is_mine:
            raise BufferBusyError(
                "this thread is inside a write transaction of this engine already, and a second one would wait for "
                "it for ever. Nothing was written by the second. Join the first through ReceiptRepository.transaction()"
            )
        deadline = time.monotonic() + self._timeout
        if not self._lock.acquire(timeout=self._timeout):
            raise self._busy("another thread of this process")
        try:
            self._lock_file(deadline)
        except BaseException:
            self._lock.release()
            raise
        self._owner = threading.get_ident()

    def release(self) -> None:
        """Let the next writer in."""
        self._owner = None
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._lock.release()

    @property
    def is_mine(self) -> bool:
        """Whether the present thread has passed the gate."""
        return self._owner == threading.get_ident()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the gate for a block; inside a write transaction of this thread it is held anyway."""
        if self.is_mine:
            yield
            return
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def close(self) -> None:
        """Close the lock file unless it is in use; the next writer opens it again."""
        if self._lock.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._lock.release()

    def forget(self) -> None:
        """Start afresh in a forked child: the parent's lock is not ours, and its threads are not here."""
        self._close()
        self._owner = None
        self._lock = threading.Lock()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock_file(self, deadline: float) -> None:
        if self._path is None:
            return
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._queue(self._descriptor, deadline)

    def _queue(self, descriptor: int, deadline: float) -> None:
        # flock knows no timeout, and polling it would lose our place: a helper waits in the kernel's queue instead.
        granted: Future[None] = Future()
        threading.Thread(target=_wait, args=(descriptor, granted), daemon=True, name="kkt-buffer gate").start()
        try:
            granted.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            if granted.cancel():
                self._descriptor = None  # the helper closes it when its turn comes
                raise self._busy("another process") from None
            granted.result()

    def _busy(self, holder: str) -> BufferBusyError:
        return BufferBusyError(
            f"{holder} has kept the write lock of this buffer for {self._timeout:g} s. Nothing was written, what the "
            f"buffer holds is safe. Try again; if it persists, look for a hung process that has {self._path} open."
        )


def _wait(descriptor: int, granted: "Future[None]") -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if granted.set_running_or_notify_cancel():
        granted.set_result(None)
    else:
        os.close(descriptor)
