"""Confidence intervals for held-out scores."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

# Indices drawn at a time: bounds memory at a few MB for any number of rows. Part of what a seed means.
_DRAWN_AT_ONCE = 1 << 18


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for a proportion of ``successes`` in ``n`` trials.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and at ``n`` successes. Of values
    between 0 and 1 ``successes`` may be the sum: none spread more about their mean than those that are 0 or 1, so the
    interval is no narrower than it should be.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.

    Raises:
        ValueError: ``n`` is below 1, ``successes`` outside [0, n] or ``confidence`` outside (0, 1).
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At both ends the bound is 0 or 1 in exact arithmetic; rounding must not move it past that.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_mean(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, *, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of ``values``; the same seed gives the same interval.

    Where all values are equal (a single one, say) the interval has no width: the bootstrap knows no
    more than the values it is given.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.

    Raises:
        ValueError: no values, a value that is not finite, ``resamples`` below 1, ``confidence`` outside
            (0, 1).
    """
    _check_confidence(confidence)
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError("a bootstrap needs a flat sequence of at least one value, all of them finite")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _DRAWN_AT_ONCE // sample.size)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        drawn = generator.integers(0, sample.size, size=(stop - start, sample.size))
        means[start:stop] = sample[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_bootstrap_difference(
    a: Sequence[float],
    b: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    *,
    seed: int,
) -> tuple[float, float]:
    """Percentile bootstrap interval for mean(``a``) - mean(``b``), ``a[i]`` and ``b[i]`` being of one row.

    Pairs are resampled, never the two sides apart: two models scored on the same rows share the
    difficulty of the rows, which then cancels.

    Source: Koehn, "Statistical significance tests for machine translation evaluation", EMNLP 2004.

    Raises:
        ValueError: the lengths differ, or as ``bootstrap_mean``.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap_mean(differences.tolist(), confidence, resamples, seed=seed)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is not between 0 and 1")
