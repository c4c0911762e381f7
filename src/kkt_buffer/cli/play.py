"""Commands that run until they are done: demo."""

import argparse
from typing import TYPE_CHECKING

from kkt_buffer import demo
from kkt_buffer.cli.look import print_status
from kkt_buffer.cli.target import add_command

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

DEMO_PATH = "data/demo.db"


def add(commands: "Commands") -> None:
    """Add the commands of this file."""
    add_command(
        commands,
        "demo",
        _demo,
        "play a shift on a real buffer, with a kill in the middle\n\n"
        f"Without a path it uses {DEMO_PATH}, never the buffer of the till.",
    )


def _demo(arguments: argparse.Namespace) -> None:
    path = arguments.path or arguments.db or DEMO_PATH
    demo.run(path)
    print_status(path)
