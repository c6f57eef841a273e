"""Runs -> what is known of each arm, and the differences between arms."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from tunesmith.comparison.record import Arm, ArmSummary, Difference, Estimate, RunEntry, Serving
from tunesmith.comparison.statistics import Values, difference, estimate
from tunesmith.evaluation.heldout_file import HELD_OUT, HeldOutValues, read_heldout
from tunesmith.evaluation.intervals import wilson
from tunesmith.tracking.events import RunRecord

_SEED = 0  # of the resampling: the same runs give the same intervals


@dataclass(frozen=True)
class Trained:
    """A final run that is finished."""

    entry: RunEntry
    record: RunRecord
    folder: Path

    @property
    def values(self) -> HeldOutValues:
        return read_heldout(self.folder / HELD_OUT)


def loss_values(runs: Sequence[Trained]) -> Values:
    """Losses of the runs of one arm; a token weighs the same whatever row it stands in."""
    kept = [run.values for run in runs]
    return Values(np.array([v.losses for v in kept]), np.array(kept[0].tokens, dtype=np.float64))


def metric_values(runs: Sequence[Trained]) -> Values | None:
    """Metric values of the runs of one arm; None where nothing was answered."""
    kept = [run.values for run in runs]
    if kept[0].metric is None or not kept[0].values:
        return None
    return Values(np.array([v.values for v in kept]), np.ones(len(kept[0].values)))


def summarise(
    arm: Arm,
    runs: Sequence[Trained],
    entries: Sequence[RunEntry],
    rate: float | None,
    *,
    at_edge: bool,
    serving: Serving | None,
    price_per_hour: float | None,
) -> ArmSummary:
    """One arm.

    Args:
        runs: its finished final runs.
        entries: all its trainings, those of the sweep and failed ones among them.
    """
    metric = metric_values(runs) if runs else None
    records = [run.record for run in runs]
    # One run of one arm has scored the base too, which took time and memory that no arm needs.
    own = [record for record in records if record.before is None] or records
    wall = fmean(record.wall_seconds for record in own) if own else None
    final = [entry for entry in entries if entry.purpose == "final"]
    return ArmSummary(
        arm=arm.name,
        learning_rate=rate,
        at_edge_of_grid=at_edge,
        seeds=tuple(run.entry.seed for run in runs),
        failed_runs=sum(entry.status == "failed" for entry in final),
        eval_loss=_within(estimate(loss_values(runs), seed=_SEED), 0.0, math.inf) if runs else None,
        metric=_metric_estimate(metric) if metric is not None else None,
        wall_seconds=wall,
        training_seconds=_mean([run.entry.training_seconds for run in runs]),
        tokens_per_second=_mean([run.entry.tokens_per_second for run in runs]),
        peak_memory_bytes=max((record.peak_rss_bytes for record in own), default=None),
        trainable_parameters=records[0].trainable_parameters if records else None,
        total_parameters=records[0].total_parameters if records else None,
        checkpoint_bytes=records[0].checkpoint_bytes if records else None,
        training_cost=wall / 3600 * price_per_hour
        if wall is not None and price_per_hour is not None
        else None,
        sweep_seconds=sum(e.wall_seconds or 0.0 for e in entries if e.purpose == "sweep"),
        serving=serving,
    )


def differences(arms: Sequence[Arm], runs: Mapping[str, Sequence[Trained]]) -> tuple[Difference, ...]:
    """Each two arms, in metric and loss.

    With more than two arms each interval is widened so that all of a measure hold together in 95 % of cases
    (Bonferroni): among many pairs some would differ by chance.

    Two arms are compared over the seeds with which both have a finished run, so that neither is the mean of luckier
    draws.
    """
    pairs = [(a, b) for a, b in itertools.combinations(arms, 2) if runs.get(a.name) and runs.get(b.name)]
    confidence = 1 - 0.05 / max(1, len(list(itertools.combinations(arms, 2))))
    found = []
    for values_of, lower_is_better in ((metric_values, False), (loss_values, True)):
        for first, second in pairs:
            ours, theirs = _same_seeds(runs[first.name], runs[second.name])
            a, b = (values_of(ours), values_of(theirs)) if ours else (None, None)
            if a is None or b is None:
                continue
            value, interval = difference(a, b, seed=_SEED, confidence=confidence)
            if not lower_is_better:  # two shares of 1 lie no further apart
                interval = max(interval[0], -1.0), min(interval[1], 1.0)
            name = "eval_loss" if lower_is_better else str(runs[first.name][0].values.metric)
            found.append(
                Difference(
                    name,
                    first.name,
                    second.name,
                    value,
                    interval,
                    len(a.weights),
                    min(len(a.sums), len(b.sums)),
                    lower_is_better,
                    confidence,
                )
            )
    return tuple(found)


def _same_seeds(
    first: Sequence[Trained], second: Sequence[Trained]
) -> tuple[Sequence[Trained], Sequence[Trained]]:
    shared = {run.entry.seed for run in first} & {run.entry.seed for run in second}
    ours, theirs = ([run for run in runs if run.entry.seed in shared] for runs in (first, second))
    return ours, theirs


def _metric_estimate(values: Values) -> Estimate:
    """The mean of a metric. Where all rows have one value, resamples say nothing; Wilson's interval does."""
    found = _within(estimate(values, seed=_SEED), 0.0, 1.0)
    if np.ptp(values.sums):
        return found
    rows = len(values.weights)
    return Estimate(found.value, wilson(min(found.value * rows, rows), rows), rows)


def _within(found: Estimate, least: float, most: float) -> Estimate:
    """Without the part of its interval in which no mean can lie: of few seeds Student's t reaches far."""
    if found.interval is None:
        return found
    low, high = found.interval
    return Estimate(found.value, (max(low, least), min(high, most)), found.n)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
