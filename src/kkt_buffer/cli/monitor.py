"""Commands for monitoring systems: check (Nagios and its like) and metrics (Prometheus)."""

import argparse
import time
from typing import TYPE_CHECKING

from kkt_buffer.cli import text
from kkt_buffer.cli.look import REFUSING
from kkt_buffer.cli.target import add_command, repository_for
from kkt_buffer.errors import BufferStorageError, ReceiptBufferError
from kkt_buffer.metrics import as_text
from kkt_buffer.operations.status import SECONDS_PER_DAY, BufferStatus

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

OK, WARNING, CRITICAL, UNKNOWN = range(4)
NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


def add(commands: "Commands") -> None:
    """Add the commands of this file."""
    command = add_command(
        commands,
        "check",
        _check,
        "one line and an exit status for Nagios and the like\n\n"
        "CRITICAL (2): the buffer is missing, damaged or cannot be read; it takes no receipts, because it was moved or "
        "its server would lose them; it is full to -c percent; its oldest receipt must be delivered within --days "
        "days.\n\n"
        "WARNING (1): it is full to -w percent, or there are dead letters, which somebody must decide about.\n\n"
        "UNKNOWN (3): wrong usage, another schema, an invalid setting.\n\nOK (0): everything else.",
    )
    command.usage_status = UNKNOWN  # 2 would be CRITICAL
    command.add_argument("-w", type=float, default=80.0, metavar="PERCENT", help="default: %(default)g")
    command.add_argument("-c", type=float, default=95.0, metavar="PERCENT", help="default: %(default)g")
    command.add_argument("--days", type=float, default=10.0, metavar="DAYS", help="default: %(default)g")

    add_command(
        commands,
        "metrics",
        _metrics,
        "the figures as Prometheus text\n\n"
        "For the textfile collector of the node exporter:\n\n"
        "kkt-buffer metrics > kkt.new && mv kkt.new /var/lib/node_exporter/kkt.prom",
    )


def _check(arguments: argparse.Namespace) -> int:
    try:
        with repository_for(arguments) as repository:
            status, refused = repository.get_buffer_status(), repository.why_refused()
    except (ReceiptBufferError, ValueError, RuntimeError) as error:
        state = CRITICAL if isinstance(error, BufferStorageError) else UNKNOWN
        line = " ".join(str(error).replace("|", "/").split())
    else:
        state, line = _judge(status, arguments.w, arguments.c, arguments.days)
        if refused is not None:
            state, line = CRITICAL, f"TAKES NO RECEIPTS: {refused}, {line}"
    print(f"KKT {NAMES[state]} - {line}")
    return state


def _judge(status: BufferStatus, warning: float, critical: float, days: float) -> tuple[int, str]:
    """The state of a buffer, and the line that tells it, with performance data."""
    undelivered = status.undelivered
    parts = [f"{undelivered} of {status.capacity} receipts undelivered ({status.percent_full:g} %)"]
    state = OK
    if status.percent_full >= warning:
        state = CRITICAL if status.percent_full >= critical else WARNING
    if undelivered >= status.capacity:
        parts.insert(0, REFUSING)
    if status.dlq_size:
        state = max(state, WARNING)
        parts.append(text.counted(status.dlq_size, "dead letter"))
    left = ""
    if status.deadline_at is not None:
        days_left = (status.deadline_at - time.time()) / SECONDS_PER_DAY
        if days_left <= days:
            state = CRITICAL
        parts.append(
            f"{days_left:.1f} days to deliver the oldest" if days_left > 0 else "THE 30-DAY DEADLINE HAS PASSED"
        )
        left = f" days_left={days_left:.2f};;{days:g}:"
    figures = (
        f"percent_full={status.percent_full:g}%;{warning:g};{critical:g};0;100"
        f" undelivered={undelivered};;;0;{status.capacity} dead_letters={status.dlq_size};0;;0{left}"
    )
    return state, f"{', '.join(parts)} | {figures}"


def _metrics(arguments: argparse.Namespace) -> None:
    with repository_for(arguments) as repository:
        print(as_text(repository), end="")
