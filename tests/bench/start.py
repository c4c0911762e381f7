"""
What a process pays to begin: opening an up-to-date buffer, beside `import sqlalchemy.orm`.

Each is timed inside a fresh interpreter, from before the first import (ours is counted), so that the start of Python
itself makes no ratio look better. Bytecode is cached, in a folder of the benchmark.
"""

import os
import subprocess
import sys

from figures import Row, Taken, figures, interleaved
from ours_and_floor import Ours

TITLE, REFERENCE = "a fresh process", "import"

OPEN = "from kkt_buffer import buffer; buffer.init_buffer_db(sys.argv[1])"
IMPORT = "import sqlalchemy.orm"
TIMED = "import sys, time; start = time.perf_counter_ns(); {}; print((time.perf_counter_ns() - start) / 1000)"


def rows(folder, scale):
    path = folder / "start.db"
    Ours(path).close()
    blocks = {"ours": fresh(OPEN, folder, path), "import": fresh(IMPORT, folder, path)}
    taken = interleaved(blocks, scale.starts)
    yield Row("opening, beside import sqlalchemy.orm", "µs", figures(taken["ours"]), figures(taken["import"]), 1.3)


def fresh(program, folder, path):
    """A block of one fresh process, which times the program."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", TIMED.format(program), str(path)]

    def run():
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        taken = float(done.stdout)
        return Taken(taken, [taken])

    return run
