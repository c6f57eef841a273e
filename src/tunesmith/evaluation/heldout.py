"""Scores of answers on held-out rows. Generating the answers is ``generate``'s work; no torch here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.errors import DataError
from tunesmith.evaluation.intervals import bootstrap_mean, wilson
from tunesmith.evaluation.metrics import metric_named


@dataclass(frozen=True)
class MetricScore:
    """The mean of a metric over held-out rows."""

    name: str
    value: float
    interval: tuple[float, float]  # 95 %
    per_row: tuple[float, ...]  # in the order of the rows, for paired comparisons


def check_expected(expected: Sequence[str], metric_name: str) -> None:
    """Check that the metric can score these rows at all. Meant to be called before training starts.

    Raises:
        ConfigError: there is no such metric.
        DataError: no rows, or an expected answer the metric cannot read; the message names the first.
    """
    metric = metric_named(metric_name)
    if not expected:
        raise DataError(
            "evaluation.metric", f"no held-out rows to score {metric_name} on", "give rows, or leave it out"
        )
    for number, text in enumerate(expected, start=1):
        try:
            metric.function(text, text)
        except DataError as error:
            raise DataError(f"held-out row {number}, {error.place}", error.fault, error.remedy) from None


def score_answers(
    expected: Sequence[str], answers: Sequence[str], metric_name: str, *, seed: int
) -> MetricScore:
    """Score ``answers[i]`` against ``expected[i]`` by the named metric.

    The interval is Wilson's where each row is right or wrong, a percentile bootstrap (with ``seed``)
    where rows have values in between. Where all have one value, as a single row has, resamples would
    say that it is certain; Wilson's interval does not.

    Raises:
        ConfigError, DataError: as ``check_expected``.
        ValueError: the lengths differ.
    """
    if len(expected) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(expected)} rows")
    check_expected(expected, metric_name)
    metric = metric_named(metric_name)
    per_row = tuple(metric.function(*pair) for pair in zip(expected, answers, strict=True))
    if metric.is_proportion or len(set(per_row)) == 1:
        interval = wilson(min(math.fsum(per_row), len(per_row)), len(per_row))
    else:
        interval = bootstrap_mean(per_row, seed=seed)
    return MetricScore(metric.name, math.fsum(per_row) / len(per_row), interval, per_row)


def perplexity(loss: float) -> float:
    """exp(``loss``), ``loss`` in nats per token; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
