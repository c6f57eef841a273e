"""Means and differences over held-out rows and seeds, with intervals. Nothing here knows what was trained.

Two things vary: which rows happen to be held out, and how one training of an arm happens to turn out. Rows are
resampled with replacement, the same rows for every run and both arms, so that what makes a row hard cancels (Koehn,
EMNLP 2004). Seeds are too few to resample: three runs have only ten different resamples, whose variance falls short by
a third. Each resample instead moves an arm's mean by a draw of Student's t with (seeds - 1) degrees of freedom times
the standard error over its seeds (for two arms the Behrens-Fisher solution). The interval is made of percentiles of the
resampled means, as in Efron, "Bootstrap methods", Annals of Statistics 7, 1979.

Of few rows the plain bootstrap makes too narrow intervals: its variance falls short by (n - 1) / n, and it knows
nothing of how ill n rows tell their own variance (Hesterberg, "What teachers should know about the bootstrap", The
American Statistician 69, 2015). What a resample deviates by is therefore divided by sqrt(chi-square / n), (n - 1)
degrees of freedom, which makes Student's t of the normal distribution; from a few hundred rows on it changes nothing.
And where m rows differ between two arms, chance alone puts all m on one side in 2^(1 - m) of all cases (sign test, two
sides): where that is more often than the confidence allows, an interval reaches to 0 whatever the resamples say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.comparison.record import Estimate

RESAMPLES = 4000
_DRAWN_AT_ONCE = 1 << 21  # indices; bounds memory. Part of what a seed means.


@dataclass(frozen=True)
class Values:
    """What one arm measured.

    Attributes:
        sums: float64, shape (runs, rows): of each row, over all that counts in it.
        weights: float64, shape (rows,): how much counts in each; trained tokens for a loss, 1 for a metric.
    """

    sums: NDArray[np.float64]
    weights: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.sums.ndim != 2 or not self.sums.size or self.sums.shape[1:] != self.weights.shape:
            raise ValueError(
                f"values {self.sums.shape} and weights {self.weights.shape} do not belong together"
            )
        if not (np.isfinite(self.sums).all() and (self.weights >= 0).all() and self.weights.sum() > 0):
            raise ValueError("a value is not finite, or nothing counts")

    @property
    def by_run(self) -> NDArray[np.float64]:
        """The mean of each run, shape (runs,)."""
        means: NDArray[np.float64] = self.sums.sum(axis=1) / self.weights.sum()
        return means

    @property
    def mean(self) -> float:
        return float(self.by_run.mean())


def estimate(values: Values, *, seed: int, confidence: float = 0.95) -> Estimate:
    """The mean with its interval, of a single row without one; ``n`` counts rows."""
    rows = len(values.weights)
    if np.count_nonzero(values.weights) < 2:
        return Estimate(values.mean, None, rows)
    draws = _widened(_row_means([values], seed)[0], values.mean, values.weights, seed)
    draws = draws + _seed_shifts(values, np.random.default_rng([seed, 1]))
    return Estimate(values.mean, _percentiles(draws, confidence), rows)


def difference(
    first: Values, second: Values, *, seed: int, confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Mean of ``first`` minus mean of ``second``, and its interval.

    Raises:
        ValueError: they are not of the same rows.
    """
    if not np.array_equal(first.weights, second.weights):
        raise ValueError("the two arms were not scored on the same rows")
    rows = _row_means([first, second], seed)
    value = first.mean - second.mean
    draws = _widened(rows[0] - rows[1], value, first.weights, seed)
    for stream, values in enumerate((first, second), start=1):
        shift = _seed_shifts(values, np.random.default_rng([seed, stream]))
        draws = draws + shift if stream == 1 else draws - shift
    low, high = _percentiles(draws, confidence)
    apart = (first.sums.mean(axis=0) != second.sums.mean(axis=0)) & (first.weights > 0)
    if 2.0 ** (1 - np.count_nonzero(apart)) > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return value, (low, high)


def _widened(
    draws: NDArray[np.float64], mean: float, weights: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """Resampled means, moved away from ``mean`` as far as so few rows ask for."""
    rows = np.count_nonzero(weights)
    if rows < 2:
        return draws  # all alike: nothing can be made of them
    spread = np.random.default_rng([seed, 3]).chisquare(rows - 1, len(draws)) / rows
    wide: NDArray[np.float64] = mean + (draws - mean) / np.sqrt(spread)
    return wide


def _row_means(arms: Sequence[Values], seed: int) -> NDArray[np.float64]:
    """Means over resampled rows, shape (arms, resamples); the same rows for each arm."""
    generator = np.random.default_rng([seed, 0])
    weights = arms[0].weights
    by_row = np.stack([values.sums.mean(axis=0) for values in arms])
    means = np.empty((len(arms), RESAMPLES))
    at_once = max(1, _DRAWN_AT_ONCE // len(weights))
    for start in range(0, RESAMPLES, at_once):
        stop = min(start + at_once, RESAMPLES)
        drawn = generator.integers(0, len(weights), size=(stop - start, len(weights)))
        total = weights[drawn].sum(axis=1)
        total[total == 0] = np.nan  # none of the drawn rows counts; such a draw says nothing
        means[:, start:stop] = by_row[:, drawn].sum(axis=2) / total
    return means


def _seed_shifts(values: Values, generator: np.random.Generator) -> NDArray[np.float64]:
    """How far another set of seeds might move the mean, shape (resamples,); zeros where there is one run."""
    runs = len(values.sums)
    if runs < 2:
        return np.zeros(RESAMPLES)
    error = values.by_run.std(ddof=1) / np.sqrt(runs)
    shifts: NDArray[np.float64] = error * generator.standard_t(runs - 1, RESAMPLES)
    return shifts


def _percentiles(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)
