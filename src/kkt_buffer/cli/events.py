"""The command `events`, and how events are printed."""

import argparse
from collections.abc import Iterator
from time import sleep
from typing import TYPE_CHECKING

from kkt_buffer.cli import text
from kkt_buffer.cli.target import add_command, repository_for
from kkt_buffer.models import BufferEvent, EventType
from kkt_buffer.repository import ReceiptRepository

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

ROUTINE = {EventType.RECEIPT_ADDED, EventType.RECEIPT_SYNCED}  # so many that they hide the others
PAGE = 500
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
            message = f"{event.receipt_id}  {text.cut(error, ERROR_WIDTH)}"
        start = f"{text.local_time(event.timestamp)[:19]}  {kind:<{KIND_WIDTH}}  "
        lines += text.wrapped((start + text.printable(message)).rstrip(), len(start), 0)
    return lines


def latest(repository: ReceiptRepository, limit: int, *, routine: bool = False) -> list[BufferEvent]:
    """The last events, oldest first; those of `ROUTINE` only if asked for."""
    count = limit
    while True:
        found = repository.get_events(count)
        shown = [event for event in found if routine or event.event_type not in ROUTINE]
        if len(shown) >= limit or len(found) < count:
            return shown[:limit][::-1]
        count = max(2 * count, PAGE)


def _events(arguments: argparse.Namespace) -> None:
    with repository_for(arguments) as repository:
        with repository.reading():  # else an event between the two would be printed twice
            last = max((event.id for event in repository.get_events(1)), default=0)
            shown = latest(repository, arguments.limit, routine=arguments.all)
        print("\n".join(event_lines(shown)) or "no events", flush=True)
        try:
            while arguments.follow:
                sleep(1)
                if new := list(_after(repository, last)):
                    last = new[-1].id
                    shown = [event for event in new if arguments.all or event.event_type not in ROUTINE]
                    print("".join(f"{line}\n" for line in event_lines(shown)), end="", flush=True)
        except KeyboardInterrupt:  # the way to end it
            return


def _after(repository: ReceiptRepository, last: int) -> Iterator[BufferEvent]:
    """The events after number `last`, oldest first."""
    limit = PAGE
    while len(found := [event for event in repository.get_events(limit) if event.id > last]) == limit:
        limit *= 2
    return reversed(found)
