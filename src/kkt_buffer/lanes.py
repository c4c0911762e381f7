"""`Lanes`: several threads send one batch; the receipts of one till are sent one at a time, in order."""

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context

from kkt_buffer.models import Receipt


class Lanes:
    """
    A batch in HLC order. Each thread takes the first receipt of a till that no other thread works for.

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
        threads: list[threading.Thread] = []
        try:
            try:
                threads.extend(self._start(f"lane {n}") for n in range(1, number))
                self._work_on()
            except Exception as error:  # noqa: BLE001 (raised below)
                self._fail(error)
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop()  # an interrupt: the caller hands back what was not started
            raise
        if self._errors:
            raise self._errors[0]

    def _start(self, name: str) -> threading.Thread:
        # A daemon: neither an interrupted call nor the end of the program waits for it.
        thread = threading.Thread(target=copy_context().run, args=[self._work_aside], name=name, daemon=True)
        thread.start()
        return thread

    def _work_aside(self) -> None:
        try:
            self._work_on()
        except BaseException as error:  # noqa: BLE001 (raised in the thread that called `run`)
            self._fail(error)

    def _work_on(self) -> None:
        """Work until no till is free. The receipts left then belong to tills of other threads, which will take them."""
        while (receipt := self._take()) is not None:
            if not self._work(receipt):
                self._stop()
            self._busy.discard(receipt.pos_id)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._stop()

    def _stop(self) -> None:
        with self._lock:
            self._waiting.clear()

    def _take(self) -> Receipt | None:
        """The first receipt of a till that no thread is working for."""
        with self._lock:
            for number, receipt in enumerate(self._waiting):
                if receipt.pos_id not in self._busy:
                    self._busy.add(receipt.pos_id)
                    return self._waiting.pop(number)
        return None
