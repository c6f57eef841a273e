"""What a fine-tuning run is, from a configuration to a record: read it from top to bottom.

This module and ``cli`` are the only ones that unpack a configuration.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text

from tunesmith.assembly import Assembly, assemble
from tunesmith.checkpoints.lock import locked
from tunesmith.checkpoints.manifest import FORMAT, BaseWeights, FileStamp, Manifest, read_manifest
from tunesmith.checkpoints.signature import check_keys
from tunesmith.checkpoints.store import TRAINING
from tunesmith.config.load import LoadedConfig
from tunesmith.errors import Interrupted, NonFiniteError, TunesmithError
from tunesmith.evaluation.heldout import perplexity
from tunesmith.evaluation.heldout_file import HELD_OUT, write_heldout
from tunesmith.evaluation.score import HeldOut, Scored, score_heldout
from tunesmith.models.lora import without_fresh_adapter
from tunesmith.models.method import base_is_without_adapter, is_finite, restore, save_servable
from tunesmith.resuming import (
    ResumePoint,
    differences,
    find_run_folder,
    other_settings,
    refuse,
    resume_point,
    unfinished_run,
)
from tunesmith.run_open import base_weights, open_run
from tunesmith.run_record import Run, data_facts, make_record, make_samples, run_started, start_notices
from tunesmith.run_result import forward_best, leave_report, print_ways_on
from tunesmith.run_state import RunState, environment_of, write_state
from tunesmith.run_steps import kept_tensors, make_optimizer, put_back, steps_after
from tunesmith.run_totals import Totals
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
from tunesmith.training.memory_errors import memory_errors
from tunesmith.training.state import named_trainable, save_training_state
from tunesmith.training.stop import StopRequest, StopRequested, stop_on_signals, terminate_as_interrupt


@dataclass(frozen=True)
class Compared:
    """Of a run that is one of a comparison: the values of each held-out row are kept in ``heldout.json``.

    ``score_base`` says whether this is the run that scores the base too; one of them is enough.
    """

    score_base: bool


def finetune(
    loaded: LoadedConfig,
    console: Console,
    *,
    skip_bad_rows: bool = False,
    resume: str | None = None,
    force_resume: bool = False,
    compared: Compared | None = None,
) -> RunRecord:
    """Fine-tune as the configuration says.

    Leaves ``{output_dir}/{run}/`` with checkpoints, ``best/``, metrics and report; for LoRA also the copy
    that the server finds.

    Args:
        resume: a run's folder or name to go on with; "auto": the newest unfinished run of this configuration, or
            a new one where there is none.
        force_resume: go on even where the bits of the result would be others, and mark the run.
        compared: what is scored otherwise, where the run is one of a comparison.

    Raises:
        TunesmithError: any of its kinds; what was saved before stays good.
    """
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    check_keys()
    with terminate_as_interrupt(), memory_errors(), ExitStack() as held:
        folder = _folder_to_resume(loaded, resume)
        point = None
        if folder is not None:
            held.enter_context(locked(folder))
            point = resume_point(folder)
            if not force_resume:
                refuse(folder, other_settings(point, loaded.resolved()))
        budget = point.state.token_budget if point and point.state else None
        parts = assemble(loaded, skip_bad_rows=skip_bad_rows, say=say, token_budget=budget)
        base = base_weights(parts.text.base)
        totals = _totals(point, loaded, parts, base, force_resume=force_resume)
        run = open_run(loaded, parts, base, console, started, point)
        if folder is None:
            held.enter_context(locked(run.folder))
        record = _carry_out_and_report(run, totals, compared)
        # Before the report says that the run is finished: what ends in between is done when it is resumed.
        try:
            note = forward_best(run)
        finally:
            leave_report(run, record)
            print_summary(console, record)
        if note:
            console.print(Text(note), soft_wrap=True)
        print_ways_on(run, console)
    return record


def _folder_to_resume(loaded: LoadedConfig, resume: str | None) -> Path | None:
    output_dir = Path(loaded.config.output.output_dir).expanduser()
    if resume == "auto":
        return unfinished_run(output_dir, loaded.resolved())
    return find_run_folder(resume, output_dir) if resume is not None else None


def _totals(
    point: ResumePoint | None, loaded: LoadedConfig, parts: Assembly, base: BaseWeights, *, force_resume: bool
) -> Totals:
    """Where counting begins. Raises ConfigError where the run cannot go on to the same bits and must."""
    if point is None:
        return Totals()
    found = differences(
        point, loaded.resolved(), data_facts(parts), base, environment_of(parts), _budget(parts)
    )
    if not force_resume:
        refuse(point.folder, found)
    totals = point.state.totals if point.state else Totals()
    totals.resumed_at += (point.step,)
    totals.forced += tuple(found)
    return totals


def _carry_out_and_report(run: Run, totals: Totals, compared: Compared | None) -> RunRecord:
    try:
        with run.track:
            record = _carry_out(run, totals, compared)
    except BaseException as error:
        status: Literal["interrupted", "failed"] = (
            "interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed"
        )
        with suppress(TunesmithError):  # the first error is the one to show, not what it led to
            leave_report(run, make_record(run, totals, status))
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(str(run.folder), f"stopped after step {totals.steps}", _kept(run)) from error
        raise
    return record


def _carry_out(run: Run, totals: Totals, compared: Compared | None) -> RunRecord:
    run.track.emit(run_started(run))
    for notice in start_notices(run):
        run.track.emit(Notice(notice))
    checkpoints, heldout = run.config.checkpoints, run.parts.heldout
    before = list(run.resumed.state.answers_before) if run.resumed and run.resumed.state else []
    asked = (
        bool(checkpoints.eval_first or checkpoints.evaluation) if compared is None else compared.score_base
    )
    if heldout and asked and totals.before is None:
        is_fresh = run.parts.origin.name is None and base_is_without_adapter(run.parts.model)
        with without_fresh_adapter(run.parts.model, is_fresh=is_fresh):
            scored = _score(run, heldout, "Before")
            totals.before, before = scored.score, list(scored.answers)
    with stop_on_signals() as stop:
        _train(run, totals, before, stop)
        run.store.publish_best()
    if stop.signal_name:
        raise Interrupted(str(run.folder), f"{stop.signal_name} after step {totals.steps}", _kept(run))
    samples: tuple[SampleAnswer, ...] = ()
    if heldout:
        if compared is None and (score := _known_score(run, heldout)) is not None:
            totals.after = score
        else:
            best = _score_best(run, totals, heldout)
            totals.after, samples = best.score, make_samples(heldout.questions, before, best.answers)
            if compared is not None:
                write_heldout(run.folder / HELD_OUT, best, heldout.questions)
    record = make_record(run, totals, "finished", samples)
    run.track.emit(RunFinished(record))
    return record


def _known_score(run: Run, heldout: HeldOut) -> Score | None:
    """The checkpoint schedule may have taken this very loss of the best weights."""
    best = run.store.best()
    loss = read_manifest(best.path).eval_loss if best else None
    if loss is None or heldout is not run.parts.valid or heldout.questions:
        return None
    return Score(len(heldout.rows), loss, perplexity(loss))


def _score_best(run: Run, totals: Totals, heldout: HeldOut) -> Scored:
    best = run.store.best()
    if best is not None and best.step != totals.steps:
        restore(run.parts.model, run.parts.kind, best.path)
    return _score(run, heldout, "After")


def _kept(run: Run) -> str:
    best = run.store.best()
    return f"the best checkpoint is {best.path}" if best else "nothing had been saved yet"


def _train(run: Run, totals: Totals, before: Sequence[str], stop: StopRequest) -> None:
    parts, settings = run.parts, run.config.optimization
    optimizer = make_optimizer(parts, settings)
    if run.resumed is not None and run.resumed.checkpoint is not None:
        put_back(parts, optimizer, run.resumed.checkpoint)
    steps = steps_after(parts, settings, optimizer, totals.steps, run.started)
    if totals.seconds_to_first_step is None:
        totals.seconds_to_first_step = seconds_since_process_start()
    try:
        for event in steps:
            totals.add(event)
            run.track.emit(event)
            ends_epoch = event.step % parts.plan.steps_per_epoch == 0
            if _is_due(run, event.step) and not stop.signal_name:
                _evaluate(run, totals, stop)
            if ends_epoch:
                run.track.emit(totals.end_epoch())
            if _is_due(run, event.step) or stop.signal_name:
                _save(run, totals, optimizer, before)
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
        score = _score(run, valid, f"Step {totals.steps}", stop).score
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


def _save(run: Run, totals: Totals, optimizer: torch.optim.Optimizer, before: Sequence[str]) -> None:
    parts, evaluation = run.parts, totals.evaluation
    if not is_finite(parts.model):
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
            data=data_facts(parts),
            versions=versions(),
            created=datetime.now(UTC).isoformat(),
            parent=parts.origin.name,
            parent_adapter=parts.origin.adapter,
            parent_base=parts.origin.base,
            seed=run.config.optimization.seed,
            code_version=versions()["tunesmith"],
            environment=environment_of(parts) | {"micro-batch tokens": _budget(parts)},
            files=files,
        )

    def write(folder: Path) -> None:
        save_servable(parts.model, parts.kind, parts.text.tokenizer, folder, parts.text.base.model_id)
        (folder / TRAINING).mkdir()
        save_training_state(folder / TRAINING, named_trainable(parts.model), optimizer, kept_tensors(parts))
        seconds = totals.earlier_seconds + time.perf_counter() - run.started
        state = RunState(
            replace(totals, earlier_seconds=seconds), tuple(before), _budget(parts), environment_of(parts)
        )
        write_state(folder, state)

    saved = run.store.save(totals.steps, write, manifest, score)
    run.track.emit(CheckpointEvent(saved.step, str(saved.path), saved.is_best, saved.seconds))


def _budget(parts: Assembly) -> int | None:
    return parts.memory.token_budget if parts.memory else None


def _score(run: Run, heldout: HeldOut, label: str, stop: StopRequest | None = None) -> Scored:
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
