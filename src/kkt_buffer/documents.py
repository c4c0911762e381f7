"""
Fiscal documents as text: their digest, and fields merged in with every other byte kept.

Decoding a document and encoding it again would change numbers, white space and repeated keys.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_decoder = json.JSONDecoder()


def digest_of(document: str | bytes) -> str:
    """The SHA-256 of a fiscal document's UTF-8 bytes, as 64 hex digits."""
    return hashlib.sha256(document if isinstance(document, bytes) else document.encode()).hexdigest()


def is_intact(document: object, digest: object) -> bool:
    """Whether a stored document has this digest; also True without a digest. Damage can change the types of both."""
    return digest is None or (isinstance(document, str) and digest == digest_of(document))


class _Member(NamedTuple):
    """A member of the object: its decoded key, and where the text of its value begins and ends."""

    key: str
    begin: int
    end: int


def merged(document: str, fields: Mapping[str, str]) -> str:
    """
    The document with these fields, whose values are JSON text.

    A value that differs is replaced where it stands, at each repetition of its key, as parsers do not agree on which
    one counts. New fields are written before the closing brace. `document` must be a JSON object.

    >>> merged('{"sum": 10.10, "sign": null}', {"sign": "7", "number": "1"})
    '{"sum": 10.10, "sign": 7,"number":1}'
    """
    members = list(_members(document))
    pieces: list[str] = []
    copied = 0
    for key, begin, end in members:
        if key in fields and not _equal(document[begin:end], fields[key]):
            pieces += document[copied:begin], fields[key]
            copied = end
    present = {member.key for member in members}
    new = [f"{json.dumps(key, ensure_ascii=False)}:{value}" for key, value in fields.items() if key not in present]
    brace = document.rindex("}")
    pieces += document[copied:brace], "," if members and new else "", ",".join(new), document[brace:]
    return "".join(pieces)


def _members(document: str) -> Iterator[_Member]:
    at = _behind_blank(document, document.index("{") + 1)
    while document[at] != "}":
        key, colon = _decoder.raw_decode(document, at)
        begin = _behind_blank(document, document.index(":", colon) + 1)
        _, end = _decoder.raw_decode(document, begin)
        yield _Member(key, begin, end)
        at = _behind_blank(document, end)
        if document[at] == ",":
            at = _behind_blank(document, at + 1)


def _behind_blank(document: str, at: int) -> int:
    while document[at] in " \t\n\r":
        at += 1
    return at


def _equal(one: str, other: str) -> bool:
    """Whether two JSON texts have the same value. In Python, `true` would equal `1`."""
    return _canonical(one) == _canonical(other)


def _canonical(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)
