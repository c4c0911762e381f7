"""The command `events`, and how events are printed."""

import argparse
from time import sleep
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, func, select, text

from kkt_buffer.arguments import whole_number
from kkt_buffer.cli.target import add_command, repository_for
from kkt_buffer.cli.text import cut, local_time, printable, wrapped
from kkt_buffer.models import RARE_EVENTS, BufferEvent
from kkt_buffer.repository import ReceiptRepository

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

KIND_WIDTH = 14  # "attempt_failed", the longest usual one
ERROR_WIDTH = 60


def add(commands: "Commands") -> None:
    """Add the command of this file."""
    command = add_command(
        commands,
        "events",
        _events,
        "list the last events, the newest at the end\n\nThat a receipt was added or synced is shown only with --all.",
    )
    command.add_argument("--limit", type=int, default=20, metavar="N", help="default: %(default)s")
    command.add_argument("--all", action="store_true", help="show `added` and `synced` too")
    command.add_argument("--follow", action="store_true", help="wait for new ones; Control-C ends it")


def event_lines(events: list[BufferEvent], *, about: bool = True) -> list[str]:
    """What happened, oldest first. With `about`: the receipt and its error; without: all details."""
    lines = []
    for event in events:
        kind = event.event_type.removeprefix("receipt_")
        details = event.details if isinstance(event.details, dict) else {}
        message = ", ".join(f"{key}: {value}" for key, value in details.items())
        if about and event.receipt_id is not None:
            error = str(details.get("error") or details.get("reason") or "").split("\n", 1)[0]
            message = f"{event.receipt_id}  {cut(error, ERROR_WIDTH)}"
        start = f"{local_time(event.timestamp)[:19]}  {kind:<{KIND_WIDTH}}  "
        lines += wrapped((start + printable(message)).rstrip(), len(start), 0)
    return lines


def latest(repository: ReceiptRepository, limit: int, *, routine: bool = False) -> list[BufferEvent]:
    """The last events, oldest first. Every receipt has `added` and `synced`: these only with `routine`."""
    statement = _events_of(routine=routine).order_by(BufferEvent.id.desc()).limit(whole_number("limit", limit, 1))
    with repository.reading() as session:
        return list(session.scalars(statement))[::-1]


def _events_of(*, routine: bool) -> Select[Any]:
    return select(BufferEvent) if routine else select(BufferEvent).where(text(RARE_EVENTS))


def _events(arguments: argparse.Namespace) -> None:
    with repository_for(arguments) as repository:
        with repository.reading() as session:  # else an event between the two would be printed twice
            last = session.scalar(select(func.max(BufferEvent.id))) or 0
            shown = latest(repository, arguments.limit, routine=arguments.all)
        print("\n".join(event_lines(shown)) or "no events", flush=True)
        try:
            while arguments.follow:
                sleep(1)
                statement = _events_of(routine=arguments.all).where(BufferEvent.id > last).order_by(BufferEvent.id)
                with repository.reading() as session:
                    new = list(session.scalars(statement))
                if new:
                    last = new[-1].id
                    print(*event_lines(new), sep="\n", flush=True)
        except KeyboardInterrupt:  # the way to end it
            return
