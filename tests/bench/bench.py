"""
How fast the buffer is: beside the driver alone, when it is big, with many threads, beside other queues.

Everything is measured in one run, on one disk, with synchronous=FULL and documents of about 2 KB. What is compared is
interleaved: a round is a block of calls of each side, the sides of a pair one after the other, and which comes first
alternates. A round's figure is its mean per call, so that it bears its share of the WAL's checkpoints (ours and the
floor's: one in some nine commits). The table has the median of the rounds and the 99th percentile of the single calls;
the ratio is that of the medians unless it says p99. Each section is a module beside this one, whose docstring says what
is compared with what: `operations`, `threads`, `peers`, `flat`, `pruning`, `start`, `memory` for a file, `postgresql`
for a server. The first three are measured on a till's disk too: `till`. A full run writes the table to RESULTS.md here,
and the plot to speed.svg. No time makes this fail: what has missed its goal is told.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import plot
import report
import sqlalchemy
import till
from figures import Scale

from kkt_buffer import create_buffer_engine

HERE = Path(__file__).parent
ON_BOTH_DISKS = ("operations", "threads", "peers")
SECTIONS = (
    *ON_BOTH_DISKS,
    *(f"till-{name}" for name in ON_BOTH_DISKS),
    "flat",
    "pruning",
    "start",
    "memory",
    "postgresql",
)
QUICK = Scale(rounds=2, many=5_000, backlog=1_000, starts=2, memory=500, before_pruning=0.5, snapshot=2)


def main():
    parser = argparse.ArgumentParser(
        description="Speed of the buffer, side by side with the driver alone and other queues."
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
    sections = [Section(name) for name in names]  # whatever is missing is seen at once
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        for section in sections:
            section.measure(Path(folder).resolve(), scale)
        line = f"{scale.rounds} rounds; {machine(Path(folder).resolve())}"
    if options.quick:
        line += "; --quick: only to see that it works"
    tables = list(report.tables(sections))
    print(*tables, "", line, sep="\n")
    rows = [{"section": section.name} | row.as_dict() for section in sections for row in section.rows]
    if options.json:
        options.json.write_text(json.dumps({"machine": line, "rows": rows}, indent=2, ensure_ascii=False))
    if names == list(SECTIONS) and not options.quick:
        report.write(HERE / "RESULTS.md", tables, line)
        plot.write(HERE / "speed.svg", rows)


class Section:
    """A part of the benchmark, and what it has found."""

    def __init__(self, name):
        self.name = name
        module = importlib.import_module(name.removeprefix("till-"))
        self.title, self.reference = module.TITLE, module.REFERENCE
        self.rows, self.left_out = [], None
        self._measure = module.rows
        if name.startswith("till-"):
            self.title += ", on a till's disk"
            self._measure = functools.partial(till.rows, module.__name__)

    def measure(self, folder, scale):
        print(f"{self.name} …", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            self.rows = list(self._measure(folder, scale))
        except till.LeftOutError as error:
            self.left_out = f"LEFT OUT: {error}"
            print(f"{self.name}: {self.left_out}", file=sys.stderr, flush=True)
        print(f"{self.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


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
