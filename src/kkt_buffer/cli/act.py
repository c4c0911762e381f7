"""Commands by which a person decides something: requeue, resolve, discard, config."""

import argparse
import contextlib
import getpass
import sys
from typing import TYPE_CHECKING, Protocol

from kkt_buffer.cli import text
from kkt_buffer.cli.look import matching
from kkt_buffer.cli.target import add_command, path_of, repository_for, shown
from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.errors import BufferFullError, InvalidConfigError, InvalidTransitionError, ReceiptNotFoundError
from kkt_buffer.repository import ReceiptRepository

if TYPE_CHECKING:
    from kkt_buffer.cli.target import Commands


class Decide(Protocol):
    """An operation by which a person decides about one receipt."""

    def __call__(self, repository: ReceiptRepository, receipt_id: str, /, *, actor: str, reason: str) -> object:
        """Decide it."""


def add(commands: "Commands") -> None:
    """Add the commands of this file."""
    command = add_command(
        commands,
        "requeue",
        _requeue,
        "send dead letters again\n\n"
        "Use it after the cause is fixed. Each receipt is pending again; it keeps its place in the order, and its "
        "deadline. If the buffer has no room for all of them, the rest stay dead letters.",
        path=False,
    )
    which = command.add_argument_group("which").add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all open dead letters")
    which.add_argument("--error", metavar="TEXT", help="those with this text in their reason or last error")
    command.add_argument("ids", nargs="*", metavar="ID", help="the id of a receipt, as `dead-letters` prints it")
    _add_who(command)

    command = add_command(
        commands,
        "resolve",
        _resolve,
        "close dead letters without sending them\n\n"
        "Final: the OFD will not get these receipts from here, and the 30-day rule no longer counts them.",
        path=False,
    )
    command.add_argument("ids", nargs="+", metavar="ID", help="the id of a receipt, as `dead-letters` prints it")
    _add_who(command)

    command = add_command(
        commands,
        "discard",
        _discard,
        "close held receipts that were never printed\n\n"
        "Final. Ask the fiscal drive first: what was printed must be delivered.",
        path=False,
    )
    command.add_argument("ids", nargs="+", metavar="ID", help="the id of a receipt, as `held` prints it")
    _add_who(command)

    command = add_command(commands, "config", _config, "show the settings, show one, or change one", path=False)
    command.add_argument("key", nargs="?", metavar="KEY", help="for example buffer_capacity")
    command.add_argument("value", nargs="?", metavar="VALUE", help="the new value")


def _add_who(command: argparse.ArgumentParser) -> None:
    command.add_argument("--actor", default=_login(), help="who decided it; recorded (default: %(default)s)")
    command.add_argument("--reason", required=True, help="why; recorded")
    command.add_argument("--yes", action="store_true", help="do not ask before more than one receipt is changed")


def _login() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run without a name for its user
        return None


def _requeue(arguments: argparse.Namespace) -> int:
    if bool(arguments.ids) is bool(arguments.all or arguments.error is not None):
        arguments.parser.error("name either the ids of receipts, or --all, or --error TEXT")
    return _decide(arguments, "requeue", "requeued", ReceiptRepository.requeue)


def _resolve(arguments: argparse.Namespace) -> int:
    return _decide(arguments, "resolve", "resolved", ReceiptRepository.resolve)


def _discard(arguments: argparse.Namespace) -> int:
    def discard(repository: ReceiptRepository, receipt_id: str, *, actor: str, reason: str) -> None:
        try:
            repository.discard_held(receipt_id, actor=actor, reason=reason)
        except InvalidTransitionError as error:
            receipt = repository.get_receipt_by_id(receipt_id)
            if error.status == "failed" and receipt is not None and receipt.held_at is not None:
                advice = "It was discarded or resolved already."
                raise InvalidTransitionError(receipt_id, error.status, error.wanted, advice) from error
            raise

    return _decide(arguments, "discard", "discarded", discard)


def _decide(arguments: argparse.Namespace, verb: str, done: str, decide: Decide) -> int:
    """Decide about each receipt in a commit of its own; 1 if one of them could not be changed."""
    if not arguments.actor:
        arguments.parser.error("--actor is needed: the login name is not known here")
    with repository_for(arguments, write=True, notice=False) as repository:
        ids = arguments.ids or [letter.original_receipt_id for letter in matching(repository, arguments.error)]
        if not ids and arguments.error is not None:
            raise ValueError("no open dead letter has this text in its reason or last error; nothing was changed")
        if len(ids) > 1 and not arguments.yes:
            _ask(f"{verb} {len(ids)} receipts of {shown(path_of(arguments))}, as {arguments.actor}?")
        count = 0
        for receipt_id in ids:
            try:
                decide(repository, receipt_id, actor=arguments.actor, reason=arguments.reason)
                count += 1
            except BufferFullError as error:
                print(f"error: {error}", file=sys.stderr)
                break
            except (ReceiptNotFoundError, InvalidTransitionError) as error:
                print(f"error: {error}", file=sys.stderr)
    print(f"{count} of {len(ids)} receipts {done}")
    return 0 if count == len(ids) else 1


def _ask(question: str) -> None:
    """Raise unless a person says yes."""
    if not sys.stdin.isatty():
        raise ValueError(f"{question} Nothing was changed. Without a terminal, pass --yes.")
    if input(f"{question} [y/N] ").strip().lower() not in {"y", "yes"}:
        raise ValueError("nothing was changed")


def _config(arguments: argparse.Namespace) -> None:
    key, value = arguments.key, arguments.value
    if value is not None and key not in CONFIG_RULES:
        raise ValueError(f"{key}: no such setting; expected one of {', '.join(CONFIG_RULES)}. Nothing was changed.")
    with repository_for(arguments, write=value is not None, notice=False) as repository:
        if key is None:
            lines = text.columns(
                ("SETTING", "VALUE", "DEFAULT", "ALLOWED"),
                [
                    (name, repository.get_config(name), rule.default, f"{rule.minimum} to {rule.maximum:,}")
                    for name, rule in CONFIG_RULES.items()
                ],
            )
            print(*lines, sep="\n")
        elif value is None:
            found = repository.get_config(key)
            if found is None:
                raise ValueError(f"{key}: no such setting; expected one of {', '.join(CONFIG_RULES)}")
            print(text.printable(found))
        else:
            # The old value is not read first: it may be invalid, and this command corrects it.
            repository.set_config(key, value)
            print(f"{key} {repository.get_config(key)}")
            if key == "buffer_capacity":
                _warn_if_full(repository)


def _warn_if_full(repository: ReceiptRepository) -> None:
    with contextlib.suppress(InvalidConfigError):  # another setting is invalid; this one is changed all the same
        status = repository.get_buffer_status()
        waiting = status.undelivered
        if waiting >= status.capacity:
            message = f"{text.counted(waiting, 'receipt')} waiting: the till refuses new ones until fewer than"
            print(f"warning: {message} {status.capacity} are waiting, or buffer_capacity is raised", file=sys.stderr)
