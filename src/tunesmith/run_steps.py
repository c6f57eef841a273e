"""The optimizer steps of a run: what its configuration makes of the training loop."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from tunesmith.assembly import Assembly
from tunesmith.checkpoints.store import TRAINING
from tunesmith.config.schema import OptimizationSettings
from tunesmith.models.method import read_trained
from tunesmith.models.passes import unasked
from tunesmith.tracking.events import StepEvent
from tunesmith.training.loop import train_steps
from tunesmith.training.optim import adamw
from tunesmith.training.schedule import learning_rate_at
from tunesmith.training.state import named_trainable, read_training_state, training_tensors
from tunesmith.training.workers import ALONE, Workers


def make_optimizer(parts: Assembly, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    chosen = settings.optimizer
    return adamw(
        list(named_trainable(parts.model).values()),
        betas=chosen.adam_betas,
        epsilon=chosen.adam_epsilon,
        weight_decay=chosen.weight_decay,
    )


def put_back(
    parts: Assembly, optimizer: torch.optim.Optimizer, checkpoint: Path, workers: Workers = ALONE
) -> None:
    """The weights and the optimizer as they were when ``checkpoint`` was saved.

    Only the first worker needs to reach the checkpoint's files.

    Raises:
        CheckpointError: it is of another model.
    """
    if parts.kind == "full":
        put_back_weights(parts, checkpoint, workers)
    tensors = training_tensors(named_trainable(parts.model), optimizer, kept_tensors(parts))
    workers.put(tensors, lambda: read_training_state(checkpoint / TRAINING, tensors))


def put_back_weights(parts: Assembly, checkpoint: Path, workers: Workers = ALONE) -> None:
    """The trained weights as ``checkpoint`` has them in the form in which they are served.

    Raises:
        CheckpointError: it is of another model.
    """
    workers.put(named_trainable(parts.model), lambda: read_trained(parts.model, parts.kind, checkpoint))


def kept_tensors(parts: Assembly) -> Mapping[str, torch.nn.Parameter]:
    """Trained tensors that a checkpoint keeps as they are in memory, beside the form in which they are served.

    Of LoRA all: some kinds are served in another form, and they are small. Full weights are served as they are.
    """
    return named_trainable(parts.model) if parts.kind == "lora" else {}


def steps_after(
    parts: Assembly,
    settings: OptimizationSettings,
    optimizer: torch.optim.Optimizer,
    done: int,
    started: float,
    workers: Workers = ALONE,
    check: Callable[[], None] = unasked,
) -> Iterator[StepEvent]:
    """The steps of the run from ``done`` + 1 on; what ``check`` raises abandons the one at hand."""
    return train_steps(
        parts.passes,
        list(named_trainable(parts.model).values()),
        parts.text.splits.train,
        parts.plan,
        optimizer,
        learning_rate_at=lambda step: learning_rate_at(
            step,
            peak=parts.peak_rate,
            kind=settings.lr_scheduler_type,
            warmup_steps=settings.num_warmup_steps,
            total_steps=parts.plan.total_steps,
        ),
        max_grad_norm=settings.optimizer.max_grad_norm,
        micro_batches=parts.train_batches,
        seed=settings.seed,
        started=started,
        workers=workers,
        steps_done=done,
        check=check,
    )
