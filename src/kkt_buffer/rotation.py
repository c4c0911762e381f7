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
    Copy the buffer to `folder`/`name`-DATETTIME.db, check the copy, and delete all but the `keep` newest copies.

    Returns the path of the copy and what the check found. Nothing is deleted if the copy is damaged: an older one may
    be what has to be restored. Other files in the folder stay.

    Raises what `ReceiptRepository.backup` raises.
    """
    if keep < 1:
        raise ValueError(f"keep: expected a whole number of 1 or more, got {keep}")
    stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(now()))
    copy = Path(folder) / f"{name}-{stamp}.db"
    repository.backup(copy)
    report = _check(copy)
    if not report.is_damaged:
        for old in [path for path in backups(folder, name=name) if path != copy][: -keep + 1 or None]:
            old.unlink(missing_ok=True)
    return copy, report


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
        for suffix in ("-wal", "-shm"):  # a reader of SQLite leaves them behind, empty
            Path(f"{copy}{suffix}").unlink(missing_ok=True)
