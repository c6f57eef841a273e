"""What a fine-tuning run is, from a configuration to a record: read it from top to bottom.

This module and ``cli`` are the only ones that unpack a configuration.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text

from tunesmith.assembly import Assembly, Say, assemble
from tunesmith.checkpoints.atomic import flush
from tunesmith.checkpoints.locate import run_status
from tunesmith.checkpoints.lock import locked
from tunesmith.checkpoints.manifest import FORMAT, BaseWeights, FileStamp, Manifest, read_manifest
from tunesmith.checkpoints.signature import check_keys
from tunesmith.checkpoints.store import BEST, TRAINING, newest_checkpoint
from tunesmith.config.load import LoadedConfig
from tunesmith.config.schema import LoraMethod, RunConfig
from tunesmith.errors import Interrupted, NonFiniteError, TunesmithError
from tunesmith.evaluation.heldout import perplexity
from tunesmith.evaluation.heldout_file import HELD_OUT, write_heldout
from tunesmith.evaluation.score import HeldOut, Scored, score_heldout
from tunesmith.models.lora import without_fresh_adapter
from tunesmith.models.method import base_is_without_adapter, is_finite, save_servable, servable_tensors
from tunesmith.models.passes import unasked
from tunesmith.paths import expanded
from tunesmith.resuming import (
    ResumePoint,
    differences,
    find_run_folder,
    moved,
    other_settings,
    refuse,
    resume_point,
    unfinished_run,
    with_step_of,
)
from tunesmith.run_open import base_weights, open_run
from tunesmith.run_record import Run, data_facts, make_record, make_samples, run_started, start_notices
from tunesmith.run_result import command_line, forward_best, leave_report, print_ways_on
from tunesmith.run_state import RunState, environment_of, write_state
from tunesmith.run_steps import kept_tensors, make_optimizer, put_back, put_back_weights, steps_after
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
from tunesmith.training.state import named_trainable, save_training_state, training_tensors
from tunesmith.training.stop import StopRequest, StopRequested, stop_on_signals, terminate_as_interrupt
from tunesmith.training.workers import ALONE, Workers, on_first


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
    """Fine-tune as the configuration says: in this process, or with ``num_devices`` above 1 by workers of a cluster.

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
    options = RunOptions(skip_bad_rows, resume, force_resume, compared)
    check_keys()
    if loaded.config.cluster.num_devices > 1:
        from tunesmith.cluster.driver import finetune_on_cluster

        return finetune_on_cluster(loaded, console, options)
    return carry_out(loaded, console, options)


@dataclass(frozen=True)
class RunOptions:
    """What ``finetune`` is asked for beside the configuration; see there."""

    skip_bad_rows: bool = False
    resume: str | None = None
    force_resume: bool = False
    compared: Compared | None = None


def carry_out(
    given: LoadedConfig,
    console: Console,
    options: RunOptions,
    workers: Workers = ALONE,
    stop: StopRequest | None = None,
    opened: Callable[[Path], None] = lambda _folder: None,
) -> RunRecord:
    """The run itself, or one worker's part in it: all go the same way, the first alone writes and reports.

    Args:
        workers: who trains together, this process among them.
        stop: set by whoever wants the run to stop, beside the signals of this process.
        opened: told the run's folder as soon as there is one.
    """
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with terminate_as_interrupt(), memory_errors(_lighter(given.config)), ExitStack() as held:
        point, loaded = on_first(workers, lambda: _resumed(given, options, held, say))
        budget = point.state.token_budget if point and point.state else None
        parts = assemble(
            loaded, skip_bad_rows=options.skip_bad_rows, say=say, token_budget=budget, workers=workers
        )
        base = on_first(workers, lambda: base_weights(parts.text.base))
        point, totals = on_first(
            workers, lambda: _begin(point, loaded, parts, base, force_resume=options.force_resume)
        )
        run = open_run(loaded, parts, base, console, started, point, held, workers)
        opened(run.folder)
        record = _carry_out_and_report(run, totals, options.compared, stop)
        if workers.rank == 0:
            with _interruptions_told(run, totals):
                _hand_on(run, record, totals, console)
    return record


def _hand_on(run: Run, record: RunRecord, totals: Totals, console: Console) -> None:
    """Forward the best checkpoint, then report: what ends before the report is done when the run is resumed."""
    try:
        note = forward_best(run)
    except KeyboardInterrupt:
        leave_report(run, make_record(run, totals, "interrupted"))
        raise
    except Exception:  # such as a full disk: what is left to do is done when the run is resumed
        leave_report(run, replace(record, status="failed"))
        print_summary(console, record)
        raise
    leave_report(run, record)
    print_summary(console, record)
    if note:
        console.print(Text(note), soft_wrap=True)
    print_ways_on(run, console)


def _lighter(config: RunConfig) -> str:
    """What may be changed where memory does not suffice: only what the run does not have already."""
    changes = ["lower context_length"]
    if not config.model.gradient_checkpointing:
        changes.append("set gradient_checkpointing")
    if not isinstance(config.method, LoraMethod):
        changes.append("train with lora_config")
    return ", ".join([*changes, "or take a smaller model"])


def _resumed(
    loaded: LoadedConfig, options: RunOptions, held: ExitStack, say: Say
) -> tuple[ResumePoint | None, LoadedConfig]:
    """Where to go on, and with which settings; the folder is locked until ``held`` is closed."""
    folder = _folder_to_resume(loaded, options.resume, say)
    if folder is None:
        return None, loaded
    held.enter_context(locked(folder))
    point, loaded = resume_point(folder), with_step_of(folder, loaded)
    if not options.force_resume:
        refuse(folder, other_settings(point, loaded.resolved()))
    return point, loaded


def _folder_to_resume(loaded: LoadedConfig, resume: str | None, say: Say) -> Path | None:
    output_dir = expanded(loaded.config.output.output_dir)
    if resume == "auto":
        return unfinished_run(output_dir, loaded.resolved(), say)
    return find_run_folder(resume, output_dir) if resume is not None else None


def _begin(
    point: ResumePoint | None, loaded: LoadedConfig, parts: Assembly, base: BaseWeights, *, force_resume: bool
) -> tuple[ResumePoint | None, Totals]:
    """Where counting begins. Raises ConfigError where the run cannot go on to the same bits and must."""
    if point is None:
        return None, Totals()
    found = differences(
        point,
        loaded.resolved(),
        data_facts(parts),
        base,
        environment_of(parts),
        _budget(parts),
        may_move=True,
    )
    if not force_resume:
        refuse(point.folder, found)
    totals = point.state.totals if point.state else Totals()
    totals.resumed_at += (point.step,)
    totals.forced += tuple(found)
    if (notice := moved(point, environment_of(parts))) is not None:
        point = replace(point, notices=(*point.notices, notice))
    return point, totals


def _carry_out_and_report(
    run: Run, totals: Totals, compared: Compared | None, stop: StopRequest | None
) -> RunRecord:
    with _interruptions_told(run, totals):
        try:
            with run.track:
                return _carry_out(run, totals, compared, stop)
        except BaseException as error:
            status: Literal["interrupted", "failed"] = (
                "interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed"
            )
            with suppress(TunesmithError):  # the first error is the one to show, not what it led to
                if run.workers.rank == 0:
                    leave_report(run, make_record(run, totals, status))
            raise


@contextmanager
def _interruptions_told(run: Run, totals: Totals) -> Iterator[None]:
    """Within the block a KeyboardInterrupt becomes an Interrupted, which says where the run is and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(str(run.folder), f"stopped after step {totals.steps}", _kept(run)) from error


def _carry_out(
    run: Run, totals: Totals, compared: Compared | None, asked_to_stop: StopRequest | None
) -> RunRecord:
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
        # Switching an adapter off says of its tensors that they are not trained, and of a split model that stays.
        is_fresh = is_fresh and not run.workers.in_step
        with without_fresh_adapter(run.parts.model, is_fresh=is_fresh):
            scored = _score(run, heldout, "Before")
            totals.before, before = scored.score, list(scored.answers)
    with stop_on_signals(asked_to_stop) as stop:
        stopped = _train(run, totals, before, stop)
        on_first(run.workers, lambda: _publish(run, stopped=stopped))
    # A signal that came after the last step stops the run too: what follows is to be done when it is resumed.
    if stopped or run.workers.agree(bool(stop.signal_name)):
        signal_name = next(filter(None, run.workers.gather(stop.signal_name)), "stopped")
        raise Interrupted(str(run.folder), f"{signal_name} after step {totals.steps}", _kept(run))
    samples: tuple[SampleAnswer, ...] = ()
    if heldout:
        if compared is None and (score := _known_score(run, heldout)) is not None:
            totals.after = score
        else:
            best = _score_best(run, totals, heldout)
            known = (
                before if len(before) == len(best.answers) else []
            )  # --force-resume may have let other rows in
            totals.after, samples = best.score, make_samples(heldout.questions, known, best.answers)
            if compared is not None and run.workers.rank == 0:
                write_heldout(run.folder / HELD_OUT, best, heldout.questions)
    record = on_first(run.workers, lambda: make_record(run, totals, "finished", samples))
    run.track.emit(RunFinished(record))
    return record


def _publish(run: Run, *, stopped: bool) -> None:
    if not stopped or run.store.best() is not None:  # a run may be stopped within its first step
        run.store.publish_best()


def _known_score(run: Run, heldout: HeldOut) -> Score | None:
    """The checkpoint schedule may have taken this very loss of the best weights."""

    def eval_loss() -> float | None:
        best = run.store.best()
        return read_manifest(best.path).eval_loss if best else None

    loss = on_first(run.workers, eval_loss)
    if loss is None or heldout is not run.parts.valid or heldout.questions:
        return None
    return Score(len(heldout.rows), loss, perplexity(loss))


def _score_best(run: Run, totals: Totals, heldout: HeldOut) -> Scored:

    def other_best() -> Path | None:
        best = run.store.best()
        # Its published copy, which was compared with its manifest just now.
        return None if best is None or best.step == totals.steps else run.folder / BEST

    if (best := on_first(run.workers, other_best)) is not None:
        put_back_weights(run.parts, best, run.workers)
    return _score(run, heldout, "After")


def _kept(run: Run) -> str:
    if run.workers.rank:
        return ""  # the first worker's words are those that are shown
    go_on = f"go on with: {command_line('finetune', '--resume', str(run.folder))}"
    if run_status(run.folder) == "finished":
        return f"all of it was done, see {run.folder / 'report.md'}"
    last, best = newest_checkpoint(run.folder), run.store.best()
    if last is None or best is None:
        return f"nothing had been saved yet; {go_on}"
    return f"saved is {last.name}, the best checkpoint is {best.path}; {go_on}"


def _train(run: Run, totals: Totals, before: Sequence[str], stop: StopRequest) -> bool:
    """Train to the end, or until a worker is asked to stop: then True. All stop after the same step.

    A process alone does not finish a step that takes long: what is saved then is the state after the step before.
    """
    parts, settings, workers = run.parts, run.config.optimization, run.workers
    optimizer = make_optimizer(parts, settings)
    checkpoint = run.resumed.checkpoint if run.resumed else None
    if checkpoint is not None:
        put_back(parts, optimizer, checkpoint, workers)
    saved = totals.steps
    check = stop.check_step if workers.world == 1 else unasked  # several can agree only between steps
    steps = steps_after(parts, settings, optimizer, saved, run.started, workers, check)
    if totals.seconds_to_first_step is None:
        totals.seconds_to_first_step = seconds_since_process_start()
    try:
        if _evaluation_was_missed(run, totals) and _evaluate(run, totals, stop):
            _save(run, totals, optimizer, before)
        for event in steps:
            totals.add(event)
            run.track.emit(event)
            ends_epoch = event.step % parts.plan.steps_per_epoch == 0
            is_due = _is_due(run, event.step)
            if is_due and not workers.agree(bool(stop.signal_name)):
                _evaluate(run, totals, stop)
            if ends_epoch:
                run.track.emit(totals.end_epoch())
            stopping = workers.agree(bool(stop.signal_name))
            if is_due or stopping:
                _save(run, totals, optimizer, before)
                saved = totals.steps
                # A signal that came while saving needs no further step.
                if stopping or workers.agree(bool(stop.signal_name)):
                    return True
        return False
    except StopRequested:  # within a step, which is done again when the run is resumed
        if totals.steps > saved:
            _save(run, totals, optimizer, before)
        return True
    except NonFiniteError as error:
        best = run.store.best() if workers.rank == 0 else None
        kept = f"; the last good checkpoint is {best.path}" if best else ""
        raise NonFiniteError(error.place, error.fault, error.remedy + kept) from error


def _is_due(run: Run, step: int) -> bool:
    plan, schedule = run.parts.plan, run.config.checkpoints.checkpoint_and_evaluation_frequency
    every = schedule.frequency * (plan.steps_per_epoch if schedule.unit == "epochs" else 1)
    return step % every == 0 or step == plan.total_steps


def _evaluation_was_missed(run: Run, totals: Totals) -> bool:
    """Whether the process before this one was stopped when the checkpoint it left should have been evaluated."""
    if totals.steps == 0 or run.parts.valid is None or not _is_due(run, totals.steps):
        return False
    return totals.evaluation is None or totals.evaluation.step != totals.steps


def _evaluate(run: Run, totals: Totals, stop: StopRequest) -> bool:
    """Whether there is an evaluation of this step now."""
    valid = run.parts.valid
    if valid is None:
        return False
    begun = time.perf_counter()
    try:
        score = _score(run, valid, f"Step {totals.steps}", stop).score
    except StopRequested:
        return False
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
    return True


def _save(run: Run, totals: Totals, optimizer: torch.optim.Optimizer, before: Sequence[str]) -> None:
    """By the first worker. The others wait, so that none is ahead of what can be lost."""
    parts, workers = run.parts, run.workers
    if workers.agree(not is_finite(parts.model)):
        raise NonFiniteError(f"step {totals.steps}", "a trained weight is not finite", "lower learning_rate")
    served = workers.whole(servable_tensors(parts.model, parts.kind))
    kept = workers.whole(training_tensors(named_trainable(parts.model), optimizer, kept_tensors(parts)))
    on_first(workers, lambda: _save_here(run, totals, before, served, kept))


def _save_here(
    run: Run,
    totals: Totals,
    before: Sequence[str],
    served: Mapping[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor],
) -> None:
    parts, evaluation = run.parts, totals.evaluation
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
        model_id = parts.text.base.model_id
        (folder / TRAINING).mkdir()
        # Copying into the system's file cache keeps a processor busy: two take as long as the larger file does.
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(save_training_state, folder / TRAINING, kept)
            save_servable(parts.model, parts.kind, parts.text.tokenizer, folder, model_id, served)
            training.result()
        seconds = totals.earlier_seconds + time.perf_counter() - run.started
        state = RunState(
            replace(totals, earlier_seconds=seconds), tuple(before), _budget(parts), environment_of(parts)
        )
        write_state(folder, state)

    # First, so that after a loss of power no checkpoint is ahead of the figures of its steps.
    flush(run.folder / "metrics.jsonl")
    saved = run.store.save(totals.steps, write, manifest, score)
    run.track.emit(CheckpointEvent(saved.step, str(saved.path), saved.is_best, saved.seconds))


def _budget(parts: Assembly) -> int | None:
    return parts.memory.token_budget if parts.memory else None


def _score(run: Run, heldout: HeldOut, label: str, stop: StopRequest | None = None) -> Scored:
    # Several workers go on until they can agree.
    check = stop.check if stop is not None and run.workers.world == 1 else unasked
    return score_heldout(
        run.parts.model,
        run.parts.passes,
        run.parts.text.tokenizer,
        heldout,
        run.parts.stops,
        micro_batches=run.parts.eval_batches,
        seed=run.config.optimization.seed,
        label=label,
        workers=run.workers,
        on_progress=lambda what, done, total: run.track.emit(Progress(what, done, total)),
        check=check,
    )
