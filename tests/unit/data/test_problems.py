"""Words for people: excerpts, nearest names, and the list of what is wrong with a file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.problems import Problem, ProblemList, closest, shorten
from tunesmith.errors import ConfigError, DataError, printable, shown_value


def test_shorten_cuts_around_the_place_and_escapes():
    assert shorten("a\nb\x1b[31m\u202e\ud800") == r"a\nb\x1b[31m\u202e\ud800"
    assert shorten("x" * 61) == "x" * 60 + "…"
    assert shorten("0123456789" * 20, at=100) == "…" + "0123456789" * 6 + "…"


@given(st.text(st.characters(exclude_categories=())), st.integers(0, 1000))
def test_shortened_text_is_always_short_and_printable(text, at):
    assert shorten(text, at).isprintable()
    assert len(shorten(text, at)) <= 62
    assert printable(text).isprintable()


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_an_error_is_one_line_whatever_a_file_holds(key, value):
    """A next line, a line separator or a terminal's C1 escape in a file stays out of the message."""
    error = str(ConfigError("a.yaml line 1", f"{key!r} is {shown_value(value)}", "change it"))
    assert len(error.splitlines()) == 1
    assert error.isprintable()


def test_an_error_keeps_the_lines_of_its_list_and_escapes_what_a_file_wrote():
    assert str(ConfigError("", "a: \x85\nb: \u2028\x9b31m")) == "a: \\x85\nb: \\u2028\\x9b31m"


def test_closest_ignores_case_and_stays_fast_on_long_names():
    assert closest("Messages", ("messages", "text")) == "messages"
    assert closest("zebra", ("messages", "text")) is None
    assert closest("x" * 5_000_000, ("messages", "text")) is None


def test_problem_list_keeps_twenty_and_the_total():
    problems = ProblemList()
    problems.raise_if_any("a.jsonl")
    for line in range(1, 1026):
        problems.add(Problem("a.jsonl", line, "rule", "text"))
    with pytest.raises(DataError) as caught:
        problems.raise_if_any("a.jsonl")
    lines = str(caught.value).split("\n")
    assert lines[0] == "a.jsonl: 1,025 rows break a rule; mend them or pass --skip-bad-rows"
    assert lines[1:21] == [f"  a.jsonl:{line}: rule: text" for line in range(1, 21)]
    assert lines[21:] == ["  … and 1,005 more"]


def test_problem_list_of_one():
    problems = ProblemList()
    problems.add(Problem("a\n.jsonl", 3, "messages is empty", ""))
    with pytest.raises(DataError) as caught:
        problems.raise_if_any("a\n.jsonl")
    first = "a\\n.jsonl: 1 row breaks a rule; mend it or pass --skip-bad-rows"
    assert str(caught.value) == f"{first}\n  a\\n.jsonl:3: messages is empty"
