"""A progress line on the terminal for long work; nothing is written where stderr is not a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN = 0.1


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the work done so far and shows it on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    next_time = 0.0

    def report(done: int) -> None:
        nonlocal next_time
        if done >= total or time.monotonic() >= next_time:
            next_time = time.monotonic() + SECONDS_BETWEEN
            share = 100 * done // total if total else 100
            sys.stderr.write(f"\r{what}: {done:,} of {total:,} ({share} %)")
            sys.stderr.flush()

    try:
        yield report
    finally:
        sys.stderr.write("\n")
