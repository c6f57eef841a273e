"""Intervals against the formulae for cases in which those are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.comparison.statistics import Values, difference, estimate

T2 = 4.302652729911275  # Student's t, 2 degrees of freedom, 97.5 %
Z = 1.959963984540054


def values(sums, weights=None) -> Values:
    sums = np.asarray(sums, dtype=float)
    return Values(sums, np.ones(sums.shape[1]) if weights is None else np.asarray(weights, dtype=float))


def half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2


def test_one_run_has_the_interval_of_a_mean_over_rows():
    rows = np.random.default_rng(1).normal(5, 2, 400)
    found = estimate(values([rows]), seed=0)
    assert found.value == pytest.approx(rows.mean())
    assert found.n == 400
    assert half(found.interval) == pytest.approx(Z * rows.std() / 20, rel=0.05)


def test_rows_that_are_all_alike_leave_students_t_over_seeds():
    runs = np.array([1.0, 2.0, 4.0])
    found = estimate(values(np.repeat(runs[:, None], 50, axis=1)), seed=3)
    assert found.value == pytest.approx(7 / 3)
    assert half(found.interval) == pytest.approx(T2 * runs.std(ddof=1) / np.sqrt(3), rel=0.1)


def test_a_hard_row_cancels_in_a_difference():
    hard = np.random.default_rng(2).normal(0, 100, 300)
    noise = np.random.default_rng(3).normal(0, 1, 300)
    value, interval = difference(values([hard + 1 + noise]), values([hard]), seed=0)
    assert value == pytest.approx(1 + noise.mean())
    assert half(interval) == pytest.approx(Z * noise.std() / np.sqrt(300), rel=0.05)


def test_a_loss_weighs_tokens_not_rows():
    found = estimate(values([[10.0, 1.0]], [10, 1]), seed=0)
    assert found.value == 1.0
    assert found.interval == (1.0, 1.0)
    assert estimate(values([[30.0, 1.0]], [10, 1]), seed=0).value == pytest.approx(31 / 11)


def test_a_ratio_has_the_interval_of_the_linearised_one():
    generator = np.random.default_rng(4)
    tokens = generator.integers(1, 30, 500)
    sums = tokens * generator.gamma(2, 0.5, 500)
    ratio = sums.sum() / tokens.sum()
    error = np.sqrt(((sums - ratio * tokens) ** 2).sum()) / tokens.sum()  # Cochran 1977, chapter 6
    assert half(estimate(values([sums], tokens), seed=0).interval) == pytest.approx(Z * error, rel=0.06)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        rows, seeds = generator.normal(0, 1, 60), generator.normal(0, 0.3, 3)
        found = estimate(values(rows[None] + seeds[:, None]), seed=trial)
        hits += found.interval[0] <= 0 <= found.interval[1]
    assert 0.91 <= hits / 200 <= 1.0  # of 95 %; the spread of 200 trials is 1.5 points


@settings(deadline=None)  # a machine with other work takes longer now and then
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32))
def test_turning_the_arms_round_turns_the_sign_and_equal_arms_differ_by_nothing(runs, rows, seed):
    generator = np.random.default_rng(seed)
    a, b = values(generator.random((runs, rows))), values(generator.random((runs, rows)))
    assert difference(a, b, seed=1)[0] == pytest.approx(-difference(b, a, seed=1)[0])
    value, (low, high) = difference(a, a, seed=1)
    assert value == 0
    assert low <= 0 <= high
    assert difference(a, b, seed=1) == difference(a, b, seed=1)


def test_what_cannot_be_paired_is_a_fault():
    with pytest.raises(ValueError, match="not scored on the same rows"):
        difference(values([[1.0, 2.0]]), values([[1.0, 2.0]], [1, 2]), seed=0)
    with pytest.raises(ValueError, match="not finite"):
        values([[1.0, float("nan")]])


@pytest.mark.parametrize(("rows", "shown"), [(1, False), (3, False), (5, False), (6, True)])
def test_a_few_rows_that_all_point_one_way_show_nothing(rows, shown):
    # Chance alone puts 5 coins on one side in 1 of 16 throws, 6 in 1 of 32.
    low, high = difference(values(np.ones((1, rows))), values(np.zeros((1, rows))), seed=0)[1]
    assert (low > 0) == shown
    assert high == 1


@pytest.mark.parametrize(("changed", "shown"), [(5, False), (8, True)])
def test_a_few_changed_rows_among_many_show_nothing(changed, shown):
    first = np.zeros((1, 500))
    first[0, :changed] = 1
    low, _ = difference(values(first), values(np.zeros((1, 500))), seed=0)[1]
    assert (low > 0) == shown


def test_a_single_row_has_no_interval():
    assert estimate(values([[2.0]]), seed=0).interval is None
    assert estimate(values([[2.0, 0.0]], [1, 0]), seed=0).interval is None


def test_the_interval_of_few_rows_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(6)
    hits = 0
    for trial in range(300):
        low, high = difference(
            values(generator.normal(0, 1, (1, 7))), values(generator.normal(0, 1, (1, 7))), seed=trial
        )[1]
        hits += low <= 0 <= high
    assert hits / 300 >= 0.92  # of 95 %; the plain bootstrap has 0.88
