"""Fields merged into the text of a document."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kkt_buffer.documents import merged

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
objects = st.dictionaries(st.text(max_size=3), values, max_size=4)


class TestMerged:
    @pytest.mark.parametrize(
        ("document", "expected"),
        [
            ("{}", '{"n":7}'),
            (" { } \n", ' { "n":7} \n'),
            ('{"a":1}', '{"a":1,"n":7}'),
            ('{ "a" : 10.10 ,\r\n "b" : 0.12345678901234567890\t}\n', None),
            ('{"a":{"n":1},"b":[{"n":2},"}"]}', '{"a":{"n":1},"b":[{"n":2},"}"],"n":7}'),
            ('{"a":"\\"n\\": 1}"}', '{"a":"\\"n\\": 1}","n":7}'),
            ('{"a":1,"a":2}', '{"a":1,"a":2,"n":7}'),
        ],
    )
    def test_new(self, document, expected):
        """A new field is written before the closing brace; every other byte stays."""
        if expected is None:
            expected = document.replace("}", ',"n":7}')
        assert expected == merged(document, {"n": "7"})

    @pytest.mark.parametrize(
        ("document", "expected"),
        [
            ('{"n":null}', '{"n":7}'),
            ('{ "n" : [1, {"n": 2}] , "z":1.10}', '{ "n" : 7 , "z":1.10}'),
            ('{"\\u006e" :\n"x\\"}"\n}', '{"\\u006e" :\n7\n}'),
            ('{"n":1,"a":2,"n":7,"n":{}}', '{"n":7,"a":2,"n":7,"n":7}'),
            ('{"n":true,"n":7.0,"n":"7"}', '{"n":7,"n":7,"n":7}'),
        ],
    )
    def test_replaced(self, document, expected):
        """A value that differs is replaced where it stands, at each repetition of its key."""
        assert expected == merged(document, {"n": "7"})

    @pytest.mark.parametrize(
        ("document", "value"),
        [
            ('{"n": 7}', "7"),
            ('{"n":{ "b" : 1,"a":[true, "\\u0416"] }}', '{"a":[true,"Ж"],"b":1}'),
            ('{"n":18446744073709551615,"n":18446744073709551615}', "18446744073709551615"),
        ],
    )
    def test_equal(self, document, value):
        """A value that is there already stays as it is written."""
        assert document == merged(document, {"n": value})

    def test_several(self):
        """New fields keep their order, and stand behind those that are replaced."""
        fields = {"sign": "2", "number": "1", "Смена": "3"}
        assert '{"number":1,"a":0,"sign":2,"Смена":3}' == merged('{"number":null,"a":0}', fields)

    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # on a busy machine
    @given(objects, objects, st.sampled_from([None, 1]), st.booleans())
    def test_any(self, document, fields, indent, ascii_only):
        """Whatever they are, the result reads as Python's own merge, and a second merge changes nothing."""
        text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
        new = {key: json.dumps(value) for key, value in fields.items()}
        result = merged(text, new)
        assert json.dumps(document | fields) == json.dumps(json.loads(result))
        assert result == merged(result, new)
