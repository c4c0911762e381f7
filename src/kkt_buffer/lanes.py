"""`Lanes`: several threads work on a batch of receipts, and those of one till come one after the other."""

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context

from kkt_buffer.models import Receipt


class Lanes:
    """
    The receipts of a batch, in their order, for threads that take one after the other.

    `work` returns False, or raises, if no further receipt should be started.
    """

    def __init__(self, batch: Sequence[Receipt], work: Callable[[Receipt], bool]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._waiting = list(batch)
        self._busy: set[str] = set()  # the tills that a thread is working for
        self._errors: list[BaseException] = []

    def run(self, concurrency: int) -> None:
        """Work in this thread and in up to `concurrency` - 1 others; the first error is raised once all have ended."""
        number = min(concurrency, len({receipt.pos_id for receipt in self._waiting}))
        # Daemons: neither an interrupted call nor the end of the program waits for the other threads.
        threads = [
            threading.Thread(target=copy_context().run, args=[self._work_aside], name=f"lane {n}", daemon=True)
            for n in range(1, number)
        ]
        for thread in threads:
            thread.start()
        try:
            self._work_on()
        except Exception as error:  # noqa: BLE001 (raised below)
            self._errors.append(error)
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _work_aside(self) -> None:
        try:
            self._work_on()
        except BaseException as error:  # noqa: BLE001 (raised in the thread that called `run`)
            self._errors.append(error)

    def _work_on(self) -> None:
        """Work until nothing is left for this thread: what is left then is for the threads of those tills."""
        try:
            while (receipt := self._take()) is not None:
                if not self._work(receipt):
                    self._waiting = []
                self._busy.discard(receipt.pos_id)
        except BaseException:
            self._waiting = []
            raise

    def _take(self) -> Receipt | None:
        """The first receipt of a till that no thread is working for."""
        with self._lock:
            waiting = self._waiting
            for number, receipt in enumerate(waiting):
                if receipt.pos_id not in self._busy:
                    self._busy.add(receipt.pos_id)
                    return waiting.pop(number)
        return None
