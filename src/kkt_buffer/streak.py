"""
`Streak`: what the last answers of the OFD say about it.

One receipt that fails is a bad receipt; several different ones in a row are an outage. Each repository has one streak,
for all threads that deliver with it. The database is not used here.
"""

import threading
from collections.abc import Callable
from itertools import islice

MAX_REMEMBERED = 10_000  # receipts that have failed; then the oldest is forgotten
MAX_PAUSE = 3600  # seconds: a wrong Retry-After of the OFD must not stop a till for days


class Streak:
    """
    The failures since the last answer, that is, since the OFD last accepted or rejected a receipt. Safe for threads.

    Failures of `threshold` different receipts are an outage, and so is an error with which the sender reports one. The
    next answer ends it.

    If a receipt fails and then the OFD answers for another, the first becomes a *suspect*: its later failures do not
    count towards an outage. One answer makes at most `threshold` suspects, the earliest failures first. Otherwise one
    success during an outage would blame every waiting receipt.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._threshold = 1
        # Dicts as ordered sets.
        self._failed: dict[str, None] = {}  # have failed, and are no suspects
        self._suspects: dict[str, None] = {}
        self._streak: set[str] = set()  # those of `_failed` that have failed since the last answer
        self._in_a_row = 0  # attempts, of whichever receipts, since the last answer
        self._failed_at = 0.0
        self._has_answered = False
        self._is_open = False
        self._changed_at = 0.0
        self._outage: str | None = None
        self._pause = (0.0, 0.0, "")  # since when, for how many seconds, and why

    @property
    def outage(self) -> str | None:
        """The reason why the OFD counts as down, or None."""
        return self._outage

    @property
    def is_in_doubt(self) -> bool:
        """Whether the last receipt that was tried has failed."""
        return self._in_a_row > 0

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: the OFD is down, and the threshold of attempts have failed in a row."""
        return self._is_open

    @property
    def changed_at(self) -> float:
        """The time at which the circuit opened or closed; 0 if it has never been open."""
        return self._changed_at

    @property
    def has_answered(self) -> bool:
        """Whether the OFD has answered at the last attempt. Before the first attempt nothing is known: False."""
        return self._has_answered

    @property
    def failed_at(self) -> float:
        """The time of the last failed attempt."""
        return self._failed_at

    @property
    def pause(self) -> str | None:
        """The error that came with `retry_after`, while that time lasts; else None."""
        return self._pause[2] if self._pause_left() else None

    def is_suspect(self, receipt_id: str) -> bool:
        """Whether the receipt has failed while the OFD answered for others."""
        return receipt_id in self._suspects

    def answered(self, receipt_id: str) -> None:
        """Note that the OFD has accepted or rejected the receipt."""
        with self._lock:
            self._in_a_row = 0
            self._outage = None
            self._has_answered = True
            self._note_circuit()
            self._streak.clear()
            for known in (self._failed, self._suspects):
                known.pop(receipt_id, None)
            for suspect in list(islice(self._failed, self._threshold)):
                del self._failed[suspect]
                _remember(self._suspects, suspect)

    def failed(self, receipt_id: str, error: str, threshold: int) -> None:
        """Note a failure. The `threshold`-th different receipt in a row starts an outage."""
        with self._lock:
            self._add(receipt_id, threshold)
            if self._outage is None and len(self._streak) >= threshold:
                self._outage = f"{threshold} different receipts have failed in a row, the last one with {error}"
            self._note_circuit()

    def unavailable(self, receipt_id: str, error: str, threshold: int, retry_after: float | None) -> None:
        """Note that the sender has reported an outage, and for how many seconds it should not be called."""
        with self._lock:
            self._add(receipt_id, threshold)
            self._outage = error
            self._note_circuit()
            # Of two senders that were told to wait, the longer wait counts.
            if retry_after is not None and (seconds := min(retry_after, MAX_PAUSE)) > self._pause_left():
                self._pause = (self._now(), seconds, error)

    def _add(self, receipt_id: str, threshold: int) -> None:
        self._threshold = threshold
        self._in_a_row += 1
        self._has_answered = False
        self._failed_at = self._now()
        if receipt_id not in self._suspects:
            _remember(self._failed, receipt_id)
            self._streak.add(receipt_id)

    def _note_circuit(self) -> None:
        is_open = self._outage is not None and self._in_a_row >= self._threshold
        if is_open != self._is_open:
            self._is_open, self._changed_at = is_open, self._now()

    def _pause_left(self) -> float:
        since, seconds, _ = self._pause
        passed = self._now() - since
        # If the clock was set back, the pause is over.
        return seconds - passed if 0 <= passed < seconds else 0


def _remember(ids: dict[str, None], receipt_id: str) -> None:
    ids[receipt_id] = None
    if len(ids) > MAX_REMEMBERED:
        del ids[next(iter(ids))]
