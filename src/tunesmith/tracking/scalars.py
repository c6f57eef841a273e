"""The one mapping from events to the named numbers that TensorBoard, W&B and MLflow store.

The names are LLMForge's, so dashboards made for it go on working: epoch, step, learning_rate,
train_loss_batch, avg_train_loss_epoch, eval_loss, perplexity, fwd_time, bwd_time,
train_time_per_step, train_time_per_epoch, eval_time_per_epoch, trained_tokens,
trained_tokens_throughput, time_total_s; plus grad_norm, mfu, peak_memory, of several workers
slowest_worker, slowest_worker_time and mean_worker_time, and task metrics under their own names.
"""

from typing import NamedTuple

from tunesmith.tracking.events import EpochEvent, EvalEvent, Event, StepEvent

_STEP_FIELDS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss_batch",
    "grad_norm",
    "fwd_time",
    "bwd_time",
    "train_time_per_step",
    "trained_tokens",
    "trained_tokens_throughput",
    "mfu",
    "peak_memory",
    "time_total_s",
    "slowest_worker",
    "slowest_worker_time",
    "mean_worker_time",
)


class Scalar(NamedTuple):
    """One value of one metric. ``step`` is the optimizer step it belongs to."""

    name: str
    value: float
    step: int


def scalars(event: Event) -> list[Scalar]:
    """The scalars of ``event``, all at one step; empty for events that carry none.

    A value that is not known (``mfu`` on a machine whose peak is not known, the slowest worker of
    one process) is left out. Values may be NaN or infinite; all three services can store those.
    """
    match event:
        case StepEvent():
            values = [(name, getattr(event, name)) for name in _STEP_FIELDS]
            return [Scalar(name, float(value), event.step) for name, value in values if value is not None]
        case EvalEvent():
            # epoch and step stay with the step's own event: twice at one step would be two points.
            values = [("eval_loss", event.eval_loss), ("perplexity", event.perplexity)]
            values += list(event.metrics.items())
        case EpochEvent():
            values = [
                ("avg_train_loss_epoch", event.avg_train_loss_epoch),
                ("train_time_per_epoch", event.train_time_per_epoch),
                ("eval_time_per_epoch", event.eval_time_per_epoch),
            ]
        case _:
            return []
    return [Scalar(name, float(value), event.step) for name, value in values]
