"""What workers do in tests of their times: in a module of its own, so that other processes can import it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiny_models import tiny_model
from tunesmith.models.batches import Share, micro_batches
from tunesmith.models.loss import Batch
from tunesmith.models.method import prepare_full
from tunesmith.models.passes import AutogradPasses, Pass
from tunesmith.tracking.events import StepEvent
from tunesmith.training.loop import train_steps
from tunesmith.training.optim import adamw
from tunesmith.training.schedule import plan_steps
from tunesmith.training.state import named_trainable
from tunesmith.training.worker_times import Shares, tell_share
from tunesmith.training.workers import Workers
from worker_parts import CPU, ROWS

SLEEP = 0.15  # seconds that the slow worker needs more for each micro-batch


def told(workers: Workers) -> Shares:
    """What each hears of the shares: rank 1 took longest, rank 0 has used most."""
    return tell_share(workers, 10.0 + workers.rank, 0.25 if workers.rank != 1 else 0.5, 2**40 - workers.rank)


class _Slow(AutogradPasses):
    def train(self, batch: Batch, scale: float, check: Callable[[], None] = lambda: None) -> Pass:
        time.sleep(SLEEP)
        return super().train(batch, scale, check)


@dataclass(frozen=True)
class Counting:
    """Workers, and how often each of their calls was made."""

    workers: Any
    calls: dict[str, int]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.workers, name)
        if not callable(found):
            return found

        def counted(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return found(*arguments)

        return counted


def events_of(workers: Workers, slow: int | None) -> tuple[list[StepEvent], dict[str, int]]:
    """One epoch of training, in which the worker ``slow`` is, and the calls among the workers."""
    model: Any = prepare_full(tiny_model())
    passes: Callable[..., AutogradPasses] = _Slow if workers.rank == slow else AutogradPasses
    trained = list(named_trainable(model).values())
    counting = Counting(workers, {})
    torch.manual_seed(0)
    events = train_steps(
        passes(model),
        trained,
        ROWS,
        plan_steps(len(ROWS), 6, 1, 1),
        adamw(trained, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1),
        learning_rate_at=lambda step: 1e-3 / step,
        max_grad_norm=0.5,
        micro_batches=micro_batches(False, 64, 2, CPU, share=Share(workers.rank, workers.world)),
        seed=7,
        started=time.perf_counter(),
        workers=counting,  # type: ignore[arg-type]
    )
    return list(events), counting.calls
