"""The glance that spares nearly all rows a walk through their values misses nothing that the walk would find."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.problems import BrokenRule
from tunesmith.data.strict_json import MAX_NESTING, _check_value, _is_surely_clean, parse_json

odd = st.sampled_from(
    ["\0", "\ud800", "\udfff", "\ud83d\ude00", "🙂", "é", "\\", "\\u0000", "\\ud800", "{", "["]
)
strings = st.lists(odd | st.text(max_size=2), max_size=4).map("".join)
values = st.recursive(
    strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=5,
)


@given(values, st.booleans())
def test_what_is_clean_at_a_glance_is_clean(value, ensure_ascii):
    text = json.dumps(value, ensure_ascii=ensure_ascii)
    try:
        _check_value(json.loads(text))
    except BrokenRule:
        assert not _is_surely_clean(text)
        with pytest.raises(BrokenRule):
            parse_json(text)
    else:
        assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("text", ['{"a": "[1] é 🙂 \\u00e9 \\n"}', "[" * MAX_NESTING + "]" * MAX_NESTING])
def test_usual_rows_are_clean_at_a_glance(text):
    assert _is_surely_clean(text)
    parse_json(text)


@pytest.mark.parametrize("deep", ["[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101])
def test_one_level_too_deep(deep):
    with pytest.raises(BrokenRule, match="nested deeper than 100 levels"):
        parse_json(deep)


def test_many_brackets_inside_a_text_are_no_depth():
    assert parse_json(json.dumps({"a": "[" * 500})) == {"a": "[" * 500}
