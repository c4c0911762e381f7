"""Backups with rotation: copies of a buffer in one folder, named by their time; old ones are deleted."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.operations.integrity import IntegrityReport
from kkt_buffer.repository import ReceiptRepository

KEEP = 7


def back_up(
    repository: ReceiptRepository,
    folder: str | os.PathLike[str],
    *,
    name: str = "buffer",
    keep: int = KEEP,
    now: Callable[[], float] = time.time,
) -> tuple[Path, IntegrityReport]:
    """
    Copy the buffer to `folder`/`name`-DATETIME.db, check the copy, and delete all but the `keep` newest copies.

    Returns the path of the copy and what the check found. A copy that is damaged, or could not be checked, is renamed
    to `name`-damaged.db and replaces the one of before. No other copy is deleted then: an older one may be what has to
    be restored. Other files in the folder stay.

    Raises what `ReceiptRepository.backup` raises.
    """
    if keep < 1:
        raise ValueError(f"keep: expected a whole number of 1 or more, got {keep}")
    stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(now()))
    copy = Path(folder) / f"{name}-{stamp}.db"
    repository.backup(copy)
    # Only one: a damaged buffer is copied again at each attempt, and must not fill the disk.
    kept = Path(folder) / f"{name}-damaged.db"
    try:
        report = _check(copy)
        if not report.is_damaged:
            kept = copy
    finally:
        copy.replace(kept)
    if kept == copy:
        for old in [path for path in backups(folder, name=name) if path != copy][: -keep + 1 or None]:
            old.unlink(missing_ok=True)
    return kept, report


def backups(folder: str | os.PathLike[str], *, name: str = "buffer") -> list[Path]:
    """The copies of a buffer in the folder, oldest first."""
    pattern = re.compile(re.escape(name) + r"-\d{8}T\d{6}\.db")
    return sorted(path for path in Path(folder).iterdir() if pattern.fullmatch(path.name))


def _check(copy: Path) -> IntegrityReport:
    engine = create_buffer_engine(copy, read_only=True)
    try:
        return ReceiptRepository(engine).check_integrity()
    finally:
        engine.dispose()
        for suffix in ("-wal", "-shm"):  # a read-only connection does not remove them
            Path(f"{copy}{suffix}").unlink(missing_ok=True)
