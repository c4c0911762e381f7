"""Long-running commands: work, demo."""

import argparse
import logging
import pkgutil
import shlex
import sys
from datetime import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kkt_buffer import demo
from kkt_buffer.cli.look import print_status
from kkt_buffer.cli.target import add_command, file_path, path_of, repository_for, shown
from kkt_buffer.worker import DeliveryWorker

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

DEMO_PATH = "data/demo.db"


def add(commands: "Commands") -> None:
    """Add the commands of this file."""
    command = add_command(
        commands,
        "work",
        _work,
        "deliver what is due, until it is stopped\n\n"
        "SEND is a function of a Python module, which is looked for in the current folder too: it sends one receipt "
        "and returns the time of the OFD; `kkt-buffer work shop:send`. Outcomes are logged to stderr.\n\n"
        "SIGTERM or Control-C stops it within one send, with the exit status 0; a second one stops it at once.",
        path=False,
    )
    command.add_argument("send", metavar="MODULE:SEND")
    command.add_argument("--batch", type=int, default=50, metavar="N", help="claimed at a time; default: %(default)s")
    command.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="senders at once; default: %(default)s"
    )
    command.add_argument(
        "--poll", type=float, default=1.0, metavar="SECONDS", help="between two polls; default: %(default)g"
    )
    command.add_argument(
        "--outage",
        action="append",
        default=[],
        metavar="MODULE:ERROR",
        help="an exception type that means: the OFD is down",
    )
    command.add_argument(
        "--maintenance-at", type=_time_of_day, metavar="HH:MM", help="every day: prune, and a backup if asked to"
    )
    command.add_argument("--backup-to", metavar="DIR", help="the folder of the backups; the last seven are kept")

    add_command(
        commands,
        "demo",
        _demo,
        "play a day of two tills on a real buffer, with kills in the middle\n\n"
        f"Without a path it uses {DEMO_PATH}, never the buffer of the till.",
    )


def _time_of_day(value: str) -> time:
    try:
        return time.fromisoformat(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a time of the day like 03:30, got {value!r}") from error


def _work(arguments: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path.cwd()))
    send, *outage = map(_named, [arguments.send, *arguments.outage])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("kkt_buffer").setLevel(logging.INFO)
    with repository_for(arguments, write=True) as repository:
        try:
            worker = DeliveryWorker(
                repository,
                send,
                batch=arguments.batch,
                concurrency=arguments.concurrency,
                poll_seconds=arguments.poll,
                outage=tuple(outage),
                maintenance_at=arguments.maintenance_at,
                backup_to=arguments.backup_to,
            )
        except TypeError as error:  # one of the names is something else
            raise ValueError(str(error)) from error
        logging.getLogger("kkt_buffer").info("delivering from %s by %s", shown(path_of(arguments)), arguments.send)
        worker.run()


def _named(name: str) -> Any:  # noqa: ANN401 (the worker checks what it is)
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: expected MODULE:NAME of something that can be imported; {error}") from error


def _demo(arguments: argparse.Namespace) -> None:
    path = file_path(path_of(arguments, DEMO_PATH), f"Without a path it is {DEMO_PATH}.")
    demo.run(path, _operate)
    print_status(path)


def _operate(*words: str) -> None:
    from kkt_buffer.cli import main  # noqa: PLC0415 (it imports this module)

    print(f"$ kkt-buffer {shlex.join(words)}", flush=True)
    main(words)
    print()
