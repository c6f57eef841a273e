"""What is to be trained: rows, their lengths, steps; from the data where it can be read, else as the user says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.assembly import assemble_text, held_out, longest_uncut, rows_beside, rows_per_step
from tunesmith.config.load import LoadedConfig
from tunesmith.data.order import step_rows
from tunesmith.data.packing import shared_prefix, split_packed
from tunesmith.data.rows import TokenizedRows
from tunesmith.data.sources import read_records
from tunesmith.data.splits import choose_context_length
from tunesmith.errors import ConfigError, DataError
from tunesmith.memory_plan import TOKEN_BUDGETS
from tunesmith.models.base import BaseFolder, model_limit
from tunesmith.planning.nearest import NOTHING, Beside
from tunesmith.training.schedule import StepPlan, plan_steps

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_STEPS = 100  # looked at for what packing saves
_MADE_TOKENS = 64 * TOKEN_BUDGETS[0]  # made at most: micro-batches of more rows are cut no other way


@dataclass(frozen=True)
class Asked:
    """Held-out rows that are answered together: the length of each prompt, and the longest answer."""

    prompts: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """One epoch of rows, and how often it is gone through.

    Attributes:
        source: where the lengths are from, for people.
        rows: of an epoch; ``tokens``, ``targets``: of all of them, padding never counted.
        longest: tokens of the longest row; ``most_targets``: trained tokens of the row that has most.
        attended: how many tokens a token's row has, in the mean over tokens.
        computed: tokens that are computed, for each token of the rows; below 1 where rows share an opening.
        examples: rows as tokens, for the memory model: all of them, or one step's worth of made ones.
        rows_per_step: of one device; ``num_devices``: that the configuration asks for, each with as many.
        num_epochs, min_update_steps: as configured; without the first the second decides.
        beside: rows that must fit beside those that are trained on.
        asked: what is answered for the metric, at one time each.
    """

    source: str
    rows: int
    tokens: int
    targets: int
    longest: int
    most_targets: int
    attended: float
    computed: float
    rows_per_step: int
    num_epochs: int | None
    min_update_steps: int
    context_length: int
    examples: TokenizedRows
    num_devices: int = 1
    beside: Beside = NOTHING
    asked: tuple[Asked, ...] = ()

    def plan(self, devices: int) -> StepPlan:
        """Epochs and optimizer steps, where each of several devices has its own rows of a step."""
        return plan_steps(self.rows, self.rows_per_step * devices, self.num_epochs, self.min_update_steps)

    @property
    def configured(self) -> StepPlan:
        """With as many devices as the configuration asks for."""
        return self.plan(self.num_devices)

    @property
    def rows_of_step(self) -> int:
        """Of all devices that the configuration asks for, together."""
        return self.rows_per_step * self.num_devices


def read_workload(
    loaded: LoadedConfig,
    base: BaseFolder,
    rows: int | None,
    *,
    skip_bad_rows: bool,
    say: Callable[[str], None],
) -> Workload:
    """Rows and lengths of a configuration.

    Args:
        base: a folder with config.json; without a tokenizer each row counts as one of ``context_length`` tokens.
        rows: plan for so many rows of ``context_length`` tokens instead of those of ``train_path``.

    Raises:
        ConfigError, DataError, ModelError: the rows are not to be had, and nothing says how many to plan for.
    """
    if rows is not None:
        return _made(loaded, base, rows, f"{rows:,} rows of {{}} tokens, as --rows says")
    if not any((base.path / name).is_file() for name in _TOKENIZERS):
        count = _count(loaded.config.data.train_path)
        return _made(
            loaded, base, count, f"{count:,} rows of train_path, each taken for {{}} tokens (no tokenizer)"
        )
    try:
        text = assemble_text(loaded, weights=False, skip_bad_rows=skip_bad_rows, say=say)
    except DataError as error:
        raise _with_rows(error) from error
    fitted = text.splits.fitted(text.context_length, loaded.config.data.on_too_long)
    scored, valid = held_out(loaded, text, fitted, skip_bad_rows=skip_bad_rows)
    evaluated = [split for split in (scored, valid) if split is not None]
    examples = fitted.train
    lengths, counts = examples.lengths, examples.trained_counts
    size = _rows_per_step(loaded)
    return Workload(
        source=f"{len(examples):,} rows of train_path",
        rows=len(examples),
        tokens=int(lengths.sum()),
        targets=int(counts.sum()),
        longest=max(int(lengths.max()), text.context_length if _pads(loaded) else 0),
        most_targets=int(counts.max()),
        attended=float((lengths.astype(np.float64) ** 2).sum() / lengths.sum()),
        computed=_computed(
            examples, size * loaded.config.cluster.num_devices, loaded.config.optimization.seed
        ),
        rows_per_step=size,
        **_duration(loaded),
        context_length=text.context_length,
        examples=examples,
        beside=rows_beside(
            evaluated,
            text.context_length if _pads(loaded) else 0,
            longest_uncut(loaded, scored, text.model_limit),
        ),
        asked=tuple(
            Asked(tuple(len(q.prompt_ids) for q in split.questions), split.max_new_tokens)
            for split in evaluated
            if split.questions
        ),
    )


def made_rows(count: int, length: int) -> TokenizedRows:
    """Rows without a common opening, all of whose tokens are trained but the first: none needs more of its length."""
    ids = np.ones((count, length), np.int32)
    ids[:, 0] = np.arange(count)
    trained = np.ones((count, length), np.bool_)
    trained[:, 0] = False
    zeros = np.zeros(count, np.int32)
    starts = np.arange(count + 1, dtype=np.int64) * length
    return TokenizedRows("--rows", "", ids.ravel(), trained.ravel(), starts, ("--rows",), zeros, zeros)


def _made(loaded: LoadedConfig, base: BaseFolder, rows: int, source: str) -> Workload:
    settings = loaded.config.model
    if settings.context_length is None:
        raise ConfigError(
            loaded.place("context_length"),
            "is not set, and no lengths of rows are known to plan for",
            "add --set context_length=512, or the length you mean",
        )
    length = choose_context_length(
        settings.context_length, model_limit(base), settings.context_length,
        settings.embedding_scaling_technique, loaded.place("context_length"),
    )  # fmt: skip
    if length < 2:
        raise ConfigError(loaded.place("context_length"), "is 1, which leaves nothing to predict", "raise it")
    size = _rows_per_step(loaded)
    return Workload(
        source=source.format(f"{length:,}"),
        rows=rows,
        tokens=rows * length,
        targets=rows * (length - 1),
        longest=length,
        most_targets=length - 1,
        attended=float(length),
        computed=(length - 1) / length,  # the last token is predicted, not read
        rows_per_step=size,
        **_duration(loaded),
        context_length=length,
        examples=made_rows(
            min(rows, size * loaded.config.cluster.num_devices, max(8, _MADE_TOKENS // length)), length
        ),
    )


def _rows_per_step(loaded: LoadedConfig) -> int:
    """Of one device."""
    settings = loaded.config.optimization
    return rows_per_step(settings.train_batch_size_per_device, settings.gradient_accumulation_steps)


def _duration(loaded: LoadedConfig) -> dict[str, Any]:
    settings = loaded.config.optimization
    return {
        "num_epochs": settings.num_epochs,
        "min_update_steps": settings.min_update_steps,
        "num_devices": loaded.config.cluster.num_devices,
    }


def _pads(loaded: LoadedConfig) -> bool:
    return loaded.config.optimization.padding == "max_length"


def _count(path: str) -> int:
    try:
        return sum(1 for _ in read_records(path))
    except DataError as error:
        raise _with_rows(error) from error


def _with_rows(error: DataError) -> DataError:
    first, *below = error.remedy.split("\n")
    hint = "or plan without the file: --rows N"
    return DataError(error.place, error.fault, "\n".join([f"{first}, {hint}" if first else hint, *below]))


def _computed(examples: TokenizedRows, rows_per_step: int, seed: int) -> float:
    """Tokens in packed micro-batches of the first steps, for each token of their rows."""
    computed = real = 0
    for step in step_rows(len(examples), rows_per_step, seed, 1)[:_STEPS]:
        for group in split_packed(examples, step, TOKEN_BUDGETS[0]):
            rows = [examples.row(i) for i in group]
            prefix = shared_prefix(rows)
            computed += prefix + sum(int(row.trained.nonzero()[0][-1]) - prefix for row in rows)
            real += sum(len(row.ids) for row in rows)
    return computed / real
