"""
The command line, `kkt-buffer COMMAND`: a file for each kind of command, and what they share in `target` and `text`.

Exit status: 0 for success; 1 for an error (one line on stderr), a receipt that was not found, or a damaged buffer; 2
for wrong usage; 3 if `verify` found a buffer that differs from what this release makes but is not damaged; 130 after
Control-C. `check` has the statuses of a Nagios plugin.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from kkt_buffer.cli import act, events, keep, look, monitor, move, run
from kkt_buffer.cli.target import Parser
from kkt_buffer.errors import ReceiptBufferError
from kkt_buffer.migrate import release

_EPILOG = """\
Every command takes --db PATH, where PATH may be the URL of a server. Without it, the buffer is $BUFFER_DB_PATH, else
data/buffer.db.

`kkt-buffer COMMAND --help` explains a command.

exit status: 0 success; 1 error, receipt not found, or damage; 2 wrong usage; 3 verify found a difference, but no need
to restore; 130 Control-C. `check` has its own: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # A character that the terminal cannot show must not stop a command.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status: int = arguments.run(arguments) or 0
        sys.stdout.flush()
    except (ReceiptBufferError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # Without this, Python's flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # that is no error: the reader of the pipe (`head`) has closed it
            print(f"error: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was acknowledged is safe", file=sys.stderr)
        return 130
    return status


def _parser() -> Parser:
    parser = Parser(prog="kkt-buffer", description="The offline buffer of fiscal receipts.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {release()}")
    parser.add_argument("--db", metavar="PATH", help=argparse.SUPPRESS)  # a command's own is in its help
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for kind in (look, events, act, keep, monitor, run, move):
        kind.add(commands)
    return parser
