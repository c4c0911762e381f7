"""
Threads that insert, or record deliveries, at the same moment, beside the floor's one thread that does the same.

A round starts all threads of a pool at once, and its throughput is all their receipts by the time from the first start
to the last end. The p99 of 16 threads stands beside that of our own main thread. What a lone thread pays for others
that might have come is seen beside the main thread, which commits for itself.
"""

from concurrent.futures import ThreadPoolExecutor

from figures import Row, Taken, at_once, block, figures, interleaved, rate
from ours_and_floor import BATCH, Floor, Ours

TITLE, REFERENCE = "threads", "one thread"

DELIVERIES = 20  # of each thread, in a round


def rows(folder, scale):
    ours, floor = Ours(folder / "threads.db"), Floor(folder / "thread-floor.db")
    for _ in range(16 * DELIVERIES // BATCH + 1):  # so that every second round can begin with the deliveries
        ours.insert_batch()
    for _ in range(40):
        floor.insert()
    with ThreadPoolExecutor(16) as sixteen, ThreadPoolExecutor(8) as eight, ThreadPoolExecutor(1) as one:
        taken = interleaved(
            {
                16: at_once(sixteen, 16, ours.insert, 20),
                8: at_once(eight, 8, ours.insert, 20),
                "floor": block(floor.insert, 40),
                "main": block(ours.insert, 40),
                "lone": at_once(one, 1, ours.insert, 40),
                "delivering": at_once(sixteen, 16, ours.mark_synced, DELIVERIES),
                "delivering floor": block(floor.mark_synced, 40),
            },
            scale.rounds,
        )
    ours.close()
    floor.close()
    found = {who: figures(blocks) for who, blocks in taken.items()}
    pairs = [
        ("insert_receipt, 16 threads", 16, "floor", 2.3),
        ("insert_receipt, 8 threads", 8, "floor", 2.0),
        ("mark_synced, 16 threads", "delivering", "delivering floor", 2.0),
    ]
    for what, mine, its, budget in pairs:
        yield Row(what, "receipts/s", rate(found[mine]), rate(found[its]), scale.on_good(budget), at_least=True)
    main = found["main"]
    yield Row(
        "a call of 16 threads, to our main thread", "µs", calls(taken[16]), main, scale.on_good(12), compares="p99"
    )
    yield Row("a lone thread, to our main thread", "µs", found["lone"], main, scale.on_good(1.1))


def calls(taken):
    """The figures of single calls, not of what a receipt costs while several are on their way."""
    return figures([Taken(sum(found.calls) / len(found.calls), found.calls) for found in taken])
