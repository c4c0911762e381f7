"""`Bell`: wakes one waiting thread, also from a signal handler and after a fork."""

import contextlib
import threading


class Bell:
    """
    A wake-up for one waiting thread; it is remembered until that thread waits.

    `threading.Event` has a lock inside. A signal handler that interrupts its own thread there would wait for ever, and
    so would a forked child.
    """

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        """Wake the waiting thread, or the one that waits next."""
        with contextlib.suppress(RuntimeError):  # it rings already
            self._silent.release()

    def wait(self, seconds: float) -> bool:
        """Wait until the bell rings, at most `seconds`; returns whether it did."""
        return self._silent.acquire(timeout=seconds)
