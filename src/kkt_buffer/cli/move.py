"""The command that moves a file to a server."""

import argparse
import contextlib
import logging
import sys
from typing import TYPE_CHECKING

from kkt_buffer.cli import text
from kkt_buffer.cli.target import add_command, engine_for, file_path, is_server, shown
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import ReceiptBufferError
from kkt_buffer.move import move
from kkt_buffer.repository import ReceiptRepository

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands


def add(commands: "Commands") -> None:
    """Add the command."""
    command = add_command(
        commands,
        "move",
        _move,
        "move a file to a PostgreSQL server, whole\n\n"
        "Receipts with their ids, timestamps and statuses, dead letters, events and settings. Stop the programs that "
        "use the file first. From the moment at which the copying begins, the file refuses every change, whichever "
        "program asks for it; it can be read, and keeps every row.\n\n"
        "The database or schema must be empty, or not upgraded yet. A move that was interrupted has left nothing "
        "there: run it again.",
        path=False,
        db=False,
    )
    command.usage = "kkt-buffer move SRC DST"
    command.add_argument("source", metavar="SRC", help="the path of the file")
    command.add_argument("target", metavar="DST", help="the URL of the server: postgresql+psycopg://…")


def _move(arguments: argparse.Namespace) -> None:
    source, target = arguments.source, arguments.target
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # its warnings repeat what is told below
    if arguments.db is not None:
        arguments.parser.error("expected SRC and DST without --db")
    if not is_server(target):
        raise ValueError(f"{target}: expected the URL of a server, postgresql+psycopg://…. Nothing was changed.")
    with engine_for(file_path(source, "Move a server by its own means: pg_dump."), write=True, notice=False) as here:
        there = create_buffer_engine(target)
        try:
            moved = move(here, there)
        except BaseException:  # Control-C too
            with contextlib.suppress(ReceiptBufferError):
                if (refused := ReceiptRepository(here).why_refused()) is not None:
                    print(f"{source} takes no receipts: {refused}", file=sys.stderr)
            raise
        finally:
            there.dispose()
    what = ", ".join(
        text.counted(moved.rows[table], noun)
        for table, noun in (
            ("receipts", "receipt"),
            ("dlq", "dead letter"),
            ("buffer_events", "event"),
            ("config", "setting"),
        )
    )
    if moved.is_repeated:
        print(f"{shown(target)}: {source} was moved here before; now it holds {what}. Nothing was changed.")
        return
    print(f"{shown(target)}: {what}, in {moved.seconds:.1f} s; every row was compared")
    print(f"Give the services this URL, as BUFFER_DB_PATH for example. Keep {source}: it is closed, and has every row.")
