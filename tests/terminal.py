"""Commands run in a terminal of their own, as a person sees them."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from typing import NamedTuple


class Ended(NamedTuple):
    status: int
    out: str
    err: str = ""


def in_terminal(
    *argv: object, until: str | None = None, answer: str = "", columns: int = 80, lines: int = 24, **variables: str
) -> Ended:
    """
    Run a command in a terminal of its own, as a person sees it, escape sequences included.

    `answer` is typed at once. Once `until` was printed, the command is interrupted, as by Control-C.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    environment |= {"TERM": "xterm", "PYTHONUTF8": "1", **variables}
    command = [sys.executable, "-m", "kkt_buffer", *map(str, argv)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as program:
        os.close(theirs)
        os.write(ours, answer.encode())
        out = b""
        with contextlib.suppress(OSError):  # EIO: the program has ended
            while new := os.read(ours, 65536):
                out += new
                if until is not None and until in out.decode(errors="replace"):
                    program.send_signal(signal.SIGINT)
                    until = None
        os.close(ours)
        status = program.wait(60)
    return Ended(status, out.decode().replace("\r\n", "\n"))


def without_distances(text):
    """The text without how long ago or ahead a time is, which depends on the day of the test."""
    return re.sub(r"  \((in )?\d+ (d|h|min|s)( ago)?\)", "", text)
