"""Commands for monitoring systems: check (Nagios and its like) and metrics (Prometheus)."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from kkt_buffer.cli.target import add_command, path_of, repository_for
from kkt_buffer.errors import BufferBusyError, BufferStorageError, ReceiptBufferError
from kkt_buffer.metrics import as_text
from kkt_buffer.operations.status import SECONDS_PER_DAY, BufferStatus

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

OK, WARNING, CRITICAL, UNKNOWN = range(4)
NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


class _Plugin(argparse.ArgumentParser):
    """A parser whose errors are UNKNOWN: argparse's own exit status, 2, would be CRITICAL."""

    def error(self, message: str) -> NoReturn:
        print(f"KKT UNKNOWN - {message}")
        sys.exit(UNKNOWN)


def add(commands: "Commands") -> None:
    """Add the commands of this file."""
    command = add_command(
        commands,
        "check",
        _check,
        "one line and an exit status for Nagios, Icinga, Zabbix\n\n"
        "CRITICAL (2): the buffer is missing, damaged or cannot be read, is full to -c percent, or its oldest receipt\n"
        "must be delivered within --days days.\n"
        "WARNING (1): it is full to -w percent, or there are dead letters, which somebody must decide about.\n"
        "UNKNOWN (3): wrong usage, a busy file, another schema, an invalid setting.  OK (0): everything else.",
    )
    command.__class__ = _Plugin
    command.add_argument("-w", type=float, default=80.0, metavar="PERCENT", help="default: %(default)g")
    command.add_argument("-c", type=float, default=95.0, metavar="PERCENT", help="default: %(default)g")
    command.add_argument("--days", type=float, default=10.0, metavar="DAYS", help="default: %(default)g")

    add_command(
        commands,
        "metrics",
        _metrics,
        "the figures as Prometheus text, for the textfile collector of the node exporter\n\n"
        "kkt-buffer metrics > kkt.prom.new && mv kkt.prom.new /var/lib/node_exporter/kkt.prom",
    )


def _check(arguments: argparse.Namespace) -> int:
    try:
        with repository_for(arguments) as repository:
            status = repository.get_buffer_status()
    except (ReceiptBufferError, ValueError, RuntimeError) as error:
        is_broken = isinstance(error, BufferStorageError) and not isinstance(error, BufferBusyError)
        state, line = CRITICAL if is_broken else UNKNOWN, " ".join(str(error).replace("|", "/").split())
    else:
        state, line = _judge(status, arguments.w, arguments.c, arguments.days)
    print(f"KKT {NAMES[state]} - {line}")
    return state
