"""
Check the arguments of operations and convert them to the values that are stored.

A value of the wrong type raises `TypeError`, a wrong value `ValueError`; the error names the argument. Nothing here
touches the database.
"""

import json
import math
import re
import uuid
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal, NamedTuple, NoReturn, NotRequired, TypedDict

from kkt_buffer.config import CONFIG_RULES
from kkt_buffer.documents import digest_of
from kkt_buffer.models import FACT_PREFIX, Receipt, ReceiptStatus

MAX_INTEGER = 2**63 - 1  # the greatest value of an INTEGER column
MAX_NOTE_LENGTH = 2000  # characters of an error, a reason or a name: a longer name is refused, a longer note is cut
MAX_QUOTE_LENGTH = 60  # characters of a wrong value that an error repeats
MAX_DOCUMENT_LENGTH = 64 * 1024 * 1024  # characters; the largest real documents have some 24,000
NO_MESSAGE = "(no message)"  # stored for an empty error text

UUID_TEXT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# For type checkers; a test compares it with `ReceiptStatus`.
StatusName = Literal["pending", "syncing", "synced", "failed"]


class ReceiptData(TypedDict):
    """
    A receipt to insert: its till, its document and, if known, its id.

    `fiscal_doc` is JSON text or its UTF-8 bytes, kept byte for byte, or a mapping. `id` is a UUID or its text; it lets
    the buffer recognise a repeated insert.
    """

    pos_id: str
    fiscal_doc: str | bytes | Mapping[str, Any]
    id: NotRequired[str | uuid.UUID | None]


class NewReceipt(NamedTuple):
    """A checked receipt, ready to be stored."""

    id: str
    pos_id: str
    fiscal_doc: str
    digest: str
    exist_ok: bool = False
    hold: bool = False


class Page(NamedTuple):
    """Which receipts `list_receipts` returns."""

    status: ReceiptStatus
    pos_id: str | None
    after: Receipt | None
    limit: int


def new_receipt(data: Mapping[str, Any], *, exist_ok: bool = False, hold: bool = False) -> NewReceipt:
    """Check the mapping that `insert_receipt` takes."""
    if not isinstance(data, Mapping):
        raise TypeError(f"receipt_data: expected a mapping with pos_id and fiscal_doc, got {_kind(data)}")
    for field in ("pos_id", "fiscal_doc"):
        if data.get(field) is None:
            raise ValueError(f"Missing required field: {field}")
    unknown = [key for key in data if key not in ReceiptData.__annotations__]
    if unknown:
        raise ValueError(f"receipt_data: unknown field {unknown[0]!r}; expected pos_id, fiscal_doc and, if known, id")
    given, fiscal_doc = data.get("id"), document(data["fiscal_doc"])
    return NewReceipt(
        id=str(uuid.uuid4()) if given is None else receipt_id(given),
        pos_id=name("pos_id", data["pos_id"]),
        fiscal_doc=fiscal_doc,
        digest=digest_of(fiscal_doc),  # here, not behind the write lock: it lets other threads run meanwhile
        exist_ok=bool(exist_ok),
        hold=bool(hold),  # any value may be given, as for any flag of Python
    )


def new_receipts(many: Iterable[Mapping[str, Any]], *, exist_ok: bool = False, hold: bool = False) -> list[NewReceipt]:
    """Check the receipts that `insert_receipts` takes; a note on the error gives the position of the wrong one."""
    if isinstance(many, Mapping) or not isinstance(many, Iterable):
        raise TypeError(f"many: expected several receipts, got {_kind(many)}")
    receipts = []
    for position, data in enumerate(many):
        try:
            receipts.append(new_receipt(data, exist_ok=exist_ok, hold=hold))
        except (TypeError, ValueError) as error:
            error.add_note(f"in receipt {position} of the batch, counting from 0; nothing was stored")
            raise
    return receipts


def receipt_id(value: object) -> str:
    """The id of a new receipt: a UUID or its text, as 36 lower-case characters."""
    text = lookup_id(value)
    if not UUID_TEXT.fullmatch(text):
        raise ValueError(f"id: expected a UUID such as 123e4567-e89b-42d3-a456-426614174000, got {_short(value)}")
    return text


def lookup_id(value: object) -> str:
    """An id to look up: the ids of adopted receipts need not be UUIDs."""
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, str):
        raise TypeError(f"id: expected a UUID or its text, got {_kind(value)}")
    lowered = value.lower()
    return lowered if UUID_TEXT.fullmatch(lowered) else _storable("id", value)


def name(field: str, value: object) -> str:
    """A short text that identifies something, stored unchanged."""
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
    """A remark for people. Characters that cannot be stored are escaped and long text is cut, so it is not refused."""
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected a text, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{field}: expected a text that is not empty")
    value = value.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
    return value if len(value) <= MAX_NOTE_LENGTH else value[: MAX_NOTE_LENGTH - 1] + "…"


def error_text(value: object) -> str:
    """The text of an error. It may be empty, as `str(exc)` often is: a failure without a text must be recorded too."""
    return NO_MESSAGE if isinstance(value, str) and not value.strip() else note("error", value)


def status(value: object) -> ReceiptStatus:
    """The status with this name."""
    if not isinstance(value, str) or value not in set(ReceiptStatus):
        raise ValueError(f"Invalid status: {value!r}; expected {', '.join(ReceiptStatus)}")
    return ReceiptStatus(value)


def page(status_name: object, pos_id: object, after: object, limit: object) -> Page:
    """What `list_receipts` takes."""
    wanted = status(status_name)
    if after is not None and not isinstance(after, Receipt):
        raise TypeError(f"after: expected the last receipt of the page before, got {_kind(after)}")
    if after is not None and after.status is not wanted:
        raise ValueError(f"after: expected a {wanted} receipt, the last of the page before; got a {after.status} one")
    return Page(wanted, None if pos_id is None else name("pos_id", pos_id), after, whole_number("limit", limit, 1))


def own_event_type(value: object) -> str:
    """The name of an event type that callers may write: only triggers write facts about receipts."""
    text = name("event_type", value)
    if text.startswith(FACT_PREFIX):
        raise ValueError(f"event_type: {text!r} is a fact about a receipt, which the buffer itself records")
    return text


def setting(key: str, value: object) -> int:
    """An int within the bounds of a setting."""
    number = CONFIG_RULES[key].parse(value)
    if number is None:
        raise ValueError(f"{key}: expected {CONFIG_RULES[key].expected}, got {value!r}")
    return number


def setting_text(key: str, value: object) -> str:
    """The value of a setting as text: an int for a key that the buffer reads, any text for the caller's own keys."""
    return str(setting(key, value)) if key in CONFIG_RULES else name("value", value)


def whole_number(field: str, value: object, minimum: int) -> int:
    """An int from `minimum` to `MAX_INTEGER`; a bool is rejected."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: expected a whole number of {minimum} or more, got {_kind(value)}")
    if not minimum <= value <= MAX_INTEGER:
        raise ValueError(f"{field}: expected a whole number of {minimum} or more, got {_short(value)}")
    return value


def moment(value: object) -> int:
    """The value that the clock `now` of a repository returned, as whole Unix seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"now: expected a function that returns Unix seconds, got {_kind(value)} from it")
    if not math.isfinite(value) or abs(value) > MAX_INTEGER // 2:
        raise ValueError(f"now: expected a function that returns Unix seconds, got {value!r} from it")
    return int(value)


def document(value: object) -> str:
    """
    The fiscal document as the text to store.

    Text, or its UTF-8 bytes, must be a JSON object and is stored byte for byte. A mapping becomes compact JSON.
    """
    if isinstance(value, str | bytes | bytearray | memoryview):
        text = value if isinstance(value, str) else _text_of(value)
        if text.startswith("\ufeff"):
            raise ValueError(
                "fiscal_doc: expected JSON, but it begins with a byte order mark (BOM), which JSON does not have; "
                "remove it: a document is stored byte for byte"
            )
        _refuse_long_document(text)
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
        _refuse_long_document(text)
    else:
        raise TypeError(f"fiscal_doc: expected JSON text, its UTF-8 bytes or a mapping, got {_kind(value)}")
    return _storable("fiscal_doc", text)


def new_fields(value: object) -> dict[str, str]:
    """The fields to merge into a document: a mapping that is not empty, each value as compact JSON."""
    if not isinstance(value, Mapping):
        raise TypeError(f"fields: expected a mapping, got {_kind(value)}")
    if not value:
        # A print that failed has no fields. It must not release the receipt.
        raise ValueError("fields: expected the fields that the fiscal drive returned for this document, got none")
    encoded = {key: _storable("fields", _encoded(inner, "fields")) for key, inner in value.items()}
    _refuse_other_keys(value, field="fields")
    return {_storable("fields", key): inner for key, inner in encoded.items()}


def details(value: object) -> dict[str, Any] | None:
    """The metadata of an event: None, or a mapping that can be written as JSON."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"metadata: expected a mapping, got {_kind(value)}")
    text = _encoded(value, field="metadata")
    decoded: dict[str, Any] = json.loads(_storable("metadata", text))
    return decoded


def _refuse_long_document(text: str) -> None:
    if len(text) > MAX_DOCUMENT_LENGTH:
        raise ValueError(f"fiscal_doc: at most {MAX_DOCUMENT_LENGTH} characters, got {len(text)}")


def _text_of(raw: bytes | bytearray | memoryview) -> str:
    try:
        return bytes(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"fiscal_doc: expected JSON in UTF-8, but {error}; encode the document as UTF-8") from None


def _decoded(text: str) -> object:
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("fiscal_doc: expected JSON, but it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"fiscal_doc: expected JSON, but {error}") from error
    except ValueError as error:
        raise ValueError(f"fiscal_doc: {error}") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"expected JSON, in which {constant} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large to be read back")
    return value


# One for all receipts: with these options json.loads would create a decoder for each document.
_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _encoded(value: object, field: str = "fiscal_doc") -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_json_value)
    except RecursionError:
        raise ValueError(f"{field}: nested too deeply") from None
    except (TypeError, ValueError) as error:
        message = f"{field}: cannot be written as JSON: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


def _refuse_other_keys(value: object, field: str = "fiscal_doc") -> None:
    """Refuse keys that are not text: json.dumps would convert them to text, and two keys could become equal."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{field}: cannot be written as JSON: the key {_short(key)} is not a text")
            _refuse_other_keys(inner, field)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_keys(inner, field)


def _json_value(value: object) -> object:
    if isinstance(value, Decimal):
        # Only if the float is written with the same value.
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
            f"{field}: holds a lone surrogate (U+{ord(text[error.start]):04X}), which is not a character and cannot be "
            "stored"
        ) from None
    return text


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTE_LENGTH else text[: MAX_QUOTE_LENGTH - 1] + "…"
