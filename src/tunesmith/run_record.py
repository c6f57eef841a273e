"""The facts of one run: what it is, and the record made of them."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.assembly import Assembly
from tunesmith.checkpoints.manifest import BaseWeights, read_manifest
from tunesmith.checkpoints.store import BEST, CheckpointStore, Mode
from tunesmith.config.load import LoadedConfig
from tunesmith.config.schema import RunConfig
from tunesmith.evaluation.answers import Question
from tunesmith.evaluation.heldout import perplexity
from tunesmith.memory_plan import MemoryPlan
from tunesmith.models.method import count_parameters
from tunesmith.resuming import ResumePoint
from tunesmith.run_totals import Totals
from tunesmith.tracking.environment import machine, versions
from tunesmith.tracking.events import RunRecord, RunStarted, SampleAnswer
from tunesmith.tracking.fanout import Fanout
from tunesmith.training.loop import peak_memory_bytes
from tunesmith.training.workers import Workers

_SAMPLES = 3


@dataclass(frozen=True)
class Run:
    """One run's fixed facts: names, places, parts. Each worker has its own; only the first one's folder is written."""

    loaded: LoadedConfig
    parts: Assembly
    name: str
    tag: str
    folder: Path
    track: Fanout
    base: BaseWeights
    tracker_url: str | None  # where the run can be watched
    started: float
    resumed: ResumePoint | None  # where an earlier process left off
    workers: Workers

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @cached_property
    def store(self) -> CheckpointStore:
        """The run's checkpoints; to be asked for on the first worker only, as it clears up in their folder."""
        assert self.workers.rank == 0
        checkpoints = self.config.checkpoints
        mode: Mode = "min" if checkpoints.best_metric == "eval_loss" else "max"
        return CheckpointStore(self.folder, checkpoints.num_checkpoints_to_keep, mode)


def run_started(run: Run) -> RunStarted:
    """What will be trained, on what, how."""
    parts, config, plan = run.parts, run.config, run.parts.plan
    trainable, total = count_parameters(parts.model)
    train = parts.text.splits.train
    is_lora = parts.kind == "lora"
    header = {
        "Method": "LoRA (lora_config is present)" if is_lora else "full-parameter (no lora_config)",
        "Base": f"{config.model.model_id}, {total:,} parameters{' with the adapter' if is_lora else ''}",
        "Trained": f"{trainable:,} parameters ({trainable / total:.2%})",
        "Task": f"{parts.text.splits.train_on.value}, {train.trained.mean():.0%} of the tokens are trained",
        "Data": f"{len(train):,} rows of {config.data.train_path}, longest {int(train.lengths.max()):,} tokens",
        "Steps": f"{plan.total_steps:,} of {plan.rows_per_step} rows; epochs: {plan.epochs}",
        "Learning rate": f"{parts.peak_rate:g}, {config.optimization.lr_scheduler_type}",
        "Precision": parts.dtype_reason,
        "Micro-batches": parts.batches_reason,
        "Gradients": parts.passes_reason,
        "Memory": _memory_line(parts.memory),
        "Run folder": str(run.folder),
    }
    if run.workers.world > 1:
        header["Workers"] = f"{run.workers.world}, each with {torch.get_num_threads()} threads"
    return RunStarted(
        run=run.name,
        tag=run.tag,
        method=parts.kind,
        model_id=config.model.model_id,
        task=parts.text.splits.train_on.value,
        total_steps=plan.total_steps,
        epochs=plan.epochs,
        header=header,
        config=run.loaded.resolved(),
    )


def start_notices(run: Run) -> Iterator[str]:
    """What a user should know before the first step: settings that cannot act, rows that are left out."""
    if run.resumed is not None:
        yield from run.resumed.notices
        place = (
            f"step {run.resumed.step} ({run.resumed.checkpoint})"
            if run.resumed.checkpoint
            else "the beginning"
        )
        yield f"resumed from {place}"
    yield from config_notices(run.loaded, run.parts.plan.total_steps)
    if len(run.parts.text.splits.train) < run.workers.world:
        yield f"there are fewer training rows than workers ({run.workers.world}): some have nothing to do"
    if run.tracker_url:
        yield f"W&B run: {run.tracker_url}"
    if run.parts.text.renderer.end_of_turn is None and run.parts.text.splits.train_on == "instruction_tuning":
        yield (
            "this chat template ends an assistant turn with no control token, so the model is not taught to stop; "
            "set generation_config.stopping_sequences or a prompt_format with an end-of-turn token"
        )


def _memory_line(memory: MemoryPlan | None) -> str:
    if memory is None:
        return "not predicted: through autograd"
    peak, budget = memory.peak_bytes / 1e9, memory.token_budget
    return f"about {peak:.1f} GB at its peak; micro-batches of at most {budget:,} tokens"


def config_notices(loaded: LoadedConfig, total_steps: int) -> Iterator[str]:
    """What was read otherwise than it is written, and settings of the file that cannot act in this combination."""
    yield from loaded.notices
    config = loaded.config
    warmup = config.optimization.num_warmup_steps
    if warmup >= total_steps:
        yield (
            f"{loaded.place('num_warmup_steps')} is {warmup}, not below the {total_steps} steps of this run: the "
            "learning rate never reaches its peak"
        )
    if config.data.valid_path is None:
        for key in ("eval_batch_size_per_device", "eval_first"):
            if loaded.is_given(key) and config.checkpoints.evaluation is None:
                yield f"{loaded.place(key)} has no effect without valid_path"
    model = config.model
    for key, on in (
        ("flash_attention_2", model.flash_attention_2 not in ("auto", False)),
        ("liger_kernel", model.liger_kernel.enabled),
        ("torch_compile", model.torch_compile not in ("auto", False)),
    ):
        if on:
            yield f"{loaded.place(key)} has no effect here: this program computes these parts by functions of its own"
    if config.optimization.num_epochs is not None and loaded.is_given("min_update_steps"):
        yield f"{loaded.place('min_update_steps')} has no effect beside num_epochs"
    asked = config.model.context_length
    if asked is None and loaded.is_given("embedding_scaling_technique"):
        yield f"{loaded.place('embedding_scaling_technique')} has no effect without context_length"


def make_samples(
    questions: Sequence[Question], before: Sequence[str], after: Sequence[str]
) -> tuple[SampleAnswer, ...]:
    """The first held-out rows with the base's and the tuned model's answers."""
    first: Sequence[str | None] = before or [None] * len(after)
    rows = list(zip(questions, first, after, strict=True))[:_SAMPLES] if after else []
    return tuple(SampleAnswer(q.shown, q.expected, old, new) for q, old, new in rows)


def data_facts(parts: Assembly) -> dict[str, dict[str, Any]]:
    """Path, digest and rows of each split."""
    splits, heldout = parts.text.splits, parts.heldout
    named = {"train": splits.train, "valid": splits.valid, "test": heldout.rows if heldout else None}
    if named["test"] is named["valid"]:
        named["test"] = None
    return {
        name: {"path": rows.path, "sha256": rows.sha256, "rows": len(rows)}
        for name, rows in named.items()
        if rows is not None
    }


def make_record(
    run: Run,
    totals: Totals,
    status: Literal["finished", "interrupted", "failed"],
    samples: tuple[SampleAnswer, ...] = (),
) -> RunRecord:
    """The record of a run in whatever state it ended."""
    trainable, total = count_parameters(run.parts.model)
    best = run.store.best()
    loss = read_manifest(best.path).eval_loss if best else None
    seconds = totals.train_seconds
    published = run.folder / BEST
    return RunRecord(
        run=run.name,
        tag=run.tag,
        method=run.parts.kind,
        model_id=run.config.model.model_id,
        task=run.parts.text.splits.train_on.value,
        status=status,
        steps=totals.steps,
        epochs=run.parts.plan.epochs,
        rows=len(run.parts.text.splits.train),
        wall_seconds=totals.earlier_seconds + time.perf_counter() - run.started,
        seconds_to_first_step=totals.seconds_to_first_step,
        real_tokens=totals.real_tokens,
        trained_tokens=totals.trained_tokens,
        real_tokens_per_second=totals.real_tokens / seconds if seconds else None,
        trained_tokens_per_second=totals.trained_tokens / seconds if seconds else None,
        peak_rss_bytes=max(peak_memory_bytes(), totals.peak_memory),
        predicted_peak_rss_bytes=run.parts.memory.peak_bytes if run.parts.memory else None,
        trainable_parameters=trainable,
        total_parameters=total,
        checkpoint_bytes=best.bytes if best else None,
        best_checkpoint=str((published if published.is_dir() else best.path).resolve()) if best else None,
        eval_loss=loss,
        perplexity=perplexity(loss) if loss is not None and math.isfinite(loss) else None,
        before=totals.before,
        after=totals.after,
        samples=samples,
        versions=versions(),
        machine=machine(),
        data=data_facts(run.parts),
        resumed_at=totals.resumed_at,
        forced=totals.forced,
        workers=run.workers.world,
    )
