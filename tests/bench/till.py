"""
The same sections on a till's disk: in a process of their own, under strace, which makes each sync 2 ms longer.

strace stops a thread at its syncs alone, and writes a line for each, so they are counted too. They are the same on a
good disk with one thread; threads that commit together share more of them the longer a sync takes.
"""

import importlib
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import figures
import ours_and_floor  # noqa: F401 (it puts the tests' own modules on the path)
from wal import slow_syncs

SYNC_SECONDS = 0.002
ROUNDS = 40  # at most: they take long


class LeftOutError(Exception):
    """What a machine without strace cannot measure."""


def rows(name, folder, scale):
    """The rows of a section of that name."""
    if not shutil.which("strace"):
        raise LeftOutError("there is no strace, which makes syncs slower")
    if subprocess.run([*slow_syncs(0), "true"], capture_output=True, check=False).returncode:
        raise LeftOutError("strace, which makes syncs slower, is not permitted here")
    folder = folder / f"till-{name}"
    folder.mkdir()
    log = folder / "syncs"
    command = [*slow_syncs(SYNC_SECONDS, log), sys.executable, __file__, name, folder, log]
    scale = replace(scale, till=True, rounds=min(scale.rounds, ROUNDS))
    done = subprocess.run([*map(str, command)], input=pickle.dumps(scale), stdout=subprocess.PIPE, check=True)
    return pickle.loads(done.stdout)


class Syncs:
    """The number of lines in strace's log, which it writes as the calls happen."""

    def __init__(self, log):
        self._log = open(log, "rb")  # noqa: SIM115 (read as long as the process lives)
        self._count = 0

    def __call__(self):
        self._count += self._log.read().count(b"sync(")  # not those of "resumed" calls, which have begun before
        return self._count


def main(name, folder, log):
    figures.count_syncs = Syncs(log)
    found = list(importlib.import_module(name).rows(Path(folder), pickle.load(sys.stdin.buffer)))
    sys.stdout.buffer.write(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
