"""What a fine-tuning run is, from a configuration to a record: read it from top to bottom.

This module and ``cli`` are the only ones that unpack a configuration.
"""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from rich.console import Console

from tunesmith.assembly import assemble
from tunesmith.checkpoints.manifest import FORMAT, FileStamp, Manifest, read_manifest
from tunesmith.config.load import LoadedConfig
from tunesmith.errors import Interrupted, NonFiniteError, TunesmithError
from tunesmith.evaluation.heldout import perplexity
from tunesmith.evaluation.score import HeldOut, score_heldout
from tunesmith.models.lora import without_fresh_adapter
from tunesmith.models.method import base_is_without_adapter, restore, save_servable, trainable_parameters
from tunesmith.run_open import open_run
from tunesmith.run_record import (
    Run,
    Totals,
    data_facts,
    make_record,
    make_samples,
    run_started,
    start_notices,
)
from tunesmith.run_result import forward_best, leave_report
from tunesmith.tracking.environment import seconds_since_process_start, versions
from tunesmith.tracking.events import (
    CheckpointEvent,
    EvalEvent,
    Notice,
    Progress,
    RunFinished,
    RunRecord,
    SampleAnswer,
    Score,
)
from tunesmith.tracking.summary import print_summary
from tunesmith.training.loop import train_steps
from tunesmith.training.memory_errors import memory_errors
from tunesmith.training.optim import adamw
from tunesmith.training.schedule import learning_rate_at
from tunesmith.training.stop import StopRequest, StopRequested, stop_on_signals, terminate_as_interrupt


def finetune(loaded: LoadedConfig, console: Console, *, skip_bad_rows: bool = False) -> RunRecord:
    """Fine-tune as the configuration says.

    Leaves ``{output_dir}/{run}/`` with checkpoints, ``best/``, metrics and report; for LoRA also the copy
    that the server finds.

    Raises:
        TunesmithError: any of its kinds; what was saved before stays good.
    """
    started = time.perf_counter()
    with terminate_as_interrupt(), memory_errors():
        parts = assemble(
            loaded,
            skip_bad_rows=skip_bad_rows,
            say=lambda text: console.print(text, markup=False, soft_wrap=True),
        )
        run = open_run(loaded, parts, console, started)
        record = _carry_out_and_report(run)
        print_summary(console, record)
        forward_best(run, record, console)
    return record


def _carry_out_and_report(run: Run) -> RunRecord:
    totals = Totals()
    try:
        with run.track:
            record = _carry_out(run, totals)
    except BaseException as error:
        status: Literal["interrupted", "failed"] = (
            "interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed"
        )
        with suppress(TunesmithError):  # the first error is the one to show, not what it led to
            leave_report(run, make_record(run, totals, status))
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(str(run.folder), f"stopped after step {totals.steps}", _kept(run)) from error
        raise
    leave_report(run, record)
    return record


def _carry_out(run: Run, totals: Totals) -> RunRecord:
    run.track.emit(run_started(run))
    for notice in start_notices(run):
        run.track.emit(Notice(notice))
    checkpoints, heldout = run.config.checkpoints, run.parts.heldout
    before: list[str] = []
    if heldout and (checkpoints.eval_first or checkpoints.evaluation):
        is_fresh = run.parts.parent is None and base_is_without_adapter(run.parts.model)
        with without_fresh_adapter(run.parts.model, is_fresh=is_fresh):
            totals.before, before = _score(run, heldout, "Before")
    with stop_on_signals() as stop:
        _train(run, totals, stop)
        run.store.publish_best()
    if stop.signal_name:
        raise Interrupted(str(run.folder), f"{stop.signal_name} after step {totals.steps}", _kept(run))
    samples: tuple[SampleAnswer, ...] = ()
    if heldout:
        totals.after, after = _score_best(run, totals, heldout)
        samples = make_samples(heldout.questions, before, after)
    record = make_record(run, totals, "finished", samples)
    run.track.emit(RunFinished(record))
    return record


def _score_best(run: Run, totals: Totals, heldout: HeldOut) -> tuple[Score, list[str]]:
    best = run.store.best()
    loss = read_manifest(best.path).eval_loss if best else None
    if loss is not None and heldout is run.parts.valid and not heldout.questions:
        # The checkpoint schedule has taken this very loss of these very weights.
        return Score(len(heldout.rows), loss, perplexity(loss)), []
    if best is not None and best.step != totals.steps:
        restore(run.parts.model, run.parts.kind, best.path)
    return _score(run, heldout, "After")


def _kept(run: Run) -> str:
    best = run.store.best()
    return f"the best checkpoint is {best.path}" if best else "nothing had been saved yet"


def _train(run: Run, totals: Totals, stop: StopRequest) -> None:
    parts, settings = run.parts, run.config.optimization
    parameters = trainable_parameters(parts.model)
    optimizer = adamw(
        parameters,
        betas=settings.optimizer.adam_betas,
        epsilon=settings.optimizer.adam_epsilon,
        weight_decay=settings.optimizer.weight_decay,
    )
    steps = train_steps(
        parts.passes,
        parameters,
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
        started=run.started,
    )
    totals.seconds_to_first_step = seconds_since_process_start()
    try:
        for event in steps:
            totals.add(event)
            run.track.emit(event)
            ends_epoch = event.step % parts.plan.steps_per_epoch == 0
            if _is_due(run, event.step) and not stop.signal_name:
                _evaluate(run, totals, stop)
            if _is_due(run, event.step) or stop.signal_name:
                _save(run, totals)
            if ends_epoch:
                run.track.emit(totals.end_epoch())
            if stop.signal_name:
                return
    except NonFiniteError as error:
        best = run.store.best()
        kept = f"; the last good checkpoint is {best.path}" if best else ""
        raise NonFiniteError(error.place, error.fault, error.remedy + kept) from error


def _is_due(run: Run, step: int) -> bool:
    plan, schedule = run.parts.plan, run.config.checkpoints.checkpoint_and_evaluation_frequency
    every = schedule.frequency * (plan.steps_per_epoch if schedule.unit == "epochs" else 1)
    return step % every == 0 or step == plan.total_steps


def _evaluate(run: Run, totals: Totals, stop: StopRequest) -> None:
    valid = run.parts.valid
    if valid is None:
        return
    begun = time.perf_counter()
    try:
        score, _ = _score(run, valid, f"Step {totals.steps}", stop)
    except StopRequested:
        return
    if not math.isfinite(score.loss):
        raise NonFiniteError(
            f"step {totals.steps}", "the evaluation loss is not finite", "lower learning_rate"
        )
    seconds = time.perf_counter() - begun
    totals.epoch_eval_seconds += seconds
    totals.evaluation = EvalEvent(
        step=totals.steps,
        epoch=totals.steps / run.parts.plan.steps_per_epoch,
        eval_loss=score.loss,
        perplexity=score.perplexity,
        eval_time=seconds,
        metrics={score.metric: score.value} if score.metric and score.value is not None else {},
    )
    run.track.emit(totals.evaluation)


def _save(run: Run, totals: Totals) -> None:
    parts, evaluation = run.parts, totals.evaluation
    if not all(bool(tensor.isfinite().all()) for tensor in trainable_parameters(parts.model)):
        raise NonFiniteError(f"step {totals.steps}", "a trained weight is not finite", "lower learning_rate")
    if evaluation is not None and evaluation.step != totals.steps:
        evaluation = None  # of an earlier step: says nothing about these weights
    metric = run.config.checkpoints.best_metric
    metrics = dict(evaluation.metrics) if evaluation else {}
    score = None if evaluation is None else evaluation.eval_loss if metric == "eval_loss" else metrics[metric]

    def manifest(files: Mapping[str, FileStamp]) -> Manifest:
        return Manifest(
            format=FORMAT,
            method=parts.kind,
            tag=run.tag,
            run=run.name,
            model_id=run.config.model.model_id,
            base=run.base,
            step=totals.steps,
            epoch=totals.steps / parts.plan.steps_per_epoch,
            eval_loss=evaluation.eval_loss if evaluation else None,
            metrics=metrics,
            config=run.loaded.resolved(),
            data=data_facts(run),
            versions=versions(),
            created=datetime.now(UTC).isoformat(),
            parent=parts.parent,
            files=files,
        )

    saved = run.store.save(
        totals.steps,
        lambda folder: save_servable(
            parts.model, parts.kind, parts.text.tokenizer, folder, parts.text.base.model_id
        ),
        manifest,
        score,
    )
    run.track.emit(CheckpointEvent(saved.step, str(saved.path), saved.is_best, saved.seconds))


def _score(
    run: Run, heldout: HeldOut, label: str, stop: StopRequest | None = None
) -> tuple[Score, list[str]]:
    def show(what: str, done: int, total: int) -> None:
        run.track.emit(Progress(what, done, total))
        if stop is not None:
            stop.check()

    return score_heldout(
        run.parts.model,
        run.parts.passes,
        run.parts.text.tokenizer,
        heldout,
        run.parts.stops,
        micro_batches=run.parts.eval_batches,
        seed=run.config.optimization.seed,
        label=label,
        on_progress=show,
    )
