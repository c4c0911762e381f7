"""Commands that look at a buffer and change nothing: status, watch, list, show, dead-letters, held."""

import argparse
import json
import sys
from dataclasses import asdict
from time import sleep, time
from typing import TYPE_CHECKING, Any

from kkt_buffer.cli import text
from kkt_buffer.cli.events import event_lines, latest
from kkt_buffer.cli.target import add_command, engine_for, path_of, repository_for, shown
from kkt_buffer.errors import InvalidDocumentError, ReceiptNotFoundError
from kkt_buffer.migrate import current
from kkt_buffer.models import DeadLetter, EventType, Receipt, ReceiptStatus
from kkt_buffer.operations.status import SECONDS_PER_DAY, BufferStatus
from kkt_buffer.repository import ReceiptRepository

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands

ALL = 1_000_000
REFUSING = "THE TILL IS REFUSING RECEIPTS"


def add(commands: "Commands") -> None:
    """Add the commands of this file."""
    command = add_command(
        commands,
        "status",
        _status,
        "show how full the buffer is\n\n"
        "Full means that the till refuses to sell. Receipts that are pending, being sent or held are what fills it.",
    )
    command.add_argument("--json", action="store_true", help="print it as JSON, times as Unix seconds")

    command = add_command(commands, "watch", _watch, "show the status again and again; Control-C ends it")
    command.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="default: %(default)s")

    command = add_command(
        commands,
        "list",
        _list,
        "list receipts\n\nWithout --status: those that were not delivered (syncing, pending, failed).",
    )
    command.add_argument(
        "--status", choices=[status.value for status in ReceiptStatus], help="only those of one status"
    )
    command.add_argument("--pos", metavar="POS_ID", help="only those of one till")
    command.add_argument("--limit", type=int, default=100, metavar="N", help="of each status; default: %(default)s")
    command.add_argument("--json", action="store_true", help="one JSON object per line, with the document")
    _add_reveal(command)

    command = add_command(commands, "show", _show, "show one receipt, and what happened to it", path=False)
    command.add_argument("id", metavar="ID", help="the id of the receipt, as `list` prints it")
    command.add_argument("--full", action="store_true", help="show all of a long document")
    _add_reveal(command)

    command = add_command(
        commands,
        "dead-letters",
        _dead_letters,
        "list receipts that somebody must decide about\n\n"
        "They are not sent again by themselves. `requeue` sends them again, `resolve` closes them without sending.",
    )
    command.add_argument("--error", metavar="TEXT", help="only those with this text in their reason or last error")

    add_command(
        commands,
        "held",
        _held,
        "list receipts that are not printed yet\n\n"
        "As far as the buffer knows: after a crash, ask the fiscal drive about each. The till completes what was "
        "printed, `discard` closes what was not.",
    )


def _add_reveal(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reveal", action="store_true", help="show personal data (buyer, cashier), which is masked")


# The status.


def _status_lines(repository: ReceiptRepository, path: str, schema: str | None) -> list[str]:
    """The state of a buffer for people."""
    status = repository.get_buffer_status()
    undelivered, name = status.undelivered, text.printable(shown(path))
    full = f"{status.percent_full:.2f} %  ({undelivered} of {status.capacity})"
    if text.is_terminal():
        full = text.styled(text.bar(status.percent_full), _style_of(status)) + f"  {full}"
    failed = f"{status.failed}  (open dead letters: {status.dlq_size}, closed: {status.failed - status.dlq_size})"
    table = {
        "buffer": name,
        "schema": str(schema),
        "full": full,
        "pending": f"{status.pending}  (held, not printed yet: {status.held})",
        "syncing": f"{status.syncing}  (expired leases: {status.expired_leases})",
        "synced": f"{status.synced}",
        "failed": text.styled(failed, "yellow") if status.dlq_size else failed,
        "total": f"{status.total_receipts}",
        "oldest undelivered": _when(status.oldest_undelivered_at) or "nothing waits",
        "deliver before": _when(status.deadline_at) or "nothing waits",
        "last delivery": _when(status.last_synced_at) or "none yet",
        "last outage": _when(status.last_outage_at) or "none on record",
        "circuit breaker": "closed",
    }
    if status.circuit_opened_at is not None:
        table["circuit breaker"] = text.styled(f"OPEN since {_when(status.circuit_opened_at)}", "yellow")
        for event in repository.get_events(1, event_type=EventType.CIRCUIT_OPENED):
            table["opened by"] = text.printable(str(event.details.get("error")) if event.details else "not recorded")
    if (refused := repository.why_refused()) is not None:
        table["takes receipts"] = text.styled(f"NO: {refused}", "red")
    if status.deadline_at is not None and status.deadline_at - time() < 10 * SECONDS_PER_DAY:
        table["deliver before"] = text.styled(table["deliver before"], "red")
    alarm = []
    if undelivered >= status.capacity:
        advice = (
            "The buffer is full. Everything in it is safe; new receipts are refused until there is room.",
            "`kkt-buffer events` tells why nothing is delivered. To go on selling meanwhile:",
            f"kkt-buffer config --db {name} buffer_capacity {2 * max(undelivered, status.capacity)}",
        )
        alarm = [
            text.styled(f" {REFUSING} ", "alarm"),
            *(part for line in advice for part in text.wrapped(line, 0)),
            "",
        ]
    return [*alarm, *text.rows(table)]


def _style_of(status: BufferStatus) -> str:
    limits = ((95, "red"), (80, "yellow"))
    return next((style for limit, style in limits if status.percent_full >= limit), "green")


def _when(seconds: int | None) -> str:
    return f"{text.local_time(seconds)}  ({text.distance(seconds)})" if seconds is not None else ""


def _status(arguments: argparse.Namespace) -> None:
    if arguments.json:
        path = path_of(arguments)
        with engine_for(path) as engine:
            status = asdict(ReceiptRepository(engine).get_buffer_status())
            status = {"path": shown(path), "schema": current(engine), **status}
        print(json.dumps(status, ensure_ascii=False))
    else:
        print_status(path_of(arguments))


def print_status(path: str) -> None:
    """Print the state of a buffer for people."""
    with engine_for(path) as engine:
        lines = _status_lines(ReceiptRepository(engine), path, current(engine))
    print(*lines, sep="\n")


def _watch(arguments: argparse.Namespace) -> None:
    path = path_of(arguments)
    if not arguments.every > 0:
        raise ValueError("--every: expected a number of seconds above 0")
    with engine_for(path) as engine:
        repository, schema = ReceiptRepository(engine), current(engine)
        back = ""
        try:
            while True:
                lines = [*_status_lines(repository, path, schema), "", *event_lines(latest(repository, 5))]
                if text.is_terminal():
                    lines = lines[: text.height() - 1]
                    print(back + "\n".join(lines), flush=True)
                    back = f"\x1b[{len(lines)}F\x1b[J"  # to the first line, and clear what follows
                else:
                    print(text.local_time(int(time())), *lines, "", sep="\n", flush=True)
                sleep(arguments.every)
        except KeyboardInterrupt:  # the way to end it
            return


# Receipts.


def _list(arguments: argparse.Namespace) -> None:
    statuses = [arguments.status] if arguments.status else ["syncing", "pending", "failed"]
    with repository_for(arguments) as repository:
        found: list[Receipt] = []
        for status in statuses:
            found += _some(repository, status, arguments.pos, arguments.limit)
    if arguments.json:
        for receipt in found:
            print(json.dumps(_as_dict(receipt, reveal=arguments.reveal), ensure_ascii=False))
    else:
        _print_receipts(found)


def _some(repository: ReceiptRepository, status: str, pos_id: str | None, limit: int) -> list[Receipt]:
    """At most `limit` receipts, and a word on stderr if there are more."""
    found = repository.list_receipts(status=status, pos_id=pos_id, limit=limit + 1)
    if len(found) > limit:
        print(f"only the first {limit} {status} receipts; --limit shows more", file=sys.stderr)
    return found[:limit]


def _print_receipts(receipts: list[Receipt]) -> None:
    lines = text.columns(
        ("ID", "TILL", "STATUS", "STORED", "TRIES"),
        [
            (
                receipt.id,
                text.cut(receipt.pos_id, 16),
                "held" if receipt.held_at is not None and receipt.status == "pending" else receipt.status,
                text.local_time(receipt.created_at)[5:16],
                receipt.retry_count,
            )
            for receipt in receipts
        ],
    )
    for line, receipt in zip(lines, (None, *receipts), strict=False):
        print(text.styled(line, "bold") if receipt is None else line)
        if receipt is not None and receipt.last_error:
            print(text.styled(text.first_line(receipt.last_error, 4), "dim"))
    if not receipts:
        print("no such receipts")


def _indented(remark: str) -> str:
    return "\n".join(text.wrapped(text.printable(remark), 4))


def _as_dict(receipt: Receipt, *, reveal: bool) -> dict[str, Any]:
    try:
        values = receipt.to_dict()
    except InvalidDocumentError:
        # What cannot be decoded cannot be masked.
        return {"id": receipt.id, "status": receipt.status, "fiscal_doc": receipt.fiscal_doc if reveal else text.MASK}
    return values if reveal else {**values, "fiscal_doc": text.masked(values["fiscal_doc"])}


def _show(arguments: argparse.Namespace) -> None:
    with repository_for(arguments) as repository, repository.reading():
        receipt = repository.get_receipt_by_id(arguments.id)
        if receipt is None:
            raise ReceiptNotFoundError(arguments.id)
        events = repository.get_events(ALL, receipt_id=receipt.id)[::-1]
        days = int(repository.get_config("ofd_deadline_days") or 0)
    print(*text.rows(_facts(receipt, days)), sep="\n")
    print("\n" + text.styled("document", "bold"))
    print(*_document_lines(receipt, full=arguments.full, reveal=arguments.reveal), sep="\n")
    print("\n" + text.styled("what happened", "bold"))
    print(*event_lines(events, about=False), sep="\n")


def _facts(receipt: Receipt, days: int) -> dict[str, str]:
    status = str(receipt.status)
    if receipt.held_at is not None:
        status += f", held since {_when(receipt.held_at)}: not printed yet"
    if receipt.lease_expires_at is not None:
        status += f", leased until {_when(receipt.lease_expires_at)}"
    if receipt.next_attempt_at is not None:
        status += f", next attempt {_when(receipt.next_attempt_at)}"
    size = len(receipt.fiscal_doc.encode())
    facts = {
        "receipt": text.printable(receipt.id),
        "till": text.printable(receipt.pos_id),
        "status": status,
        "stored": _when(receipt.created_at),
        "attempts": f"{receipt.retry_count}",
    }
    if receipt.last_error:
        facts["last error"] = text.printable(receipt.last_error)
    if receipt.synced_at is None:
        facts["deliver before"] = _when(receipt.created_at + days * SECONDS_PER_DAY)
    else:
        facts["delivered"] = f"{_when(receipt.synced_at)}, by the clock of the OFD {_when(receipt.hlc_server_time)}"
    state = "intact" if receipt.is_intact else "CHANGED since it was stored: it does not match its digest"
    return {**facts, "document": f"{size:,} bytes, {state}"}


def _document_lines(receipt: Receipt, *, full: bool, reveal: bool) -> list[str]:
    try:
        document = text.decoded(receipt.fiscal_doc)
    except (ValueError, RecursionError):
        # What cannot be decoded cannot be masked.
        return [text.printable(receipt.fiscal_doc) if reveal else "not JSON; --reveal shows it as it is"]
    document = document if reveal else text.masked(document)
    return text.json_lines(document if full else text.folded(document))


def _dead_letters(arguments: argparse.Namespace) -> None:
    with repository_for(arguments) as repository:
        found = matching(repository, arguments.error)
    for letter in found:
        since = f"since {text.local_time(letter.failed_at)[:16]}, after {letter.retry_attempts} failed attempts"
        print(f"{text.styled(text.printable(letter.original_receipt_id), 'bold')}  {since}")
        print(_indented(letter.reason))
    print(text.counted(len(found), "open dead letter") if found else "no open dead letters")


def matching(repository: ReceiptRepository, error: str | None) -> list[DeadLetter]:
    """The open dead letters, oldest first; only those with a text in their reason or last error if given."""
    wanted = (error or "").casefold()
    return [
        letter
        for letter in repository.list_dead_letters(limit=ALL)
        if wanted in f"{letter.reason}\n{letter.last_error or ''}".casefold()
    ]


def _held(arguments: argparse.Namespace) -> None:
    with repository_for(arguments) as repository:
        _print_receipts(repository.list_held(ALL))
