"""`Bell`: wakes one waiting thread, also from a signal handler and after a fork."""

import contextlib
import threading
from contextvars import ContextVar


class Bell:
    """
    Wakes one waiting thread. A ring while no thread waits is kept for the next wait.

    `threading.Event` has a lock inside. A signal handler that interrupts its own thread there would wait for ever, and
    so would a forked child.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # unlocked: the bell has rung
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the waiting thread, or the one that waits next."""
        with contextlib.suppress(RuntimeError):  # it has rung already
            self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait until the bell rings, at most `seconds`."""
        self._lock.acquire(timeout=seconds)


# The bell of the worker that runs in this context: its own commits do not ring it.
own_bell: ContextVar[Bell | None] = ContextVar("kkt_buffer_own_bell", default=None)
