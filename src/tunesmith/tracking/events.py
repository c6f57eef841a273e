"""What a run reports while it goes on: small frozen events, and the record it leaves at the end.

Every sink (console, JSONL, TensorBoard, W&B, MLflow) receives the same events in the same order.
Field names are those LLMForge users know. Times are seconds, throughput is tokens a second, memory
is bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class RunStarted:
    """The first event: what will be trained, on what, how."""

    run: str
    tag: str
    method: str  # "lora" or "full"
    model_id: str
    task: str
    total_steps: int
    epochs: int
    header: Mapping[str, str]  # ordered label -> value lines for people
    config: Mapping[str, Any]  # every resolved setting, JSON-serialisable, free of secrets


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is not an error."""

    message: str


@dataclass(frozen=True)
class Progress:
    """How far a part of the run without metrics of its own has come (scoring, generating)."""

    label: str
    done: int
    total: int


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step."""

    step: int  # 1 for the first
    epoch: int  # 1 for the first
    learning_rate: float
    train_loss_batch: float  # mean over the trained tokens of this step
    grad_norm: float  # before clipping
    fwd_time: float
    bwd_time: float
    train_time_per_step: float
    real_tokens: int  # the rows' own tokens; padding not counted
    trained_tokens: int
    trained_tokens_throughput: float
    mfu: float | None  # model FLOPs utilisation; None where the machine's peak is not known
    peak_memory: int  # of several workers, that of the one that has used most
    time_total_s: float
    # Of several workers: seconds that each, by rank, computed before it waited for the others. Nothing in one process.
    worker_times: tuple[float, ...] = ()
    slowest_worker: int | None = None  # rank
    slowest_worker_time: float | None = None
    mean_worker_time: float | None = None


@dataclass(frozen=True)
class EvalEvent:
    """One evaluation on the validation rows."""

    step: int
    epoch: float
    eval_loss: float
    perplexity: float
    eval_time: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # e.g. {"exact_match": 0.82}


@dataclass(frozen=True)
class EpochEvent:
    """The end of one epoch."""

    epoch: int
    step: int
    avg_train_loss_epoch: float  # mean over all trained tokens of the epoch
    train_time_per_epoch: float  # without evaluation and saving
    eval_time_per_epoch: float


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint was saved."""

    step: int
    path: str
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class RunFinished:
    """The last event."""

    record: "RunRecord"


@dataclass(frozen=True)
class Score:
    """Quality on held-out rows: token-weighted loss, and a task metric where one is configured."""

    rows: int
    loss: float
    perplexity: float
    metric: str | None = None
    value: float | None = None
    interval: tuple[float, float] | None = None  # 95 %


@dataclass(frozen=True)
class SampleAnswer:
    """One held-out row answered by the base and by the tuned model."""

    prompt: str
    expected: str
    before: str | None
    after: str


@dataclass(frozen=True)
class RunRecord:
    """What one run was and did; written as ``report.json``, and all that comparisons ever read."""

    run: str
    tag: str
    method: str
    model_id: str
    task: str
    status: str  # "finished", "interrupted" or "failed"
    steps: int
    epochs: int
    rows: int
    wall_seconds: float
    seconds_to_first_step: float | None
    real_tokens: int
    trained_tokens: int
    real_tokens_per_second: float | None  # evaluation and saving left out
    trained_tokens_per_second: float | None
    peak_rss_bytes: int
    predicted_peak_rss_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    checkpoint_bytes: int | None
    best_checkpoint: str | None
    eval_loss: float | None
    perplexity: float | None
    before: Score | None
    after: Score | None
    samples: tuple[SampleAnswer, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Any]]  # split -> {path, sha256, rows}
    resumed_at: tuple[int, ...] = ()  # steps from which a later process went on
    forced: tuple[str, ...] = ()  # differences that --force-resume passed over
    workers: int = 1  # processes that trained together


Event = RunStarted | Notice | Progress | StepEvent | EvalEvent | EpochEvent | CheckpointEvent | RunFinished


class Sink(Protocol):
    """Receives every event of a run. ``emit`` must never raise for a tracker's own trouble."""

    def emit(self, event: Event) -> None: ...

    def close(self) -> None: ...
