"""Files that are damaged behind the back of their guards, and what `check_integrity` says of a file."""

import contextlib
import sqlite3
from pathlib import Path

from kkt_buffer import IntegrityReport, ReceiptRepository, create_buffer_engine

CHECKS = (
    "pages and indexes",
    "references",
    "settings",
    "texts",
    "rules of the tables",
    "dead letters",
    "documents",
    "counts",
    "order of timestamps",
)


def damage(path: Path, *statements: str) -> None:
    """Run statements without the triggers and checks of the schema."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)


def report(path: Path) -> IntegrityReport:
    engine = create_buffer_engine(path, read_only=True)
    try:
        return ReceiptRepository(engine).check_integrity()
    finally:
        engine.dispose()
