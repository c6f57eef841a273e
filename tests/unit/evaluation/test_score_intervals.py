import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.evaluation.intervals import bootstrap_mean, paired_bootstrap_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
    ],
)
def test_wilson_against_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_the_score_equation(case):
    successes, n = case
    low, high = wilson(successes, n, confidence=0.9)
    z = 1.6448536269514722  # the 95 % point of the normal distribution, from tables
    assert 0.0 <= low <= successes / n <= high <= 1.0
    for bound in (low, high):
        # the bounds are the p for which the estimate lies z standard errors away
        distance = (successes / n - bound) ** 2
        assert distance == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-12)
    mirrored = wilson(n - successes, n, confidence=0.9)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_covers_as_often_as_it_says():
    n = 40
    intervals = [wilson(k, n) for k in range(n + 1)]
    shares = np.linspace(0.05, 0.95, 181)
    coverage = [
        sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k, (low, high) in enumerate(intervals)
            if low <= p <= high
        )
        for p in shares
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.005)
    assert min(coverage) > 0.91


@pytest.mark.parametrize(
    ("successes", "n", "confidence"), [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0), (1, 5, 0.0)]
)
def test_wilson_refuses_what_is_no_proportion(successes, n, confidence):
    with pytest.raises(ValueError, match=r"trials|confidence"):
        wilson(successes, n, confidence)


def test_bootstrap_agrees_with_the_normal_theory_for_many_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=4000)
    low, high = bootstrap_mean(values.tolist(), seed=1)
    half = 1.959964 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_of_two_values_has_the_exact_quantiles():
    # Resampling (0, 1) gives means 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_mean([0.0, 1.0], confidence=0.95, seed=3) == (0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], confidence=0.4, seed=3) == (0.5, 0.5)


def test_bootstrap_covers_as_often_as_it_says():
    generator = np.random.default_rng(5)
    trials, hits = 400, 0
    for trial in range(trials):
        low, high = bootstrap_mean(generator.beta(2, 5, size=60).tolist(), resamples=400, seed=trial)
        hits += low <= 2 / 7 <= high
    # 95 % less the percentile bootstrap's small loss; three standard errors of 400 trials are 0.033
    assert 0.905 <= hits / trials <= 0.985


def test_bootstrap_is_fixed_by_its_seed():
    values = [0.1, 0.9, 0.4, 0.4, 0.0]
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7)
    assert bootstrap_mean(values, seed=7, resamples=50) != bootstrap_mean(values, seed=8, resamples=50)


def test_bootstrap_widens_with_confidence():
    values = [i / 30 for i in range(31)]
    low_90, high_90 = bootstrap_mean(values, confidence=0.9, seed=0)
    low_99, high_99 = bootstrap_mean(values, confidence=0.99, seed=0)
    assert low_99 < low_90 < 0.5 < high_90 < high_99


def test_bootstrap_draws_in_chunks_without_losing_any():
    # More values than are drawn at a time, so that each resample is a chunk of its own.
    values = np.zeros(300_000)
    values[::2] = 1.0
    low, high = bootstrap_mean(values.tolist(), resamples=20, seed=0)
    error = 0.5 / math.sqrt(300_000)
    assert 0.5 - 4 * error < low < 0.5 < high < 0.5 + 4 * error


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, math.inf], [[0.0], [1.0]]])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="bootstrap"):
        bootstrap_mean(values, seed=0)


def test_bootstrap_refuses_no_resamples():
    with pytest.raises(ValueError, match="0 resamples"):
        bootstrap_mean([1.0], resamples=0, seed=0)


def test_pairing_takes_the_rows_own_spread_out():
    a = np.random.default_rng(2).uniform(0.2, 0.8, size=80)
    # The same constant gain on each row: no doubt at all, although the rows themselves differ widely.
    assert paired_bootstrap_difference(a, a - 0.1, seed=0) == pytest.approx((0.1, 0.1), abs=1e-12)
    low, high = paired_bootstrap_difference(a, np.roll(a, 1) - 0.1, seed=0)
    assert high - low > 0.05


def test_pairs_must_be_complete():
    with pytest.raises(ValueError, match="2 and 1"):
        paired_bootstrap_difference([1.0, 0.0], [1.0], seed=0)
