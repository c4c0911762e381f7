"""
From calls to the table: blocks of calls in interleaved rounds, medians of the rounds, rows with their budgets.

What is called is in the other modules; this one knows clocks and numbers only.
"""

import gc
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

WARM_UP = 3  # rounds that are not counted


class Taken(NamedTuple):
    """One block: what a call took on the whole (what its round counts for), and each of the calls, in µs."""

    per_call: float
    calls: list


class Figures(NamedTuple):
    """The median of the rounds, and the 99th percentile of the single calls where it says something."""

    median: float
    p99: float | None = None


@dataclass(frozen=True)
class Row:
    """
    A line of the table.

    The ratio is ours to the reference, of the medians or of the p99s (`compares`). The budget is the most that the
    ratio may be; with `at_least` the least; with `absolute` it is the most that our own figure may be.
    """

    what: str
    unit: str
    ours: Figures
    reference: Figures | None = None
    budget: float | None = None
    compares: str = "median"
    at_least: bool = False
    absolute: bool = False

    @property
    def ratio(self):
        if self.reference is None:
            return None
        return getattr(self.ours, self.compares) / getattr(self.reference, self.compares)

    @property
    def over_budget(self):
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
            "budget_is": "least ratio" if self.at_least else "most of ours" if self.absolute else "most ratio",
            "over_budget": self.over_budget,
        }


def block(operation, calls, *, receipts=1, after=None):
    """A block of calls of `operation`, each for so many receipts, each followed by one of `after`, off the clock."""

    def run():
        taken = []
        for _ in range(calls):
            start = time.perf_counter_ns()
            operation()
            taken.append((time.perf_counter_ns() - start) / 1000 / receipts)
            if after is not None:
                after()
        return Taken(statistics.fmean(taken), taken)

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
    return Figures(statistics.median(found.per_call for found in taken), p99(calls))


def p99(values):
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def table(sections):
    """The lines of the table: of each section (title, name of the reference, rows)."""
    for title, reference, rows in sections:
        yield ""
        yield f"{title:50}{'unit':>10}{'ours':>9}{'p99':>9}{reference:>14}{'p99':>9}{'ratio':>8}{'budget':>12}"
        for row in rows:
            median, tail = row.reference or (None, None)
            yield (
                f"{row.what:50}{row.unit:>10}{number(row.ours.median):>9}{number(row.ours.p99):>9}"
                f"{number(median):>14}{number(tail):>9}{number(row.ratio):>8}{_budget(row):>12}"
                f"{'  <- over budget' if row.over_budget else ''}"
            )


def _budget(row):
    if row.budget is None:
        return "-"
    of = "p99 " if row.compares == "p99" else ""
    return f"{of}{'≥' if row.at_least else '≤'} {row.budget:g}{' ' + row.unit if row.absolute else ''}"


def number(value):
    """Three digits of it, or more before the point."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
