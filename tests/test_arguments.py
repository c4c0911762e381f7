"""What callers hand in."""

import json
import uuid
from decimal import Decimal
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kkt_buffer import arguments
from kkt_buffer.arguments import MAX_DOCUMENT_LENGTH, MAX_INTEGER, MAX_NOTE_LENGTH

UUID_TEXT = "123e4567-e89b-42d3-a456-426614174000"


class TestNewReceipt:
    def test_id_is_made(self):
        """Without an id, the receipt gets a UUIDv4 as 36 lower-case characters."""
        receipt = arguments.new_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
        assert str(uuid.UUID(receipt.id, version=4)) == receipt.id

    @pytest.mark.parametrize("given_id", [UUID_TEXT, UUID_TEXT.upper(), uuid.UUID(UUID_TEXT)])
    def test_id_is_kept(self, given_id):
        """An id that the caller gives, as a UUID or its text, is stored in lower case."""
        receipt = arguments.new_receipt({"id": given_id, "pos_id": "till-1", "fiscal_doc": "{}"})
        assert UUID_TEXT == receipt.id

    @pytest.mark.parametrize("field", ["pos_id", "fiscal_doc"])
    @pytest.mark.parametrize("missing", [True, False])
    def test_missing(self, field, missing):
        """A required field that is not there, or None, is named."""
        data = {"pos_id": "till-1", "fiscal_doc": "{}", field: None}
        if missing:
            del data[field]
        with pytest.raises(ValueError, match=f"^Missing required field: {field}$"):
            arguments.new_receipt(data)

    def test_unknown_field(self):
        """A field that we do not know is a mistake of the caller, not something to be dropped."""
        with pytest.raises(ValueError, match="unknown field 'posid'"):
            arguments.new_receipt({"pos_id": "till-1", "fiscal_doc": "{}", "posid": "till-1"})

    def test_no_mapping(self):
        with pytest.raises(TypeError, match="receipt_data: expected a mapping .* got a list"):
            arguments.new_receipt([("pos_id", "till-1")])

    @pytest.mark.parametrize(
        ("given_id", "error", "message"),
        [
            ("receipt-1", ValueError, "id: expected a UUID such as .* got 'receipt-1'"),
            ("123e4567e89b42d3a456426614174000", ValueError, "id: expected a UUID"),
            (f"{{{UUID_TEXT}}}", ValueError, "id: expected a UUID"),
            ("", ValueError, "id: expected a UUID"),
            ("x" * 1000, ValueError, "id: expected a UUID .*x…$"),
            (UUID_TEXT + "\n", ValueError, "id: expected a UUID"),
            ("\ud800", ValueError, "id: holds a lone surrogate"),
            (17, TypeError, "id: expected a UUID or its text, got a int"),
            (UUID_TEXT.encode(), TypeError, "id: expected a UUID or its text, got a bytes"),
        ],
    )
    def test_bad_id(self, given_id, error, message):
        with pytest.raises(error, match=message):
            arguments.new_receipt({"id": given_id, "pos_id": "till-1", "fiscal_doc": "{}"})

    @pytest.mark.parametrize(
        ("pos_id", "error", "message"),
        [
            ("", ValueError, "pos_id: expected a text that is not empty"),
            (" \t", ValueError, "pos_id: expected a text that is not empty"),
            (1, TypeError, "pos_id: expected a text, got a int"),
            (b"till-1", TypeError, "pos_id: expected a text, got a bytes"),
            ("till\0", ValueError, "pos_id: a NUL character"),
            ("till\udfff", ValueError, r"pos_id: holds a lone surrogate \(U\+DFFF\)"),
            ("t" * (MAX_NOTE_LENGTH + 1), ValueError, "pos_id: at most 2000 characters, got 2001"),
        ],
    )
    def test_bad_pos_id(self, pos_id, error, message):
        with pytest.raises(error, match=message):
            arguments.new_receipt({"pos_id": pos_id, "fiscal_doc": "{}"})


class TestDocument:
    @pytest.mark.parametrize(
        "text",
        [
            "{}",
            ' {"a" : 1.50,\r\n "a": 2}\n',
            '{"user":"ООО \\"Ромашка\\" "}',
            '{"fiscalSign":18446744073709551615}',
            '{"smile":"\\ud83d\\ude00😀","code":"01\\u001d93"}',
        ],
    )
    def test_text_verbatim(self, text):
        """A text is kept byte for byte: white space, repeated keys, escapes, numbers as they are written."""
        assert text == arguments.document(text)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_bytes_verbatim(self, kind):
        """So are the UTF-8 bytes of a text, as they come from the network."""
        text = ' {"user" : "Ромашка", "sum": 10.10,\r\n "q": 0.12345678901234567890}\n'
        assert text == arguments.document(kind(text.encode()))

    def test_mapping_compact(self):
        """A mapping becomes compact JSON, Cyrillic as Cyrillic, integers whole."""
        document = MappingProxyType({"user": "Ромашка", "sign": 2**64 - 1, "items": ({"quantity": 2.926},), "n": None})
        expected = '{"user":"Ромашка","sign":18446744073709551615,"items":[{"quantity":2.926}],"n":null}'
        assert expected == arguments.document(document)

    @pytest.mark.parametrize(
        ("number", "expected"), [("2.926", "2.926"), ("5", "5.0"), ("-0.10", "-0.1"), ("1E+3", "1000.0")]
    )
    def test_decimal(self, number, expected):
        """A Decimal is written as the float that equals it."""
        assert f'{{"q":{expected}}}' == arguments.document({"q": Decimal(number)})

    @pytest.mark.parametrize("number", ["12345678901234567890.12", "9223372036854775807", "1E+400", "NaN", "Infinity"])
    def test_decimal_that_would_change(self, number):
        with pytest.raises(ValueError, match=r"fiscal_doc: .*would change as a JSON number"):
            arguments.document({"q": Decimal(number)})

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ("", "fiscal_doc: expected JSON, but"),
            ("{", "fiscal_doc: expected JSON, but"),
            ("{'a': 1}", "fiscal_doc: expected JSON, but"),
            ('{"a":1}x', "fiscal_doc: expected JSON, but Extra data"),
            ("\ufeff{}", "fiscal_doc: expected JSON, but it begins with a byte order mark"),
            (b"\xef\xbb\xbf{}", "fiscal_doc: expected JSON, but it begins with a byte order mark"),
            (
                b'{"a":"\xcf"}',
                "fiscal_doc: expected JSON in UTF-8, but .* position 6: .*; encode the document as UTF-8",
            ),
            ('{"user":"Ромашка"}'.encode("cp1251"), "fiscal_doc: expected JSON in UTF-8, but"),
            ("{}".encode("utf-16"), "fiscal_doc: expected JSON in UTF-8, but"),
            (b"{", "fiscal_doc: expected JSON, but"),
            ("[]", "expected a JSON object, got JSON that is a list"),
            ("null", "expected a JSON object, got JSON that is nothing"),
            ('"{}"', "expected a JSON object, got JSON that is a str"),
            ('{"a":NaN}', "expected JSON, in which NaN is not allowed"),
            ('{"a":-Infinity}', "expected JSON, in which -Infinity is not allowed"),
            ('{"a":1e999}', "the number 1e999 is too large"),
            ('{"a":%s}' % ("9" * 5000), "fiscal_doc: "),
            ('{"a":"\\ud800"}', r"lone surrogate \(U\+D800\)"),
            ('{"a":"\ud800"}', r"lone surrogate \(U\+D800\)"),
            ('{"a":"\0"}', "fiscal_doc: expected JSON, but Invalid control character"),
            ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
            ({"a": float("nan")}, "fiscal_doc: cannot be written as JSON"),
            ({"a": float("inf")}, "fiscal_doc: cannot be written as JSON"),
            ({"a": "\udc00"}, r"lone surrogate \(U\+DC00\)"),
        ],
    )
    def test_bad_value(self, document, message):
        with pytest.raises(ValueError, match=message):
            arguments.document(document)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (5, "fiscal_doc: expected JSON text, its UTF-8 bytes or a mapping, got a int"),
            ([], "fiscal_doc: expected JSON text, its UTF-8 bytes or a mapping, got a list"),
            ({"a": {1, 2}}, "fiscal_doc: cannot be written as JSON: a set has no JSON form"),
            ({("a",): 1}, "fiscal_doc: cannot be written as JSON"),
            ({"a": [{"b": {1: 2, "1": 3}}]}, "fiscal_doc: cannot be written as JSON: the key 1 is not a text"),
        ],
    )
    def test_bad_type(self, document, message):
        with pytest.raises(TypeError, match=message):
            arguments.document(document)

    def test_too_deep_mapping(self):
        document = {}
        for _ in range(100_000):
            document = {"a": document}
        with pytest.raises(ValueError, match="fiscal_doc: nested too deeply"):
            arguments.document(document)

    def test_circular_mapping(self):
        document = {}
        document["self"] = document
        with pytest.raises(ValueError, match="fiscal_doc: cannot be written as JSON: Circular"):
            arguments.document(document)

    @pytest.mark.parametrize("document", [" " * (MAX_DOCUMENT_LENGTH + 1), {"a": "x" * MAX_DOCUMENT_LENGTH}])
    def test_too_long(self, document):
        with pytest.raises(ValueError, match="fiscal_doc: at most 67108864 characters"):
            arguments.document(document)

    @given(
        st.dictionaries(
            st.text(),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                max_leaves=10,
            ),
            max_size=5,
        )
    )
    def test_round_trip(self, document):
        """Whatever JSON can say is stored so that it reads back equal; a text made of it is kept."""
        text = arguments.document(document)
        assert document == json.loads(text)
        assert text == arguments.document(text)


class TestNote:
    def test_cut(self):
        """A remark that is too long is cut, and shows it."""
        cut = arguments.note("error", "x" * 5000)
        assert len(cut) == MAX_NOTE_LENGTH
        assert cut.endswith("x…")

    def test_escaped(self):
        """What cannot be stored is escaped: a strange file name in an error must not lose the error."""
        assert r"caf\udce9 \x00" == arguments.note("error", "caf\udce9 \0")

    @pytest.mark.parametrize(
        ("value", "error"), [("", ValueError), ("  \n", ValueError), (None, TypeError), (1, TypeError)]
    )
    def test_bad(self, value, error):
        with pytest.raises(error, match="reason: expected a text"):
            arguments.note("reason", value)


class TestErrorText:
    @pytest.mark.parametrize("value", ["", " \n"])
    def test_blank(self, value):
        assert arguments.error_text(value) == "(no message)"

    def test_other(self):
        """Any other text is a note like others, and what is no text is refused."""
        assert arguments.error_text("timeout") == "timeout"
        with pytest.raises(TypeError, match="error: expected a text"):
            arguments.error_text(None)


class TestNewFields:
    def test_compact(self):
        fields = {"n": 5, "date": "1 марта", "more": {"q": Decimal("2.926")}}
        assert arguments.new_fields(fields) == {"n": "5", "date": '"1 марта"', "more": '{"q":2.926}'}

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (None, TypeError, "fields: expected a mapping, got nothing"),
            ([("n", 5)], TypeError, "fields: expected a mapping, got a list"),
            ({}, ValueError, "fields: expected the fields that the fiscal drive returned for this document, got none"),
            ({5: 5}, TypeError, "fields: cannot be written as JSON: the key 5 is not a text"),
            ({"a": {5: 5}}, TypeError, "fields: cannot be written as JSON: the key 5 is not a text"),
            ({"a": float("nan")}, ValueError, "fields: cannot be written as JSON"),
            ({"a": Decimal("0.12345678901234567890")}, ValueError, "fields: .* would change as a JSON number"),
            ({"a": object()}, TypeError, "fields: cannot be written as JSON"),
            ({"a": "\ud800"}, ValueError, "fields: holds a lone surrogate"),
            ({"\ud800": 1}, ValueError, "fields: holds a lone surrogate"),
        ],
    )
    def test_bad(self, value, error, message):
        with pytest.raises(error, match=message):
            arguments.new_fields(value)


class TestWholeNumber:
    @pytest.mark.parametrize("value", [1, 50, MAX_INTEGER])
    def test_good(self, value):
        assert value == arguments.whole_number("limit", value, 1)

    @pytest.mark.parametrize(
        ("value", "error"),
        [(0, ValueError), (-1, ValueError), (2**63, ValueError), (True, TypeError), (1.0, TypeError), ("1", TypeError)],
    )
    def test_bad(self, value, error):
        with pytest.raises(error, match="limit: expected a whole number of 1 or more"):
            arguments.whole_number("limit", value, 1)


class TestLookupId:
    def test_adopted(self):
        """An id that is no UUID may be looked for: receipts of the predecessor have such."""
        assert "Receipt-1" == arguments.lookup_id("Receipt-1")

    def test_uuid_text(self):
        assert UUID_TEXT == arguments.lookup_id(UUID_TEXT.upper())


class TestDetails:
    def test_mapping(self):
        assert arguments.details(MappingProxyType({"n": 1, "why": "нет связи"})) == {"n": 1, "why": "нет связи"}

    def test_none(self):
        assert arguments.details(None) is None

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            ([], TypeError, "metadata: expected a mapping, got a list"),
            ({"a": float("nan")}, ValueError, "metadata: cannot be written as JSON"),
            ({"a": object()}, TypeError, "metadata: cannot be written as JSON: a object has no JSON form"),
            ({"a": "\ud800"}, ValueError, "metadata: holds a lone surrogate"),
        ],
    )
    def test_bad(self, value, error, message):
        with pytest.raises(error, match=message):
            arguments.details(value)
