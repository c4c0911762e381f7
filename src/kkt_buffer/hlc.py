"""
Hybrid logical clock: timestamps that never decrease, even when the system clock is set back.

The algorithm is that of Kulkarni, Demirbas et al., "Logical Physical Clocks and Consistent Snapshots in Globally
Distributed Databases" (2014). Standard library only. A buffer does not use the process-wide clock below: its
database keeps the greatest timestamp, and each insert computes the next one from that, as `successor` does.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kkt_buffer.errors import ClockDriftError

MAX_DRIFT_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class HybridTimestamp:
    """
    A timestamp: Unix seconds, a counter for events in the same second, and the OFD's time once it is known.

    Ordered by `server_time` (else `local_time`), then `logical_counter`.
    """

    local_time: int
    logical_counter: int
    server_time: int | None = None

    def _key(self) -> tuple[int, int]:
        return (self.local_time if self.server_time is None else self.server_time, self.logical_counter)

    def __lt__(self, other: object) -> bool:
        return self._key() < other._key() if isinstance(other, HybridTimestamp) else NotImplemented

    def __le__(self, other: object) -> bool:
        return self._key() <= other._key() if isinstance(other, HybridTimestamp) else NotImplemented

    def __gt__(self, other: object) -> bool:
        return self._key() > other._key() if isinstance(other, HybridTimestamp) else NotImplemented

    def __ge__(self, other: object) -> bool:
        return self._key() >= other._key() if isinstance(other, HybridTimestamp) else NotImplemented


def successor(last: HybridTimestamp | None, wall: int) -> HybridTimestamp:
    """
    The timestamp of an event at wall time `wall` (Unix seconds); always greater than `last`.

    The server time of `last` is ignored: the OFD's clock says nothing about the local one.
    """
    if last is None or wall > last.local_time:
        return HybridTimestamp(wall, 0)
    return HybridTimestamp(last.local_time, last.logical_counter + 1)


class HybridLogicalClock:
    """
    A clock for one process; safe for threads.

    `last` is the timestamp to continue from, `now` the wall clock (Unix seconds), `max_drift` the number of seconds by
    which a remote timestamp may be ahead of the wall clock.
    """

    def __init__(
        self,
        last: HybridTimestamp | None = None,
        *,
        now: Callable[[], float] = time.time,
        max_drift: int = MAX_DRIFT_SECONDS,
    ) -> None:
        self._last = last and replace(last, server_time=None)
        self._now = now
        self._max_drift = max_drift
        self._lock = threading.Lock()

    def now(self) -> HybridTimestamp:
        """A timestamp for a local event or a send event, greater than all before it."""
        with self._lock:
            self._last = successor(self._last, int(self._now()))
            return self._last

    def update(self, remote: HybridTimestamp) -> HybridTimestamp:
        """
        A timestamp for receiving `remote`: greater than `remote` and than all earlier timestamps of this clock.

        Raises `ClockDriftError` when `remote` is more than `max_drift` ahead of the wall clock; the clock is unchanged.
        """
        with self._lock:
            wall = int(self._now())
            ahead = remote.local_time - wall
            if ahead > self._max_drift:
                raise ClockDriftError(ahead, self._max_drift)
            seen = replace(remote, server_time=None)
            last = seen if self._last is None else max(self._last, seen)
            self._last = successor(last, wall)
            return self._last


_process_clock = HybridLogicalClock()


def generate_hlc() -> HybridTimestamp:
    """`HybridLogicalClock.now` on the process-wide clock, for the caller's own events."""
    return _process_clock.now()


def update_hlc_on_receive(remote: HybridTimestamp) -> HybridTimestamp:
    """`HybridLogicalClock.update` on the process-wide clock, for the caller's own events."""
    return _process_clock.update(remote)


def assign_server_time(hlc: HybridTimestamp, server_time: int) -> HybridTimestamp:
    """The same timestamp with the OFD's time (Unix seconds, not negative)."""
    if isinstance(server_time, bool) or not isinstance(server_time, int):
        raise TypeError(f"server_time: expected a whole number of 0 or more, got a {type(server_time).__name__}")
    if server_time < 0:
        raise ValueError(f"server_time: expected a whole number of 0 or more, got {server_time}")
    return replace(hlc, server_time=server_time)
