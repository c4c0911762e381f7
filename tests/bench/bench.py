"""
How fast the buffer is: beside plain `sqlite3` that does the same, in big files, with many threads, beside other queues.

Everything is measured in one run, on one disk, with synchronous=FULL and documents of about 2 KB. What is compared is
interleaved: a round is a block of calls of each side, the sides of a pair one after the other, and which comes first
alternates. A round's figure is its mean per call, so that it bears its share of the WAL's checkpoints (ours and the
floor's: one in some 15 commits). The table has the median of the rounds and the 99th percentile of the single calls;
the ratio is that of the medians unless it says p99. Each section is a module beside this one, whose docstring says what
is compared with what: `operations`, `threads`, `flat`, `pruning`, `start`, `memory`, `peers`. No time makes this fail:
what is over its budget is marked.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy
from figures import table

from kkt_buffer import create_buffer_engine

SECTIONS = ("operations", "threads", "flat", "pruning", "start", "memory", "peers")


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    rounds: int = 60
    many: int = 1_000_000  # synced receipts, and events
    backlog: int = 100_000  # the capacity of a full buffer
    starts: int = 20  # pairs of fresh processes
    memory: int = 100_000  # receipts that one process inserts and delivers
    before_pruning: float = 10.0  # seconds


QUICK = Scale(rounds=2, many=20_000, backlog=2_000, starts=2, memory=1_000, before_pruning=0.5)


def main():
    parser = argparse.ArgumentParser(
        description="Speed of the buffer, side by side with plain sqlite3 and other queues."
    )
    parser.add_argument("--rounds", type=int, help=f"paired rounds (default: {Scale.rounds})")
    parser.add_argument("--only", metavar="PATTERN", default="", help=f"sections to run, of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="few rounds and small files: to see that it works")
    parser.add_argument("--dir", default=".", help="a folder on the disk to measure, not on tmpfs (default: this one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    names = [name for name in SECTIONS if re.search(options.only, name)]
    if not names:
        parser.error(f"--only {options.only}: no section of that name")
    scale = QUICK if options.quick else Scale()
    if options.rounds:
        scale = replace(scale, rounds=options.rounds)
    modules = {name: importlib.import_module(name) for name in names}  # whatever is missing is seen at once
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        found = {name: measured(name, module, Path(folder).resolve(), scale) for name, module in modules.items()}
        line = f"{scale.rounds} rounds; {machine(Path(folder).resolve())}"
    if options.quick:
        line += "; --quick: only to see that it works"
    print(
        *table((modules[name].TITLE, modules[name].REFERENCE, rows) for name, rows in found.items()), "", line, sep="\n"
    )
    if options.json:
        figures = [{"section": name} | row.as_dict() for name, rows in found.items() for row in rows]
        options.json.write_text(json.dumps({"machine": line, "rows": figures}, indent=2, ensure_ascii=False))


def measured(name, module, folder, scale):
    print(f"{name} …", file=sys.stderr, flush=True)
    start = time.monotonic()
    rows = list(module.rows(folder, scale))
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def machine(folder):
    engine = create_buffer_engine(":memory:")
    engine.dispose()
    line = f"{os.cpu_count()} CPUs, Python {platform.python_version()}"
    line += f", SQLite {engine.dialect.dbapi.sqlite_version}, SQLAlchemy {sqlalchemy.__version__}"
    with contextlib.suppress(OSError):  # only Linux has this file
        mounts = [mount.split()[1:3] for mount in Path("/proc/mounts").read_text().splitlines()]
        line += ", " + max((len(point), kind) for point, kind in mounts if folder.is_relative_to(point))[1]
    return line


if __name__ == "__main__":
    main()
