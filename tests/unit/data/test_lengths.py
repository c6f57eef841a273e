"""What a context length cuts, counted by hand, and what is done about it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_rows import row_of, token_rows
from tunesmith.data.lengths import census, fit_to_length
from tunesmith.errors import DataError

# lengths 5, 10, 3, 8; trained 2, 4, 1, 8
ROWS = token_rows([row_of(3, 2), row_of(6, 4, 100), row_of(2, 1, 200), row_of(0, 8, 300)])


def test_census_of_four_rows():
    count = census(ROWS, 7)
    assert (count.rows, count.tokens, count.trained_tokens) == (4, 26, 15)
    assert (count.p50, count.p95, count.longest, count.limit) == (8, 10, 10, 7)
    assert (count.rows_over, count.tokens_over) == (2, 3 + 1)
    assert count.trained_over == 3 + 1  # tokens 7, 8, 9 of the second row and 7 of the last
    assert count.trained_share_lost == 4 / 15


def test_census_without_a_limit_takes_the_longest_row():
    count = census(ROWS, None)
    assert (count.limit, count.rows_over, count.tokens_over, count.trained_share_lost) == (10, 0, 0, 0.0)


def test_census_of_no_rows():
    count = census(token_rows([]), 7)
    assert (count.rows, count.longest, count.limit, count.trained_share_lost) == (0, 0, 7, 0.0)


def test_nothing_is_done_where_all_rows_fit():
    assert fit_to_length(ROWS, 10, "error") is ROWS


def test_too_long_is_an_error_that_says_what_would_be_lost():
    with pytest.raises(DataError) as caught:
        fit_to_length(ROWS, 7, "error")
    assert str(caught.value) == (
        "rows.jsonl:2: 2 of 4 rows exceed context_length 7 (longest 10); cutting them would lose 4 tokens, "
        "26.67% of the trained ones; raise context_length, or set on_too_long to drop or truncate"
    )


def test_drop_leaves_long_rows_out():
    kept = fit_to_length(ROWS, 7, "drop")
    assert [kept.origin(i) for i in range(len(kept))] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert kept.lengths.tolist() == [5, 3]
    assert kept.row(1).ids.tolist() == [200, 201, 202]


def test_truncate_cuts_the_end_and_leaves_out_what_has_nothing_to_learn():
    kept = fit_to_length(ROWS, 6, "truncate")  # of the second row no trained token is left
    assert [kept.origin(i) for i in range(len(kept))] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    assert kept.lengths.tolist() == [5, 3, 6]
    assert kept.row(2).ids.tolist() == [300, 301, 302, 303, 304, 305]
    assert kept.trained_counts.tolist() == [2, 1, 6]


@pytest.mark.parametrize(("limit", "how"), [(2, "drop"), (2, "truncate")])
def test_no_row_left_is_an_error(limit, how):
    rows = token_rows([row_of(3, 2), row_of(6, 4)])
    with pytest.raises(DataError, match="no row is left at context_length 2; raise context_length"):
        fit_to_length(rows, limit, how)


some_rows = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=8)


@given(some_rows, st.integers(1, 12))
def test_truncation_keeps_exactly_what_lies_before_the_limit(shapes, limit):
    rows = token_rows([row_of(prompt, answer, 20 * i) for i, (prompt, answer) in enumerate(shapes)])
    expected = [row_of(p, a, 20 * i) for i, (p, a) in enumerate(shapes) if p < limit or p + a <= limit]
    if not expected:
        return
    kept = fit_to_length(rows, limit, "truncate")
    assert [kept.row(i).ids.tolist() for i in range(len(kept))] == [ids[:limit] for ids, _ in expected]
    assert [kept.row(i).trained.tolist() for i in range(len(kept))] == [t[:limit] for _, t in expected]
    lost = census(rows, limit)
    left = sum(min(a, max(0, limit - p)) for p, a in shapes)
    assert math.isclose(lost.trained_share_lost, 1 - left / sum(a for _, a in shapes), abs_tol=1e-12)
