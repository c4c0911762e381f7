"""What SQLite writes to its WAL and syncs: counted, and on a slower disk. strace sees the syncs."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

from sqlalchemy import Engine, event

FRAME_HEADER = 24
WAL_HEADER = 32

# The syncs of a WAL, by what was written to it since the last one.
COMMIT = "commit: the WAL"
RESTART = "restart: the WAL's new header"
BEFORE_CHECKPOINT = "checkpoint: the WAL"
CHECKPOINT = "checkpoint: the database"
OTHER = "other"

_CALL = re.compile(r"\d+ +(pwrite64|fsync|fdatasync)\(\d+<([^>]*)>(?:, .*, (\d+), (\d+))?")


def strace(calls: str, *options: str, log: Path | str = "/dev/null") -> list[str]:
    """The command that runs a program and logs these system calls of it. seccomp leaves all others alone."""
    return ["strace", "-f", "--seccomp-bpf", "-y", "-s", "0", "-o", str(log), "-e", f"trace={calls}", *options]


def slow_syncs(seconds: float, log: Path | str = "/dev/null") -> list[str]:
    """The command that runs a program on a disk whose syncs take so much longer. The log gets a line for each sync."""
    inject = f"inject=fsync,fdatasync:delay_exit={seconds * 1_000_000:.0f}"
    return strace("fsync,fdatasync", "-e", inject, log=log)


def syncs(lines: Iterable[str], database: Path) -> Counter[str]:
    """How many syncs of each kind a log tells of, whose calls are pwrite64, fsync and fdatasync."""
    wal = f"{database}-wal"
    last_write: tuple[int, int] | None = None  # to the WAL, since its last sync: size and offset
    found: Counter[str] = Counter()
    for line in lines:
        match = _CALL.match(line)
        if match is None:
            continue
        call, path, size, offset = match.groups()
        if call == "pwrite64":
            if path == wal:
                last_write = int(size), int(offset)
        elif path == wal:
            kinds = {None: BEFORE_CHECKPOINT, (WAL_HEADER, 0): RESTART}
            found[kinds.get(last_write, COMMIT)] += 1
            last_write = None
        else:
            found[CHECKPOINT if path == str(database) else OTHER] += 1
    return found


def pages(engine: Engine, path: Path, operation: Callable[[], object], calls: int) -> list[float]:
    """How many pages of the WAL each call writes. None may be in use meanwhile."""

    def never_checkpoint(driver, _record):
        driver.execute("PRAGMA wal_autocheckpoint = 0").fetchone()  # so the WAL grows by a frame for each page

    event.listen(engine, "connect", never_checkpoint)
    engine.dispose()
    with engine.connect() as connection:
        page_size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    wal = path.with_name(f"{path.name}-wal")
    operation()  # a new WAL gets its header
    sizes = [wal.stat().st_size]
    for _ in range(calls):
        operation()
        sizes.append(wal.stat().st_size)
    event.remove(engine, "connect", never_checkpoint)
    engine.dispose()
    found = [(after - before) / (page_size + FRAME_HEADER) for before, after in pairwise(sizes)]
    assert all(count.is_integer() and count > 0 for count in found), "the WAL was cut or checkpointed meanwhile"
    return found
