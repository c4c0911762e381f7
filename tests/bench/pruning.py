"""
How long an insert waits while `prune` deletes a million synced receipts.

A thread of the pruning process and another process insert all the time, each with a break of 2 ms after a receipt; for
a while before the pruning, which is the reference, and until its end. The pause is the longest call of an insert that
overlaps the pruning.
"""

import json
import subprocess
import sys
import time
from statistics import median
from threading import Event, Thread

from figures import Figures, Row, p99
from flat import many_synced
from ours_and_floor import Ours

TITLE, REFERENCE = "inserts while prune() runs", "before it"

BREAK_SECONDS = 0.002


def rows(folder, scale):
    path = many_synced(folder, scale)
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
    assert report.receipts == scale.many, report
    pauses = []
    for who, calls in (("thread", of_thread), ("process", of_process)):
        before, meanwhile = within(calls, since, start), within(calls, start, end)
        pauses.append((max(meanwhile), max(before)))
        yield Row(f"insert_receipt in another {who}", "µs", figures_of(meanwhile), figures_of(before))
    longest, longest_before = (Figures(max(found) / 1000) for found in zip(*pauses, strict=True))
    yield Row("the longest pause", "ms", longest, longest_before, 50, absolute=True)
    yield Row("receipts pruned meanwhile", "per s", Figures(report.receipts / (end - start)))


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
