"""
Two versions of the package side by side in one run: compare.py OLD_SRC NEW_SRC, each the `src` folder of a checkout.

Each version works in a process of its own on a fresh file of its own, which it upgrades itself. A round is a block of
calls of each operation by each of them, in turn, and the order alternates; the ratio is that of the medians over the
rounds. Processor time stands beside the wall clock: the disk, and what else waits for it, changes it little. What the
blocks leave undelivered is delivered off the clock, so that both files stay alike. No time makes this fail: what is
over its budget is marked.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Barrier

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script, to which pytest gives no path
from samples import a_document_of

BATCH = 50
WARM_UP = 3
# The most that the new version may take, as a multiple of the old one.
BUDGETS = {
    "insert_receipt, 1 thread": 1.10,
    "insert_receipt, 8 threads": 1.10,
    "insert_receipt, 16 threads": 1.10,
    f"insert_receipts({BATCH})": 1.10,
    f"claim_pending({BATCH})": 1.10,
    f"get_pending_receipts({BATCH}), decoded": 1.10,
    "mark_synced": 1.25,
    "get_buffer_status": 2.0,
}


class Side:
    """A process that runs one version, and answers with what a block took: wall clock and CPU, in µs for each call."""

    def __init__(self, source, path):
        environment = os.environ | {"PYTHONPATH": str(source)}
        command = [sys.executable, __file__, "--serve", str(source), str(path)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, what):
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process has failed at: {what}")
        return [float(number) for number in answer.split()]

    def close(self):
        self.process.communicate()


class Buffer:
    """The version that PYTHONPATH names, at work on its file."""

    def __init__(self, source, path):
        import kkt_buffer  # noqa: PLC0415 (only in a process that has one of the versions)

        if not Path(kkt_buffer.__file__).resolve().is_relative_to(Path(source).resolve()):
            raise SystemExit(f"imported {kkt_buffer.__file__}, which is not in {source}")
        self.engine = kkt_buffer.create_buffer_engine(path)
        kkt_buffer.upgrade(self.engine)
        self.repository = kkt_buffer.ReceiptRepository(self.engine)
        self.repository.set_config("buffer_capacity", 1_000_000)
        self.receipt = {"pos_id": "till-1", "fiscal_doc": a_document_of(2048)}
        self.waiting, self.claimed = [], []

    def insert(self):
        self.waiting.append(self.repository.insert_receipt(self.receipt))

    def insert_batch(self):
        self.waiting += self.repository.insert_receipts([self.receipt] * BATCH)

    def claim(self):
        self.claimed += self.repository.claim_pending(BATCH)
        assert len(self.claimed) == BATCH

    def pending(self):
        assert len([receipt.document for receipt in self.repository.get_pending_receipts(BATCH)]) == BATCH

    def mark_synced(self):
        self.repository.mark_synced(self.waiting.pop(), int(time.time()))

    def settle(self):
        """Give back what was claimed, and deliver all but what the next round needs, in one commit."""
        with self.repository.transaction():
            for receipt in self.claimed:
                self.repository.release(receipt.id, receipt.lease_token)
            self.claimed.clear()
            while len(self.waiting) > 4 * BATCH:
                self.mark_synced()

    def blocks(self):
        return {
            "insert_receipt, 1 thread": lambda: block(self.insert, 20),
            "insert_receipt, 8 threads": lambda: at_once(8, self.insert, 10),
            "insert_receipt, 16 threads": lambda: at_once(16, self.insert, 10),
            f"insert_receipts({BATCH})": lambda: block(self.insert_batch, 2),
            f"claim_pending({BATCH})": lambda: block(self.claim, 1),
            f"get_pending_receipts({BATCH}), decoded": lambda: block(self.pending, 10),
            "mark_synced": lambda: block(self.mark_synced, 20),
            "get_buffer_status": lambda: block(self.repository.get_buffer_status, 20),
            "settle": lambda: block(self.settle, 1),
        }


def serve(source, path):
    """Run the blocks that the standard input names."""
    buffer = Buffer(source, path)
    blocks = buffer.blocks()
    for line in sys.stdin:
        print(*blocks[line.rstrip("\n")](), flush=True)
    buffer.engine.dispose()


def block(operation, calls):
    cpu, start = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(calls):
        operation()
    end = time.perf_counter_ns()
    return (end - start) / 1000 / calls, (time.process_time_ns() - cpu) / 1000 / calls


def at_once(threads, operation, calls):
    """What a receipt costs while so many threads insert, from the first start to the last end."""
    barrier, cpu = Barrier(threads), time.process_time_ns()

    def work(_):
        barrier.wait()
        start = time.perf_counter_ns()
        for _ in range(calls):
            operation()
        return start, time.perf_counter_ns()

    with ThreadPoolExecutor(threads) as pool:
        starts, ends = zip(*pool.map(work, range(threads)), strict=True)
    receipts = threads * calls
    return (max(ends) - min(starts)) / 1000 / receipts, (time.process_time_ns() - cpu) / 1000 / receipts


def compare(old, new, folder, rounds):
    """What each block took of each side, by its name."""
    sides = {"old": Side(old, folder / "old.db"), "new": Side(new, folder / "new.db")}
    taken = {(what, side): [] for what in BUDGETS for side in sides}
    try:
        for number in range(-WARM_UP, rounds):
            order = list(sides) if number % 2 else list(reversed(sides))
            for what in BUDGETS:
                for side in order:
                    found = sides[side].run(what)
                    if number >= 0:
                        taken[what, side].append(found)
            for side in sides.values():
                side.run("settle")
    finally:
        for side in sides.values():
            side.close()
    return taken


def main():
    parser = argparse.ArgumentParser(description="Two versions of kkt-buffer side by side.")
    parser.add_argument("old", type=Path, metavar="OLD_SRC")
    parser.add_argument("new", type=Path, metavar="NEW_SRC")
    parser.add_argument("--rounds", type=int, default=40, help="paired rounds (default: 40)")
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure (default: /var/tmp)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".compare-", dir=options.dir) as folder:
        taken = compare(options.old.resolve(), options.new.resolve(), Path(folder).resolve(), options.rounds)
    head = f"{'old':>9}{'new':>9}{'new/old':>9}"
    print(f"{f'µs, medians of {options.rounds} rounds':45}{head}{'budget':>9}   CPU:{head}")
    for what, budget in BUDGETS.items():
        (old, old_cpu), (new, new_cpu) = (
            [median(figure) for figure in zip(*taken[what, side], strict=True)] for side in ("old", "new")
        )
        mark = "  <- over budget" if new / old > budget else ""
        cpu = f"{old_cpu:9.0f}{new_cpu:9.0f}{new_cpu / old_cpu:9.2f}"
        print(f"{what:45}{old:9.0f}{new:9.0f}{new / old:9.2f}{budget:9.2f}       {cpu}{mark}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
