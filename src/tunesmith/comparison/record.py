"""What a comparison found: everything that ``report.json`` holds and that the reports are drawn from.

All sizes are in bytes, all times in seconds, all losses in nats a token, all proportions between 0 and 1. What was not
measured is None, never 0. A number that is not finite is not a measurement, so it is None too.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tunesmith.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
Status = Literal["running", "interrupted", "finished", "failed"]
Method = Literal["lora", "full"]


class _Part:
    """Read strictly: a field that is missing, unknown or of another type is an error."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class Estimate(_Part):
    """A mean over ``n`` (rows or runs, as the field says that holds it) with its 95 % interval, where it has one."""

    value: float
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Arm(_Part):
    """One way to train.

    Attributes:
        name: as ``--arms`` has it: ``full``, ``lora``, ``lora:r=16``; unique in a comparison.
        label: the same for people: "full-parameter", "LoRA, r 16".
        lora_config: what the runs were given, with the documented defaults; None for full-parameter training.
    """

    name: str
    label: str
    method: Method
    lora_config: Mapping[str, Any] | None


@dataclass(frozen=True)
class LossPoint(_Part):
    """One point of a loss curve."""

    step: int
    epoch: float
    loss: float


@dataclass(frozen=True)
class RunEntry(_Part):
    """One training of the comparison; its own ``report.json`` stands in ``folder``.

    Attributes:
        key: what it is recognised by: a digest of settings, rows and base weights.
        purpose: ``sweep`` trained to choose a rate, ``final`` at the chosen one.
        round: of the sweep, 0 for the first; None for final runs.
        folder: below the folder of the comparison.
        eval_loss, metric_value: of the best checkpoint on the compared rows; None where the run failed.
        training_seconds: steps alone; ``wall_seconds`` has start, evaluation and saving in it.
        fault: one line, where it failed.
    """

    key: str
    arm: str
    purpose: Literal["sweep", "final"]
    round: int | None
    learning_rate: float
    seed: int
    status: Status
    folder: str
    steps: int
    eval_loss: float | None
    metric_value: float | None
    wall_seconds: float | None
    training_seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    train_curve: tuple[LossPoint, ...]
    eval_curve: tuple[LossPoint, ...]
    fault: str | None = None


@dataclass(frozen=True)
class SweepPoint(_Part):
    """The eval loss of one learning rate after one round of the sweep; None: the run failed, as with too high a rate.

    ``kept`` says that the rate went into the next round; of the last round, that it was chosen. Where every rate of the
    last round failed, the one that was chosen is marked in the round that it came to.
    """

    arm: str
    round: int
    learning_rate: float
    steps: int
    eval_loss: float | None
    kept: bool


@dataclass(frozen=True)
class Serving(_Part):
    """The arm's checkpoint in the serving engine, on this machine.

    Attributes:
        load_seconds: until the server could answer with it: a whole model, or base and adapter.
        swap_seconds: until a server that has the base already could: for an adapter, reading the adapter; for a full
            checkpoint there is no other way than loading it whole.
        bytes_per_variant: what each further model of this kind takes in memory.
        merged_tokens_per_second, unmerged_tokens_per_second: generated tokens, one request at a time; a full checkpoint
            has only the first.
    """

    load_seconds: float | None
    swap_seconds: float | None
    bytes_per_variant: int | None
    merged_tokens_per_second: float | None
    unmerged_tokens_per_second: float | None


@dataclass(frozen=True)
class Forgetting(_Part):
    """What a model can do on text that it was not tuned for, before and after.

    Attributes:
        arm, seed: whose checkpoint it is.
        source: name of the text: "shipped" or the user's file.
        general_loss_before, general_loss_after: nats a token, ``loss_rows`` texts.
        choice_accuracy_before, choice_accuracy_after: share of the questions answered right; n counts them.
    """

    arm: str
    seed: int
    source: str
    loss_rows: int
    general_loss_before: float
    general_loss_after: float
    general_loss_change: Estimate | None
    choice_accuracy_before: Estimate | None
    choice_accuracy_after: Estimate | None


@dataclass(frozen=True)
class ArmSummary(_Part):
    """One arm at its chosen rate, over its final runs.

    ``eval_loss`` and ``metric`` hold means over rows and seeds with intervals over both; the others means over runs,
    ``peak_memory_bytes`` the largest.
    """

    arm: str
    learning_rate: float | None
    at_edge_of_grid: bool
    seeds: tuple[int, ...]
    failed_runs: int
    eval_loss: Estimate | None
    metric: Estimate | None
    wall_seconds: float | None
    training_seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    trainable_parameters: int | None
    total_parameters: int | None
    checkpoint_bytes: int | None
    training_cost: float | None  # of one run, in the currency of price_per_hour
    sweep_seconds: float
    serving: Serving | None


@dataclass(frozen=True)
class Difference(_Part):
    """``first`` minus ``second`` on the same rows.

    Attributes:
        measure: ``eval_loss``, a metric's name, or ``general_loss``.
        value, interval: in the measure's own unit: nats a token, or a share of 1 (0.008 are 0.8 points).
        rows, seeds: what the interval is over.
        lower_is_better: True of losses.
        confidence: of the interval; above 0.95 where several pairs are compared, so that all hold together.
    """

    measure: str
    first: str
    second: str
    value: float
    interval: tuple[float, float]
    rows: int
    seeds: int
    lower_is_better: bool
    confidence: float = 0.95

    @property
    def better(self) -> str | None:
        """The arm that is better; None where the interval covers 0, that is where no difference is shown."""
        low, high = self.interval
        if low <= 0 <= high:
            return None
        return self.first if (high < 0) == self.lower_is_better else self.second


@dataclass(frozen=True)
class Advice(_Part):
    """Which arm for which use; ``arm`` is None where the numbers do not say."""

    use: str  # "many models to serve", "rapid experiments", "maximum quality", "one model"
    arm: str | None
    reason: str


@dataclass(frozen=True)
class Verdict(_Part):
    """What the numbers allow to say, in words; every sentence has its numbers in it."""

    headline: str
    sentences: tuple[str, ...]
    advice: tuple[Advice, ...]


@dataclass(frozen=True)
class SampleAnswers(_Part):
    """One held-out row as the base (None: not asked) and each arm (name -> answer of its first seed) answer it."""

    prompt: str
    expected: str
    base: str | None
    answers: Mapping[str, str]


@dataclass(frozen=True)
class BaseScore(_Part):
    """The untuned model on the compared rows."""

    eval_loss: float | None
    metric: Estimate | None


@dataclass(frozen=True)
class ComparisonRecord(_Part):
    """The whole comparison.

    Attributes:
        name: of its folder.
        status: ``running`` between two runs, ``finished`` at the end.
        runs_done, runs_planned: the second can grow, as the sweep goes on.
        metric: name of the task metric, None where only losses were compared.
        rows: held-out rows that the losses are over; ``metric_rows`` those that were answered.
        settings: of the configuration, resolved, without what the arms change.
        options: of the command: arms, seeds, learning rates, budget.
        lineage: base model and weights digest, data split -> path, sha256, rows.
        notes: what a reader has to know: failed runs, a rate at the edge, something that was not measured and why.
    """

    format: int
    name: str
    status: Status
    created: str  # ISO 8601, UTC
    seconds: float
    runs_done: int
    runs_planned: int
    model_id: str
    task: str | None
    metric: str | None
    rows: int
    metric_rows: int | None
    price_per_hour: float | None
    arms: tuple[Arm, ...]
    base: BaseScore | None
    sweep: tuple[SweepPoint, ...]
    runs: tuple[RunEntry, ...]
    summaries: tuple[ArmSummary, ...]
    differences: tuple[Difference, ...]
    forgetting: tuple[Forgetting, ...]
    verdict: Verdict | None
    samples: tuple[SampleAnswers, ...]
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    lineage: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...]


def to_json(record: ComparisonRecord) -> str:
    """``record`` as strict JSON, indented, ASCII; bytes of a file's name that are no text become question marks.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(_plain(record), indent=2, allow_nan=False) + "\n"


def from_json(text: str | bytes, place: str = "report.json") -> ComparisonRecord:
    """The record that ``to_json`` wrote.

    Raises:
        UserError: it is not one; the message names the first field that is wrong.
    """
    from pydantic import ValidationError

    try:
        record = _adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise UserError(
            place, f"is no report of a comparison: {where}: {first['msg']}", "run the comparison again"
        ) from error
    if record.format != FORMAT:
        fault = f"is of format {record.format}, this version reads {FORMAT}"
        raise UserError(place, fault, "use the version that wrote it, or run the comparison again")
    return record


def read_comparison(path: Path) -> ComparisonRecord:
    """The record in ``path``: a ``report.json`` or the folder that holds it.

    Raises:
        UserError: there is none, or it is not one.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        text = file.read_bytes()
    except OSError as error:
        raise UserError(str(file), error.strerror or str(error), "name the folder of a comparison") from error
    return from_json(text, str(file))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no strict JSON
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@functools.cache
def _adapter() -> "TypeAdapter[ComparisonRecord]":
    from pydantic import TypeAdapter

    return TypeAdapter(ComparisonRecord)
