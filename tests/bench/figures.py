"""
From calls to rows: blocks of calls in interleaved rounds, medians of the rounds, rows with their budgets.

What is called is in the other modules; this one knows clocks and numbers only.
"""

import gc
import itertools
import statistics
import time
from dataclasses import dataclass
from threading import Barrier
from typing import NamedTuple

WARM_UP = 3  # rounds that are not counted


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    rounds: int = 60
    many: int = 1_000_000  # synced receipts, and events
    backlog: int = 100_000  # the capacity of a full buffer
    starts: int = 20  # pairs of fresh processes
    memory: int = 100_000  # receipts that one process inserts and delivers
    before_pruning: float = 10.0  # seconds
    snapshot: float = 60.0  # seconds for which it has been held
    till: bool = False  # on a till's disk, for which there are other budgets

    def on_good(self, budget):
        """A budget that holds on a good disk."""
        return None if self.till else budget


class Taken(NamedTuple):
    """One block, in µs: a call on the whole (what its round counts for), each of the calls; what a call used."""

    per_call: float
    calls: list
    cpu: float | None = None  # processor time of the whole process, in µs
    syncs: float | None = None


class Figures(NamedTuple):
    """The median of the rounds, and where they say something: the p99 of the calls, and what a call used."""

    median: float
    p99: float | None = None
    cpu: float | None = None  # µs, median of the rounds
    syncs: float | None = None  # mean of the rounds: a checkpoint does not come in each of them


@dataclass(frozen=True)
class Row:
    """
    A line of the table.

    The ratio is ours to the reference, of the medians or of the p99s (`compares`). The budget is the most that the
    ratio may be; with `at_least` the least; with `absolute` it bounds our own figure. A `point` of the plot is that
    many threads of that side, the reference.
    """

    what: str
    unit: str
    ours: Figures
    reference: Figures | None = None
    budget: float | None = None
    compares: str = "median"
    at_least: bool = False
    absolute: bool = False
    point: tuple[int, str] | None = None

    @property
    def ratio(self):
        if self.reference is None:
            return None
        return getattr(self.ours, self.compares) / getattr(self.reference, self.compares)

    @property
    def missed(self):
        if self.budget is None:
            return False
        found = getattr(self.ours, self.compares) if self.absolute else self.ratio
        return found < self.budget if self.at_least else found > self.budget

    def as_dict(self):
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours._asdict(),
            "reference": self.reference and self.reference._asdict(),
            "ratio": self.ratio,
            "compares": self.compares,
            "budget": self.budget,
            "budget_is": f"{'least' if self.at_least else 'most'} {'of ours' if self.absolute else 'ratio'}",
            "missed": self.missed,
            "point": self.point,
        }


# The number of syncs so far; set where they are counted, in `till`.
count_syncs = None


class Meter:
    """What this process uses inside `with`, added up: processor time, and syncs where they are counted."""

    def __init__(self):
        self._cpu, self._syncs = 0, 0

    def __enter__(self):
        self._add(-1)

    def __exit__(self, *_):
        self._add(1)

    def _add(self, sign):
        self._cpu += sign * time.process_time_ns() / 1000
        self._syncs += sign * count_syncs() if count_syncs else 0

    def per_receipt(self, receipts):
        return self._cpu / receipts, self._syncs / receipts if count_syncs else None


def timed(operation):
    """What a call takes, in µs."""
    start = time.perf_counter_ns()
    operation()
    return (time.perf_counter_ns() - start) / 1000


def block(operation, calls, *, receipts=1, after=None):
    """A block of calls of `operation`, each for so many receipts, each followed by one of `after`, off the clock."""

    def run():
        taken, meter = [], Meter()
        for _ in range(calls):
            with meter:
                taken.append(timed(operation) / receipts)
            if after is not None:
                after()
        return Taken(statistics.fmean(taken), taken, *meter.per_receipt(calls * receipts))

    return run


def at_once(pool, threads, operation, calls, *, after=None):
    """
    A block in which so many threads of the pool call the operation so many times each.

    A call on the whole is the time from the first start to the last end by the number of all calls.
    """
    barrier = Barrier(threads)

    def work():
        barrier.wait()
        start = time.perf_counter_ns()
        taken = [timed(operation) for _ in range(calls)]
        return start, taken, time.perf_counter_ns()

    def run():
        meter = Meter()
        with meter:
            done = [job.result() for job in [pool.submit(work) for _ in range(threads)]]
        if after is not None:
            after()
        starts, taken, ends = zip(*done, strict=True)
        receipts = threads * calls
        per_call = (max(ends) - min(starts)) / 1000 / receipts
        return Taken(per_call, [*itertools.chain(*taken)], *meter.per_receipt(receipts))

    return run


def interleaved(blocks, rounds):
    """
    Run every block once in each round, forwards and backwards in turn; for each name what its blocks took.

    So what is compared runs side by side, and each of two neighbours goes first as often as the other.
    """
    taken = {name: [] for name in blocks}
    gc.freeze()  # what setting up has left is nobody's garbage
    warm_up = min(WARM_UP, rounds)
    for number in range(warm_up + rounds):
        for name in reversed(blocks) if number % 2 else blocks:
            gc.collect()  # each block pays for its own garbage only
            taken[name].append(blocks[name]())
    return {name: found[warm_up:] for name, found in taken.items()}


def figures(taken):
    """The figures of one name in what `interleaved` returns."""
    calls = itertools.chain.from_iterable(found.calls for found in taken)
    cpu = [found.cpu for found in taken if found.cpu is not None]
    syncs = [found.syncs for found in taken if found.syncs is not None]
    return Figures(
        statistics.median(found.per_call for found in taken),
        p99(calls),
        statistics.median(cpu) if cpu else None,
        statistics.fmean(syncs) if syncs else None,
    )


def rate(found):
    """The same as receipts per second."""
    return found._replace(median=1_000_000 / found.median, p99=None)


def p99(values):
    return statistics.quantiles(values, n=100, method="inclusive")[98]
