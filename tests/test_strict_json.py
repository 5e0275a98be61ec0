"""What other readers of JSON take differently, or not at all, is refused with its name."""

import json

import pytest

from ftjax import strict_json

REFUSED = {
    '{"a": 1, "b": 2, "a": 1}': "two members are called 'a'",
    '[{"x": {"b": [], "b": []}}]': "two members are called 'b'",
    '{"a": NaN}': "NaN is not a JSON number",
    "[-Infinity]": "-Infinity is not a JSON number",
    '{"a": 1,}': "Illegal trailing comma|Expecting property name",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_strict_json_is_refused(text):
    with pytest.raises(ValueError, match=REFUSED[text]):
        strict_json.loads(text)


@pytest.mark.parametrize("value", [{}, {"a": {"a": [1, 2.5, None, True, "é"]}}, [{"a": 1}, {"a": 1}], "a", 3])
def test_what_json_can_hold_is_read_as_it_was_written(value):
    assert strict_json.loads(json.dumps(value)) == value
    assert strict_json.loads(json.dumps(value).encode()) == value
