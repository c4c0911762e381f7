"""
Threads that insert at the same moment, beside the floor's one thread.

A round starts all threads of a pool at once, and its throughput is all their receipts by the time from the first start
to the last end. The p99 of 16 threads stands beside that of our own main thread. What a lone thread pays for others
that might have come is seen beside the main thread, which commits for itself.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from figures import Figures, Row, Taken, block, figures, interleaved
from ours_and_floor import Floor, Ours

TITLE, REFERENCE = "inserting threads", "one thread"


def rows(folder, scale):
    ours, floor = Ours(folder / "threads.db"), Floor(folder / "thread-floor.db")
    with ThreadPoolExecutor(16) as sixteen, ThreadPoolExecutor(8) as eight, ThreadPoolExecutor(1) as one:
        taken = interleaved(
            {
                16: at_once(sixteen, 16, ours.insert, 20),
                8: at_once(eight, 8, ours.insert, 20),
                "floor": block(floor.insert, 40),
                "main": block(ours.insert, 40),
                "lone": at_once(one, 1, ours.insert, 40),
            },
            scale.rounds,
        )
    ours.close()
    floor.close()
    found = {who: figures(blocks) for who, blocks in taken.items()}
    return [
        Row("16 threads, beside the floor", "receipts/s", rate(found[16]), rate(found["floor"]), 2.3, at_least=True),
        Row("8 threads, beside the floor", "receipts/s", rate(found[8]), rate(found["floor"]), 2.0, at_least=True),
        Row("a call of 16 threads, beside our main thread", "µs", call(taken[16]), found["main"], 12, compares="p99"),
        Row("a lone thread, beside our main thread", "µs", found["lone"], found["main"], 1.1),
    ]


def at_once(pool, threads, operation, calls):
    """A block in which so many threads of the pool call the operation so many times each."""
    barrier = Barrier(threads)
    calls_of_one = block(operation, calls)

    def work():
        barrier.wait()
        start = time.perf_counter_ns()
        return start, calls_of_one().calls, time.perf_counter_ns()

    def run():
        starts, taken, ends = zip(*[job.result() for job in [pool.submit(work) for _ in range(threads)]], strict=True)
        return Taken((max(ends) - min(starts)) / 1000 / (threads * calls), [each for one in taken for each in one])

    return run


def rate(found):
    return Figures(1_000_000 / found.median)


def call(taken):
    """The figures of single calls, not of what a receipt costs while several are on their way."""
    return figures([Taken(sum(found.calls) / len(found.calls), found.calls) for found in taken])
