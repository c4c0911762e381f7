"""Which buffer a command works on, and how it is opened."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import Engine

from kkt_buffer.buffer import DEFAULT_PATH, PATH_VARIABLE
from kkt_buffer.engine import create_buffer_engine, public_url, url_of
from kkt_buffer.errors import BufferStorageError
from kkt_buffer.migrate import require
from kkt_buffer.repository import ReceiptRepository
from kkt_buffer.sqlite.driver import known_bugs
from kkt_buffer.sqlite.engine import file_of

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]  # noqa: SLF001 (the type has no public name)

Run = Callable[[argparse.Namespace], int | None]


class _Paragraphs(argparse.HelpFormatter):
    """Keeps the paragraphs of a text, and breaks their lines to the width of the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))


class Parser(argparse.ArgumentParser):
    """A parser whose texts have paragraphs, and whose exit status for wrong usage can be set."""

    usage_status = 2

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 (argparse's own options)
        super().__init__(formatter_class=_Paragraphs, **options)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit; with `usage_status` instead of argparse's 2."""
        super().exit(self.usage_status if status else 0, message)

    def error(self, message: str) -> NoReturn:
        """Exit because of wrong usage, and name the help."""
        super().error(f"{message}; see `{self.prog} --help`")


def add_command(  # noqa: PLR0913 (two are switches)
    commands: "Commands", name: str, run: Run, text: str, *, path: bool = True, db: bool = True
) -> Parser:
    """Add a command with `--db`, and with PATH as an argument if it has no arguments of its own."""
    parser = commands.add_parser(name, help=text.split("\n", 1)[0], description=text)
    if db:
        # SUPPRESS: without --db here, a --db in front of the command counts.
        parser.add_argument(
            "--db",
            metavar="PATH",
            default=argparse.SUPPRESS,
            help=f"the buffer, by its path or the URL of a server; else ${PATH_VARIABLE}, else {DEFAULT_PATH}",
        )
    if path:
        parser.add_argument("path", nargs="?", metavar="PATH", help="the buffer, like --db PATH")
    parser.set_defaults(run=run, parser=parser)
    return parser


def path_of(arguments: argparse.Namespace, default: str | None = None) -> str:
    """The path or URL of the buffer that the command line names; else `default`, or the buffer of this machine."""
    named, positional = arguments.db, getattr(arguments, "path", None)
    if named is not None and positional is not None:
        arguments.parser.error(f"the buffer is named twice: {shown(named)} and {shown(positional)}")
    path: str | None = positional if named is None else named
    if path is not None:
        return path
    return default or os.environ.get(PATH_VARIABLE) or DEFAULT_PATH


def is_server(path: str) -> bool:
    """Is the buffer named by the URL of a server, not by its path?"""
    return "://" in path and url_of(path).get_backend_name() != "sqlite"


def shown(path: str) -> str:
    """The path or URL as it may be printed: without a password."""
    return public_url(url_of(path)).render_as_string() if is_server(path) else path


def file_path(path: str, advice: str) -> str:
    """The path, unless it is the URL of a server: `ValueError`, with advice what to use there."""
    if is_server(path):
        raise ValueError(f"{shown(path)}: this command needs a file. Nothing was changed. {advice}")
    return path


def existing(path: str) -> str:
    """The path or URL, unless there is no file or an empty one: `BufferStorageError`."""
    file = None if is_server(path) else file_of(path)
    if file is None:  # in memory, or on a server
        return path
    try:
        is_empty = file.stat().st_size == 0 and file.is_file()
    except FileNotFoundError as error:
        raise BufferStorageError(
            f"there is no buffer at {path}; check the path (--db PATH, or {PATH_VARIABLE})"
        ) from error
    except OSError:  # whoever opens it gets this error too, and explains it
        return path
    if is_empty:
        raise BufferStorageError(f"{path} is not a buffer: the file is empty. Nothing was changed.")
    return path


@contextmanager
def engine_for(path: str, *, write: bool = False, notice: bool = True) -> Iterator[Engine]:
    """
    An engine on a buffer that exists and has the schema of this release.

    Without `notice`, the known bugs of the SQLite in use are not written to the log.
    """
    # Read-only first, also to write: a missing file must not be created.
    engine = create_buffer_engine(existing(path), read_only=True)
    try:
        require(engine)
        if write:
            if not notice and not is_server(path):
                known_bugs(engine)
            engine.dispose()
            engine = create_buffer_engine(path)
        yield engine
    finally:
        engine.dispose()


@contextmanager
def repository_for(
    arguments: argparse.Namespace, *, write: bool = False, notice: bool = True
) -> Iterator[ReceiptRepository]:
    """The repository that a command works on; read-only unless it writes."""
    with engine_for(path_of(arguments), write=write, notice=notice) as engine:
        yield ReceiptRepository(engine)
