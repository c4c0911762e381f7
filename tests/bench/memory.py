"""
How much a process grows that inserts receipts of 2 KB one by one, and delivers them in batches of 50.

Its resident size is read after a warm-up, after half of the receipts, and after all of them. The first half fills
SQLite's page cache (64 MB at most for each connection, by our PRAGMA); the second tells whether something goes on
growing.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

from figures import Figures, Row
from ours_and_floor import BATCH, Ours

TITLE, REFERENCE = "resident memory of one process", "-"


def rows(folder, scale):
    count, warm_up = scale.memory, scale.memory // 20
    command = [sys.executable, __file__, str(folder / "memory.db"), str(warm_up), str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    begin, half, end = json.loads(done.stdout)
    yield Row(f"growth over {count:,} receipts", "MB", Figures(end - begin))
    yield Row(f"of that, over the last {count // 2:,}", "MB", Figures(end - half), budget=5, absolute=True)


def insert_and_deliver(path, warm_up, count):
    """Print the resident size after the warm-up, after half of the receipts, and after all of them."""
    ours = Ours(path)
    sizes = []
    for receipts in (warm_up, count // 2, count // 2):
        for _ in range(receipts // BATCH):
            for _ in range(BATCH):
                ours.insert()
            ours.deliver()
        sizes.append(resident())
    ours.close()
    print(json.dumps(sizes))


def resident():
    """MB of this process that are in memory now; where there is no /proc, the most that ever were."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


if __name__ == "__main__":
    insert_and_deliver(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
