"""
How long an insert waits while `prune` deletes a million synced receipts, and while it looks through a full backlog.

A thread of the pruning process and another process insert all the time, each with a break of 2 ms after a receipt; for
a while before the pruning, which is the reference, and until its end. The pause is the longest call of an insert that
overlaps the pruning. The files are those of `flat`, where the documents of the synced receipts have some 100 bytes
only. In the backlog there is nothing to delete, and `prune` has to find that out.
"""

import json
import subprocess
import sys
import time
from statistics import median
from threading import Event, Thread

from figures import Figures, Row, p99
from flat import a_file, many_synced
from ours_and_floor import Ours

TITLE, REFERENCE = "inserts while prune() runs", "before it"

BREAK_SECONDS = 0.002


def rows(folder, scale):
    yield from pauses(f"{scale.many:,} to prune", many_synced(folder, scale), scale, scale.many)
    yield from pauses(
        f"{scale.backlog:,} pending", a_file(folder / "backlog.db", scale, pending=scale.backlog), scale, 0
    )


def pauses(what, path, scale, pruned):
    ours = Ours(path)
    stop, of_thread = Event(), []
    thread = Thread(target=insert_until, args=(stop, ours, of_thread))
    thread.start()
    process = subprocess.Popen(
        [sys.executable, __file__, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()  # it is at work
        since = time.monotonic()
        time.sleep(scale.before_pruning)
        start = time.monotonic()
        report = ours.repository.prune()
        end = time.monotonic()
    finally:
        stop.set()
        of_process = json.loads(process.communicate()[0])
        thread.join()
        ours.close()
    assert report.receipts == pruned, report
    longest, longest_before = [], []
    for who, calls in (("thread", of_thread), ("process", of_process)):
        before, meanwhile = within(calls, since, start), within(calls, start, end)
        longest.append(max(meanwhile))
        longest_before.append(max(before))
        if pruned:
            yield Row(f"{what}: an insert in another {who}", "µs", figures_of(meanwhile), figures_of(before))
    pause, pause_before = Figures(max(longest) / 1000), Figures(max(longest_before) / 1000)
    yield Row(f"{what}: the longest pause", "ms", pause, pause_before, 50, absolute=True)
    if pruned:
        yield Row(f"{what}: receipts pruned", "per s", Figures(report.receipts / (end - start)))


def insert_until(stop, ours, calls):
    """Note when each insert began (on the clock that all processes share) and what it took, in µs."""
    while not stop.wait(BREAK_SECONDS):
        start = time.monotonic()
        ours.insert()
        calls.append((start, (time.monotonic() - start) * 1_000_000))


def within(calls, start, end):
    """What the calls took that overlap this time."""
    return [taken for began, taken in calls if began < end and began + taken / 1_000_000 > start]


def figures_of(calls):
    return Figures(median(calls), p99(calls))


def insert_until_input_ends(path):
    ours, stop, calls = Ours(path), Event(), []
    thread = Thread(target=insert_until, args=(stop, ours, calls))
    thread.start()
    print("at work", flush=True)
    sys.stdin.read()
    stop.set()
    thread.join()
    ours.close()
    json.dump(calls, sys.stdout)


if __name__ == "__main__":
    insert_until_input_ends(sys.argv[1])
