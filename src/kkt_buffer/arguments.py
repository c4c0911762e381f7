"""
What callers hand in: checked, named in the error when it is wrong, and turned into what is stored.

A value of the wrong type is a `TypeError`, a wrong value a `ValueError`; nothing here touches the database.
"""

import json
import math
import re
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

MAX_INTEGER = 2**63 - 1  # what an INTEGER column holds
MAX_NOTE_LENGTH = 2000  # characters of an error, a reason or a name; the rest is cut
MAX_QUOTE_LENGTH = 60  # characters of a wrong value that an error repeats
MAX_DOCUMENT_LENGTH = 64 * 1024 * 1024  # characters; the largest real documents have some 24,000

UUID_TEXT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NewReceipt(NamedTuple):
    """A receipt as the caller gave it, ready to be stored."""

    id: str
    pos_id: str
    fiscal_doc: str


def new_receipt(data: Mapping[str, Any]) -> NewReceipt:
    """Read the mapping that `insert_receipt` takes."""
    if not isinstance(data, Mapping):
        raise TypeError(f"receipt_data: expected a mapping with pos_id and fiscal_doc, got {_kind(data)}")
    for field in ("pos_id", "fiscal_doc"):
        if data.get(field) is None:
            raise ValueError(f"Missing required field: {field}")
    unknown = [key for key in data if key not in {"id", "pos_id", "fiscal_doc"}]
    if unknown:
        raise ValueError(f"receipt_data: unknown field {unknown[0]!r}; expected pos_id, fiscal_doc and, if known, id")
    given = data.get("id")
    return NewReceipt(
        id=str(uuid.uuid4()) if given is None else receipt_id(given),
        pos_id=name("pos_id", data["pos_id"]),
        fiscal_doc=document(data["fiscal_doc"]),
    )


def receipt_id(value: object) -> str:
    """The id of a new receipt: a UUID or its text, as 36 lower-case characters."""
    text = lookup_id(value)
    if not UUID_TEXT.fullmatch(text):
        raise ValueError(f"id: expected a UUID such as 123e4567-e89b-42d3-a456-426614174000, got {_short(value)}")
    return text


def lookup_id(value: object) -> str:
    """An id to look for: adopted receipts may have ids that are no UUID."""
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, str):
        raise TypeError(f"id: expected a UUID or its text, got {_kind(value)}")
    lowered = value.lower()
    return lowered if UUID_TEXT.fullmatch(lowered) else _storable("id", value)


def name(field: str, value: object) -> str:
    """A short text that identifies something, kept as it is."""
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected a text, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{field}: expected a text that is not empty")
    if "\0" in value:
        raise ValueError(f"{field}: a NUL character cannot be stored")
    if len(value) > MAX_NOTE_LENGTH:
        raise ValueError(f"{field}: at most {MAX_NOTE_LENGTH} characters, got {len(value)}")
    return _storable(field, value)


def note(field: str, value: object) -> str:
    """A remark for people: what cannot be stored is escaped and what is too long is cut, so that it is never lost."""
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected a text, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{field}: expected a text that is not empty")
    value = value.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
    return value if len(value) <= MAX_NOTE_LENGTH else value[: MAX_NOTE_LENGTH - 1] + "…"


def whole_number(field: str, value: object, minimum: int) -> int:
    """An int from `minimum` to what a column holds; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: expected a whole number of {minimum} or more, got {_kind(value)}")
    if not minimum <= value <= MAX_INTEGER:
        raise ValueError(f"{field}: expected a whole number of {minimum} or more, got {_short(value)}")
    return value


def document(value: object) -> str:
    """
    The fiscal document as the text to store.

    A text is kept byte for byte, once it is known to be a JSON object. A mapping becomes compact JSON.
    """
    if isinstance(value, str):
        text = value
        if len(text) > MAX_DOCUMENT_LENGTH:
            raise ValueError(f"fiscal_doc: at most {MAX_DOCUMENT_LENGTH} characters, got {len(text)}")
        decoded = _decoded(text)
        if not isinstance(decoded, dict):
            raise ValueError(  # noqa: TRY004 (the argument is a text, as it should be)
                f"fiscal_doc: expected a JSON object, got JSON that is {_kind(decoded)}"
            )
        if _ESCAPED_SURROGATE.search(text):
            _storable("fiscal_doc", _encoded(decoded))
    elif isinstance(value, Mapping):
        text = _encoded(value)
        _refuse_other_keys(value)
        if len(text) > MAX_DOCUMENT_LENGTH:
            raise ValueError(f"fiscal_doc: at most {MAX_DOCUMENT_LENGTH} characters, got {len(text)}")
    else:
        raise TypeError(f"fiscal_doc: expected JSON text or a mapping, got {_kind(value)}")
    return _storable("fiscal_doc", text)


def details(value: object) -> dict[str, Any] | None:
    """The metadata of an event: a mapping that JSON can hold."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"metadata: expected a mapping, got {_kind(value)}")
    text = _encoded(value, field="metadata")
    decoded: dict[str, Any] = json.loads(_storable("metadata", text))
    return decoded


def _decoded(text: str) -> object:
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("fiscal_doc: expected JSON of sane depth, this is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"fiscal_doc: expected JSON, but {error}") from error
    except ValueError as error:
        raise ValueError(f"fiscal_doc: {error}") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"expected JSON, which has no {constant}")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large to be read back")
    return value


# json.loads would make one for every receipt.
_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _encoded(value: object, field: str = "fiscal_doc") -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)
    except RecursionError:
        raise ValueError(f"{field}: nested too deeply") from None
    except (TypeError, ValueError) as error:
        message = f"{field}: cannot be written as JSON: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


def _refuse_other_keys(value: object) -> None:
    """A key that is no text would be written as one, and might meet another of the same name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"fiscal_doc: cannot be written as JSON: the key {_short(key)} is not a text")
            _refuse_other_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_keys(inner)


def _plain(value: object) -> object:
    if isinstance(value, Decimal):
        # As the float that is written the same; a number that a float would change is refused.
        number = float(value)
        if not math.isfinite(number) or Decimal(repr(number)) != value:
            raise ValueError(f"{value} would change as a JSON number; pass it as a text or a whole number")
        return number
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{_kind(value)} has no JSON form")


def _storable(field: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field}: holds a lone surrogate (U+{ord(text[error.start]):04X}), which is no character and cannot be "
            "stored"
        ) from None
    return text


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTE_LENGTH else text[: MAX_QUOTE_LENGTH - 1] + "…"
