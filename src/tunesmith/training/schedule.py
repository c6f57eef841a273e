"""Learning rate and number of steps as pure functions."""

import math
from dataclasses import dataclass
from typing import Literal

SchedulerType = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class StepPlan:
    """How many epochs and optimizer steps a run has."""

    epochs: int
    steps_per_epoch: int
    rows_per_step: int

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def plan_steps(rows: int, rows_per_step: int, num_epochs: int | None, min_update_steps: int) -> StepPlan:
    """Without ``num_epochs``: as many whole epochs as ``min_update_steps`` needs."""
    steps_per_epoch = math.ceil(rows / rows_per_step)
    return StepPlan(
        num_epochs or math.ceil(min_update_steps / steps_per_epoch), steps_per_epoch, rows_per_step
    )


def learning_rate_at(
    step: int, *, peak: float, kind: SchedulerType, warmup_steps: int, total_steps: int
) -> float:
    """Learning rate of optimizer step ``step`` (from 1).

    Warm-up rises linearly and reaches ``peak`` at step ``warmup_steps``. Then cosine and linear fall towards
    0, which they would reach one step after the last, so that no step is wasted at rate 0.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    done = (step - 1 - warmup_steps) / (total_steps - warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done)
