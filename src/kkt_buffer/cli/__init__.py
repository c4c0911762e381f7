"""
The command line: `kkt-buffer demo | upgrade PATH | status PATH | verify PATH | backup PATH TARGET`.

Exit status: 0 for success, 1 for an error (one line on stderr) or a damaged buffer, 2 for wrong usage, 3 for a buffer
that differs from what this release makes but is not damaged.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from kkt_buffer import demo
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import ReceiptBufferError
from kkt_buffer.migrate import current, differences, release, require, stage, upgrade
from kkt_buffer.repository import ReceiptRepository
from kkt_buffer.sqlite.driver import known_bugs
from kkt_buffer.sqlite.engine import pragmas


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments) or 0
        sys.stdout.flush()
    except (ReceiptBufferError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the pipe (`head`) has closed it. Without this, Python's flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was acknowledged is safe", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kkt-buffer", description="The offline buffer of fiscal receipts.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {release()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="play a shift on a real buffer, with a kill in the middle")
    command.add_argument("path", nargs="?", default="data/demo.db", help="default: %(default)s")
    command.set_defaults(run=_demo)

    command = commands.add_parser("upgrade", help="create the buffer, or upgrade its schema to this release")
    command.add_argument("path")
    command.set_defaults(run=_upgrade)

    command = commands.add_parser("backup", help="copy a buffer to another file, even while it is in use")
    command.add_argument("path")
    command.add_argument("target", help="replaced once the copy is complete")
    command.set_defaults(run=_backup)

    command = commands.add_parser("verify", help="read all of the buffer and report problems; changes nothing")
    command.add_argument("path")
    command.set_defaults(run=_verify)

    command = commands.add_parser("status", help="show how full the buffer is; changes nothing")
    command.add_argument("path")
    command.add_argument("--json", action="store_true", help="print it as JSON, times as Unix seconds")
    command.set_defaults(run=_status)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    demo.run(arguments.path)
    _print_status(_read_status(arguments.path))


def _upgrade(arguments: argparse.Namespace) -> None:
    engine = create_buffer_engine(arguments.path)
    try:
        before = stage(engine)
        upgrade(engine)
        print(f"{arguments.path}: schema {current(engine)} (was {before})")
    finally:
        engine.dispose()


def _status(arguments: argparse.Namespace) -> None:
    status = _read_status(arguments.path)
    if arguments.json:
        print(json.dumps(status, ensure_ascii=False))
    else:
        _print_status(status)


def _backup(arguments: argparse.Namespace) -> None:
    engine = create_buffer_engine(arguments.path, read_only=True)
    try:
        require(engine)
        ReceiptRepository(engine).backup(arguments.target)
        print(f"{arguments.target}: complete, and on disk")
    finally:
        engine.dispose()


def _verify(arguments: argparse.Namespace) -> int:
    """Report problems; exit status 1 for damage, 3 where something differs but there is nothing to restore."""
    rows = {"buffer": arguments.path}
    engine = create_buffer_engine(arguments.path, read_only=True)
    try:
        rows["SQLite"] = known_bugs(engine)
        require(engine)
        repository = ReceiptRepository(engine)
        report = repository.check_integrity()
        found = differences(engine)
        is_damaged = report.is_damaged or any(difference.is_damage for difference in found)
        findings = {"schema": tuple(map(str, found)), **report.findings}
        rows |= {what: "\n".join(problems) or "ok" for what, problems in findings.items()}
        is_whole = not any(findings.values())
        if is_whole:
            leased, lasts = repository.get_buffer_status().syncing, repository.get_config("lease_seconds")
            rows["open leases"] = f"{leased} (each expires after {lasts} s)" if leased else "none"
    finally:
        engine.dispose()
    if is_whole:
        # Never open a damaged file for writing, not even to read its settings.
        engine = create_buffer_engine(arguments.path)
        rows["settings of a connection"] = ", ".join(f"{name} {value}" for name, value in pragmas(engine).items())
        engine.dispose()
    _print_rows(rows)
    if is_damaged:
        print("The buffer is DAMAGED. Nothing was changed. Restore a backup.")
        return 1
    if is_whole:
        print("The buffer is whole.")
        return 0
    print(
        "No receipt is damaged, and there is NOTHING TO RESTORE. But the buffer differs from what this release makes: "
        "undo what was changed by hand, correct a setting; timestamps out of order stay. Nothing was changed."
    )
    return 3


def _read_status(path: str) -> dict[str, Any]:
    engine = create_buffer_engine(path, read_only=True)
    try:
        require(engine)
        status = ReceiptRepository(engine).get_buffer_status()
        return {"path": str(path), "schema": current(engine), **asdict(status)}
    finally:
        engine.dispose()


def _print_status(status: dict[str, Any]) -> None:
    rows = {
        "buffer": status["path"],
        "schema": status["schema"],
        "pending": f"{status['pending']}  (held, not printed yet: {status['held']})",
        "syncing": f"{status['syncing']}  (expired leases: {status['expired_leases']})",
        "synced": f"{status['synced']}",
        "failed": f"{status['failed']}  (open dead letters: {status['dlq_size']})",
        "total": f"{status['total_receipts']}",
        "full": f"{status['percent_full']:.2f} %  ({status['pending'] + status['syncing']} of {status['capacity']})",
        "oldest undelivered": _local_time(status["oldest_undelivered_at"], "nothing waits"),
        "deliver before": _local_time(status["deadline_at"], "nothing waits"),
        "last delivery": _local_time(status["last_synced_at"], "none yet"),
        "last outage": _local_time(status["last_outage_at"], "none on record"),
    }
    _print_rows(rows)


def _print_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}} | " + value.replace("\n", f"\n{'':<{width}} | "))


def _local_time(seconds: int | None, otherwise: str) -> str:
    if seconds is None:
        return otherwise
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
