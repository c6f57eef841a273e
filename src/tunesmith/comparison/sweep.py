"""Which learning rate an arm deserves: successive halving on the eval loss, under one budget.

All rates of a grid are trained for a few steps, the better half for more, until one is left (Jamieson and Talwalkar,
"Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016). Each training is a whole short
run whose schedule falls to its end, since a rate judged in the middle of a long schedule looks worse than it is. Where
the best rate of the first round stands at the edge of the grid, the grid grows on that side until it does not.

Pure: ``sweep`` is given a function that trains. It holds no state, so an interrupted sweep is gone through again, the
runs that are finished answering at once.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tunesmith.comparison.record import SweepPoint

DEFAULT_BUDGET = 3.0
_STEP = math.sqrt(10)  # from one rate of the grid to the next
_SPAN = 2  # rates on either side of the middle
_MOST_GROWTH = 3  # further rates on one side
_FEWEST_STEPS = 10

# (learning rate, optimizer steps) -> eval loss; None: it did not stay finite
Train = Callable[[int, float, int], float | None]


@dataclass(frozen=True)
class SweepResult:
    """The chosen rate; None where no run stayed finite. ``at_edge``: a better one may lie beyond the grid."""

    learning_rate: float | None
    at_edge: bool
    points: tuple[SweepPoint, ...]


def rate_grid(middle: float) -> tuple[float, ...]:
    """Five rates, half a power of ten apart, around ``middle``."""
    return tuple(_rounded(middle * _STEP**place) for place in range(-_SPAN, _SPAN + 1))


def middle_rate(method: str, given: float | None, given_for: str, defaults: Mapping[str, float]) -> float:
    """Where the grid of a method is centred.

    The configuration's own rate for its own method; for the other one ten times as much (LoRA) or a tenth (full), which
    is what the literature found (Schulman et al., "LoRA Without Regret", 2025); without one, the documented defaults.
    """
    if given is None:
        return defaults[method]
    if method == given_for:
        return given
    return _rounded(given * 10 if method == "lora" else given / 10)


def sweep(
    arm: str,
    rates: Sequence[float],
    full_steps: int,
    budget: float,
    train: Train,
    on_points: Callable[[Sequence[SweepPoint]], None] = lambda _: None,
    *,
    grows: bool = True,
    possible: Callable[[int], int] = lambda steps: steps,
) -> SweepResult:
    """Choose a rate.

    Rates that look best after a few steps may all diverge later. Then the best of those that were let go and lie below
    them is chosen: it is not the best there is, but it trains.

    Args:
        arm: its name, for the points.
        rates: the grid; a single one is taken as it is.
        full_steps: optimizer steps of a full run.
        budget: what the sweep may take, in full runs; each round gets an equal share of what is left.
        train: called as ``train(round, rate, steps)``.
        on_points: told all points so far, after each training.
        grows: whether the grid may be extended.
        possible: the number of steps, as near as can be, that a run can be cut to.
    """
    left = sorted(set(rates))
    if len(left) == 1:
        return SweepResult(left[0], False, ())
    points: list[SweepPoint] = []
    spent, round_number = 0, 0
    while len(left) > 1:
        rounds_left = math.ceil(math.log2(len(left)))
        share = (budget * full_steps - spent) / (rounds_left * len(left))
        steps = possible(max(min(_FEWEST_STEPS, full_steps), min(full_steps, int(share))))
        found: dict[float, float | None] = {}
        run = partial(_run, arm, round_number, steps, train, found, points, on_points)
        for rate in left:
            run(rate)
        if round_number == 0 and grows:
            _grow(found, run)
        spent += steps * len(found)
        ranked = sorted((loss, rate) for rate, loss in found.items() if loss is not None)
        # All steps were a full run's: another round would train the very same again.
        keep = 1 if steps >= full_steps else math.ceil(len(found) / 2)
        left = sorted(rate for _, rate in ranked[:keep])
        kept_in = round_number
        if not left and (spare := _let_go(points, min(found))) is not None:
            left, kept_in = [spare.learning_rate], spare.round
        points[:] = _mark(points, kept_in, left)
        on_points(points)
        round_number += 1
    tried = {point.learning_rate for point in points}
    return SweepResult(
        left[0] if left else None, bool(left) and left[0] in (min(tried), max(tried)), tuple(points)
    )


def _let_go(points: Sequence[SweepPoint], failed: float) -> SweepPoint | None:
    """Of the rates below ``failed`` that always stayed finite the best, in the last round that had any."""
    diverged = {p.learning_rate for p in points if p.eval_loss is None}
    finite = [
        (-p.round, p.eval_loss, p.learning_rate, p)
        for p in points
        if p.eval_loss is not None and p.learning_rate < failed and p.learning_rate not in diverged
    ]
    return min(finite)[3] if finite else None


def _run(
    arm: str,
    round_number: int,
    steps: int,
    train: Train,
    found: dict[float, float | None],
    points: list[SweepPoint],
    on_points: Callable[[Sequence[SweepPoint]], None],
    rate: float,
) -> None:
    found[rate] = train(round_number, rate, steps)
    points.append(SweepPoint(arm, round_number, rate, steps, found[rate], False))
    on_points(points)


def _grow(found: dict[float, float | None], run: Callable[[float], None]) -> None:
    """Train further rates where the best is the lowest or highest, until it no longer is or there are enough."""
    start = set(found)
    while True:
        finite = {rate: loss for rate, loss in found.items() if loss is not None}
        if not finite:
            # Every rate was too high.
            if len(found) >= len(start) + _MOST_GROWTH:
                return
            run(_rounded(min(found) / _STEP))
            continue
        best = min(finite, key=lambda rate: (finite[rate], rate))
        lower, higher = best == min(found), best == max(found)
        if not lower and not higher:
            return
        grown = sum(rate < min(start) if lower else rate > max(start) for rate in found)
        if grown >= _MOST_GROWTH:
            return
        run(_rounded(best / _STEP if lower else best * _STEP))


def _mark(points: Iterable[SweepPoint], round_number: int, kept: Sequence[float]) -> list[SweepPoint]:
    return [
        SweepPoint(p.arm, p.round, p.learning_rate, p.steps, p.eval_loss, True)
        if p.round == round_number and p.learning_rate in kept
        else p
        for p in points
    ]


def _rounded(rate: float) -> float:
    """Two digits: what a person would write."""
    return float(f"{rate:.1e}")
