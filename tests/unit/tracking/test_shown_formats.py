import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.tracking import formats
from tunesmith.tracking.events import Score


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formats.number, 1.23456, "1.2346"),
        (formats.number, 1234.56, "1,234.6"),
        (formats.number, 12345678.0, "1.235e+07"),
        (formats.number, math.inf, "inf"),
        (formats.number, None, "-"),
        (formats.count, 1234567, "1,234,567"),
        (formats.count, math.nan, "nan"),
        (formats.size, 512, "512 B"),
        (formats.size, 1536, "1.5 KiB"),
        (formats.size, 5 * 2**20, "5.0 MiB"),
        (formats.size, 5 * 2**28, "1.25 GiB"),
        (formats.duration, 0.123, "0.12 s"),
        (formats.duration, 12.34, "12.3 s"),
        (formats.duration, 59.99, "0:01:00"),
        (formats.duration, 3723.0, "1:02:03"),
        (formats.fraction, 0.825, "82.5 %"),
        (formats.fraction, 31.5, "31.5000"),
    ],
)
def test_how_a_number_is_shown(function, value, text):
    assert function(value) == text


def test_a_comparison_says_what_changed_and_whether_it_is_better():
    before = Score(50, 2.0, math.exp(2), "exact_match", 0.1, (0.04, 0.22))
    after = Score(50, 2.5, math.exp(2.5), "exact_match", 0.82, (0.69, 0.9))
    metric, loss, perplexity = formats.compare(before, after)
    assert metric == formats.Comparison(
        "exact match", "10.0 % [4.0, 22.0]", "82.0 % [69.0, 90.0]", "+72.0 points", True
    )
    assert loss == formats.Comparison("loss", "2.0000", "2.5000", "+0.5 (+25 %)", False)
    assert (perplexity.label, perplexity.change, perplexity.better) == ("perplexity", "+4.793 (+65 %)", False)


def test_a_comparison_with_one_side_missing_stays_without_change():
    after = Score(5, math.nan, math.nan, "f1", 0.5, None)
    assert formats.compare(None, after) == [
        formats.Comparison("f1", "-", "50.0 %", "", None),
        formats.Comparison("loss", "-", "nan", "", None),
        formats.Comparison("perplexity", "-", "nan", "", None),
    ]
    equal = formats.compare(Score(5, 1.0, math.e), Score(5, 1.0, math.e))
    assert [line.better for line in equal] == [None, None]


@given(st.text(st.characters(), max_size=40))
def test_visible_text_neither_steers_a_terminal_nor_fails_to_be_written(text):
    shown = formats.visible(text)
    shown.encode("utf-8")
    assert not [char for char in shown if char != "\n" and (ord(char) < 32 or 127 <= ord(char) < 160)]
    if text.isprintable():
        assert shown == text


def test_visible_shows_an_escape_as_its_code():
    assert formats.visible("a\x1b[2Jb\r\n\tc\ud800") == "a\\x1b[2Jb\n c?"


def test_same_answer_ignores_whitespace_and_nothing_else():
    assert formats.same_answer("a  b", "\na b ")
    assert not formats.same_answer("a b", "ab")
    assert not formats.same_answer("a", "A")
    assert not formats.same_answer("a", None)


def test_shorten_says_how_much_is_left_out():
    assert formats.shorten("abcdef", 6) == "abcdef"
    assert formats.shorten("abcdefg", 3) == "abc ... (+4 characters)"
