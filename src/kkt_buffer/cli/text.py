"""
What commands print: tables, times, a bar, colours, and documents with personal data masked.

Colour and the bar are for a terminal; what goes into a file or a pipe is plain text.
"""

import json
import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

# The keys of personal data in fiscal documents, in lower case: those of the buyer (phone, e-mail, name, INN, address,
# identity card) and of the cashier (name, INN). In the JSON form of ФФД the cashier is the `operator`. `raw_data` is
# the whole document once more, in binary form. Whatever stands under such a key is masked, at any depth.
PERSONAL_KEYS = (
    "buyer*",
    "client*",
    "customer*",
    "cashier*",
    "operator",
    "operatorinn",
    "operatorname",
    "raw_data",
    "rawdata",
)
MASK = "***"

MINIMUM = 20  # columns of a text in a narrow terminal
FOLD_AFTER = 3  # elements of a list in a folded document
BAR_WIDTH = 30

_STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "alarm": "1;37;41"}


def is_terminal() -> bool:
    """Whether the output is a terminal that a person looks at."""
    return sys.stdout.isatty()


def styled(text: str, style: str) -> str:
    """The text in a colour, if the output is a terminal and NO_COLOR (https://no-color.org) is not set."""
    if not is_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def counted(number: int, noun: str, plural: str = "") -> str:
    """The number and its noun: "1 receipt", "2 receipts"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def height() -> int:
    """The lines of the terminal."""
    return shutil.get_terminal_size((80, 24)).lines


def printable(text: object) -> str:
    """The text without control characters: what a document or an error contains must not command the terminal."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in {"Cc", "Cf", "Cs"}
        else character
        for character in str(text)
    )


def printable_lines(lines: Iterable[object]) -> str:
    """Several texts, each on a line of its own, without other control characters."""
    return "\n".join(map(printable, lines))


def cut(text: str, length: int) -> str:
    """The text, cut to so many characters."""
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…"


def first_line(remark: str, indent: int) -> str:
    """The first line of a remark, indented, cut to the width of the terminal; all of the line in a file or a pipe."""
    line = " " * indent + printable(remark.strip().split("\n", 1)[0])
    return cut(line, shutil.get_terminal_size((80, 24)).columns) if is_terminal() else line


def wrapped(line: str, indent: int, first: int | None = None) -> list[str]:
    """
    The line, broken to the width of the terminal and indented; in one piece in a file or a pipe.

    `first` is the indent of the first line, if that is another one.
    """
    start, rest = " " * (indent if first is None else first), " " * indent
    if not is_terminal() or "\x1b" in line:
        return [start + line]
    columns = max(shutil.get_terminal_size((80, 24)).columns, indent + MINIMUM)
    return textwrap.wrap(line, columns, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False) or [start]


def rows(table: Mapping[str, str]) -> list[str]:
    """The lines of a table with a name in front of each value; a value may have several lines."""
    name_width = max(map(len, table))
    lines = []
    for name, value in table.items():
        parts = [part for line in value.split("\n") for part in wrapped(line, name_width + 3)]
        lines += [
            f"{'' if number else name:<{name_width}} | {part[name_width + 3 :]}" for number, part in enumerate(parts)
        ]
    return lines


def columns(header: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table with a header; numbers are aligned to the right."""
    body = [[printable(cell) for cell in line] for line in lines]
    widths = [max(len(cell) for cell in column) for column in zip(header, *body, strict=True)]
    right = [all(cell.replace(",", "").isdecimal() for cell in column) for column in zip(*body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(size) if is_number else cell.ljust(size)
            for cell, size, is_number in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(header), *map(line, body)] if body else []


def bar(percent: float) -> str:
    """How full the buffer is, as a bar."""
    filled, empty = ("█", "░") if (sys.stdout.encoding or "").lower().startswith("utf") else ("#", ".")
    count = min(BAR_WIDTH, round(percent * BAR_WIDTH / 100))
    return filled * count + empty * (BAR_WIDTH - count)


def local_time(seconds: int) -> str:
    """A time as the wall clock of the shop shows it."""
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} (no valid time)"


def distance(seconds: int) -> str:
    """How far a time is from now: "3 h ago", "in 29 d"."""
    difference = seconds - time.time()
    amount = abs(difference)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if amount >= 2 * size:
            text = f"{int(amount // size)} {unit}"
            break
    else:
        text = f"{int(amount)} s"
    return f"in {text}" if difference > 0 else f"{text} ago"


class Number(str):
    """A number as it stands in the text of a document: 10.10 is not 10.1."""

    __slots__ = ()


def decoded(document: str) -> Any:  # noqa: ANN401 (a JSON document has no narrower type)
    """The document, its numbers as `Number`."""
    return json.loads(document, parse_float=Number, parse_int=Number)


def masked(value: object) -> Any:  # noqa: ANN401 (as above)
    """A decoded document with every personal value replaced by `MASK`."""
    if isinstance(value, dict):
        return {key: MASK if _is_personal(key) and inner is not None else masked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked(inner) for inner in value]
    return value


def _is_personal(key: str) -> bool:
    return any(fnmatchcase(key.lower(), pattern) for pattern in PERSONAL_KEYS)


def folded(value: object) -> Any:  # noqa: ANN401 (as above)
    """A decoded document whose long lists are cut, for reading."""
    if isinstance(value, dict):
        return {key: folded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        shown = [folded(inner) for inner in value[:FOLD_AFTER]]
        return shown if len(value) <= FOLD_AFTER else [*shown, f"… {len(value) - FOLD_AFTER} more; --full shows them"]
    return value


def json_lines(document: object) -> list[str]:
    """A decoded document as indented JSON."""
    return [printable(line) for line in _json(document, "\n").split("\n")]


def _json(value: object, start: str) -> str:
    """The value as JSON; `start` begins a line with the present indent. (`json.dumps` would quote a `Number`.)"""
    if isinstance(value, Number):
        return value
    if not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    inner = start + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_json(part, inner)}" for key, part in value.items()]
        return f"{{{inner}{f',{inner}'.join(parts)}{start}}}"
    return f"[{inner}{f',{inner}'.join(_json(part, inner) for part in value)}{start}]"
