"""Commands that look after the file: upgrade, prune, backup, verify, export."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Engine
from sqlalchemy import text as sql

from kkt_buffer.cli import text
from kkt_buffer.cli.target import (
    add_command,
    engine_for,
    existing,
    file_path,
    is_server,
    path_of,
    repository_for,
    shown,
)
from kkt_buffer.documents import is_intact
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.migrate import current, differences, stage, upgrade
from kkt_buffer.repository import ReceiptRepository
from kkt_buffer.rotation import KEEP, back_up, backups
from kkt_buffer.sqlite.driver import known_bugs
from kkt_buffer.sqlite.engine import pragmas
from kkt_buffer.sqlite.salvage import Lost, salvage

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

DIFFERS = 3  # exit status of verify
SERVER_SETTINGS = ("fsync", "full_page_writes", "synchronous_commit", "synchronous_standby_names")
BACKUP_OF_A_SERVER = "Back up a server by its own means: pg_dump, or pg_basebackup with archived WAL."


def add(commands: "Commands") -> None:
    """Add the commands of this file."""
    add_command(commands, "upgrade", _upgrade, "create the buffer, or upgrade its schema to this release")
    add_command(
        commands,
        "prune",
        _prune,
        "delete what is older than its retention\n\n"
        "That is: receipts that were delivered, dead letters that were closed, events. "
        "Undelivered receipts and open dead letters are never deleted. See `config` for the retention_* settings.",
    )
    command = add_command(
        commands,
        "backup",
        _backup,
        "copy a buffer, even while it is in use\n\n"
        "With a folder: a new copy in it, named by its time, which is checked; only the newest copies are kept. "
        "Without one, the folder is `backups` beside the buffer.\n\n"
        "With PATH TARGET: a copy of the buffer PATH in the file TARGET, which is replaced when the copy is complete.",
        path=False,
    )
    command.usage = "kkt-buffer backup [--db PATH] [DIR] [--keep N]\n       kkt-buffer backup PATH TARGET"
    command.add_argument("names", nargs="*", metavar="DIR | PATH TARGET", help="default: `backups` beside the buffer")
    command.add_argument("--keep", type=int, metavar="N", help=f"how many copies to keep in DIR; default: {KEEP}")

    add_command(
        commands,
        "verify",
        _verify,
        "read all of the buffer and report problems; changes nothing\n\n"
        "exit status: 0 the buffer is whole; 1 it is damaged: restore a backup; 3 it differs from this release, but "
        "there is no need to restore a backup.",
    )
    add_command(
        commands,
        "export",
        _export,
        "print all receipts as JSON lines, also from a damaged file\n\n"
        "Each line has the columns of one receipt, with the document as the text that was stored. Receipts that "
        "cannot be read are listed on stderr, and the exit status is 1. Works with every schema version.\n\n"
        "The lines contain personal data.",
    )


def _upgrade(arguments: argparse.Namespace) -> None:
    path = path_of(arguments)
    engine = create_buffer_engine(path)
    try:
        before = stage(engine)
        upgrade(engine)
        print(f"{shown(path)}: schema {current(engine)} (was {before})")
    finally:
        engine.dispose()


def _prune(arguments: argparse.Namespace) -> None:
    with repository_for(arguments, write=True, notice=False) as repository:
        report = repository.prune()
    print(
        f"deleted {text.counted(report.receipts, 'receipt')}, {text.counted(report.dead_letters, 'dead letter')}, "
        f"{text.counted(report.events, 'event')}; kept {text.counted(report.kept_receipts, 'old receipt')} that other "
        "rows refer to"
    )


def _backup(arguments: argparse.Namespace) -> int:
    names: list[str] = arguments.names
    is_copy = len(names) == 2  # noqa: PLR2004 (PATH TARGET)
    if len(names) > 2 or (is_copy and (arguments.db is not None or arguments.keep is not None)):  # noqa: PLR2004
        arguments.parser.error("expected a folder, or PATH TARGET without --db and --keep")
    if is_copy:
        with engine_for(file_path(names[0], BACKUP_OF_A_SERVER)) as engine:
            ReceiptRepository(engine).backup(names[1])
        print(f"{names[1]}: complete, and on disk")
        return 0
    path = Path(file_path(path_of(arguments), BACKUP_OF_A_SERVER))
    folder = Path(names[0]) if names else path.parent / "backups"
    with repository_for(arguments) as repository:
        copy, report = back_up(
            repository, folder, name=path.stem, keep=KEEP if arguments.keep is None else arguments.keep
        )
    if report.is_damaged:
        print(f"error: {copy} is damaged, as the buffer is: {report}. No older copy was deleted.", file=sys.stderr)
        return 1
    copies = text.counted(len(backups(folder, name=path.stem)), "copy", "copies")
    print(f"{copy}: complete, and on disk ({copies} in {folder})")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    path = path_of(arguments)
    rows = {"buffer": shown(path)}
    with engine_for(path) as engine:
        rows |= {"PostgreSQL": _server_version(engine)} if is_server(path) else {"SQLite": known_bugs(engine)}
        repository = ReceiptRepository(engine)
        report = repository.check_integrity()
        schema = differences(engine)
        is_damaged = report.is_damaged or any(difference.is_damage for difference in schema)
        findings = {"schema": (), **report.findings} | {"schema": tuple(map(str, schema))}  # in this order
        rows |= {what: text.printable_lines(problems) or "ok" for what, problems in findings.items()}
        is_whole = not any(findings.values())
        if is_whole:
            leased, lease_seconds = repository.get_buffer_status().syncing, repository.get_config("lease_seconds")
            rows["open leases"] = f"{leased} (each expires after {lease_seconds} s)" if leased else "none"
    if is_whole:
        # Never open a damaged file for writing, not even to read its settings.
        with engine_for(path, write=True) as engine:
            settings = _server_settings(engine) if is_server(path) else pragmas(engine)
            rows["settings of a connection"] = "\n".join(f"{name} {value}" for name, value in settings.items())
    print(*text.rows(rows), sep="\n")
    if is_damaged:
        print(text.styled("The buffer is DAMAGED.", "red"), "Nothing was changed. Restore a backup.")
        return 1
    if is_whole:
        print(text.styled("The buffer is whole.", "green"))
        return 0
    print(
        "No receipt is damaged, and there is NOTHING TO RESTORE. But the buffer differs from what this release makes: "
        "undo what was changed by hand, correct a setting; timestamps out of order stay. Nothing was changed."
    )
    return DIFFERS


def _server_version(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.scalar(sql("SHOW server_version")))


def _server_settings(engine: Engine) -> dict[str, str]:
    """The settings on which the durability of a commit depends."""
    with engine.connect() as connection:
        return {name: str(connection.scalar(sql(f"SHOW {name}"))) for name in SERVER_SETTINGS}


def _export(arguments: argparse.Namespace) -> int:
    problems = []
    for found in salvage(existing(file_path(path_of(arguments), "On a server, use pg_dump, or `list --json`."))):
        if isinstance(found, Lost):
            problems += [f"receipt {receipt_id} could not be read" for receipt_id in found.ids]
            problems += [found.problem] if found.problem else []
            continue
        print(json.dumps(found, ensure_ascii=False, default=_as_text))
        if not is_intact(str(found["fiscal_doc"]), found.get("digest")):
            problems.append(f"receipt {found['id']} was changed: its document does not match its digest")
    for problem in problems:
        print(f"error: {text.printable(problem)}", file=sys.stderr)
    return 1 if problems else 0


def _as_text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
