"""``tunesmith compare``: choose each arm's rate, train it with every seed, measure, say what the numbers allow."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.checkpoints.atomic import write_json, write_text
from tunesmith.checkpoints.lock import locked
from tunesmith.comparison.child import read_fault
from tunesmith.comparison.experiment import CompareOptions, Experiment, prepare
from tunesmith.comparison.markdown import comparison_markdown
from tunesmith.comparison.measure import SERVING, read_forgetting, read_serving
from tunesmith.comparison.progress import Pace, Watch, watching
from tunesmith.comparison.record import (
    FORMAT,
    Arm,
    BaseScore,
    ComparisonRecord,
    Estimate,
    Forgetting,
    RunEntry,
    SampleAnswers,
    Serving,
    Status,
    SweepPoint,
    to_json,
)
from tunesmith.comparison.summary import Trained, differences, summarise
from tunesmith.comparison.sweep import SweepResult, sweep
from tunesmith.comparison.trials import (
    ADAPTERS,
    Trial,
    entry_of,
    final_trial,
    finished,
    run_helper,
    sweep_trial,
    train,
)
from tunesmith.comparison.verdict import decide, undecided
from tunesmith.config.load import LoadedConfig
from tunesmith.errors import Interrupted, OutputError, TunesmithError
from tunesmith.tracking.environment import machine, versions
from tunesmith.tracking.events import RunRecord
from tunesmith.training.stop import terminate_as_interrupt

REPORT_JSON, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"
_RUNS = "runs"


@dataclass
class _State:
    """What is known so far."""

    created: str
    entries: list[RunEntry] = field(default_factory=list)
    sweeps: dict[str, SweepResult] = field(default_factory=dict)
    points: dict[str, list[SweepPoint]] = field(default_factory=dict)
    trained: dict[str, list[Trained]] = field(default_factory=dict)
    serving: dict[str, Serving] = field(default_factory=dict)
    forgetting: list[Forgetting] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    base: RunRecord | None = None
    steps_left: dict[str, float] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)


def compare(loaded: LoadedConfig, options: CompareOptions, console: Console) -> ComparisonRecord:
    """Compare the arms on the rows of a configuration, and leave ``report.json``, ``report.md`` and ``report.html``.

    What an earlier call has trained with the same settings on the same data is not trained again; what it left
    unfinished goes on.

    Raises:
        TunesmithError: any of its kinds; finished trainings are kept.
    """
    with terminate_as_interrupt(), ExitStack() as held:
        experiment = prepare(loaded, options, lambda text: console.print(text, markup=False, soft_wrap=True))
        try:
            experiment.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                str(experiment.folder), f"cannot be written ({error.strerror})", "name another with --output"
            ) from error
        held.enter_context(locked(experiment.folder))
        with watching(console) as watch:
            record = _Comparison(experiment, options, watch).carry_out()
        console.print(f"Report: {experiment.folder / REPORT_HTML}", markup=False, soft_wrap=True)
        return record


class _Comparison:
    """One comparison under way: what is to be done, and what is known so far."""

    def __init__(self, experiment: Experiment, options: CompareOptions, watch: Watch) -> None:
        self._experiment, self._options, self._watch = experiment, options, watch
        self._state = _State(datetime.now(UTC).isoformat(timespec="seconds"))
        for arm in experiment.arms:
            share = options.sweep_budget if len(experiment.rates[arm.name]) > 1 else 0.0
            self._state.steps_left[arm.name] = (share + len(experiment.seeds)) * experiment.full_steps

    def carry_out(self) -> ComparisonRecord:
        """From the first sweep to the last measurement."""
        try:
            for arm in self._experiment.arms:
                self._choose_rate(arm)
            for seed in self._experiment.seeds:
                for arm in self._experiment.arms:
                    self._train_final(arm, seed)
            self._measure_serving()
            self._measure_forgetting()
        except (KeyboardInterrupt, Interrupted) as error:
            self._write("interrupted")
            if isinstance(error, Interrupted):
                raise
            raise Interrupted(
                str(self._experiment.folder), "the comparison was stopped", "give the same command to go on"
            ) from error
        except TunesmithError:
            with suppress(TunesmithError):  # the first error is the one to show
                self._write("failed")
            raise
        return self._write("finished")

    # Trainings.

    def _choose_rate(self, arm: Arm) -> None:
        experiment, state = self._experiment, self._state

        def train_short(number: int, rate: float, steps: int) -> float | None:
            trial = sweep_trial(
                experiment.settings, arm, rate, experiment.seeds[0], steps, experiment.full_steps,
                experiment.train_rows, experiment.identity, number,
            )  # fmt: skip
            return self._trained(trial, score_base=False)[0].eval_loss

        def note(points: Any) -> None:
            state.points[arm.name] = list(points)
            self._write("running")

        before = state.steps_left[arm.name]
        state.sweeps[arm.name] = result = sweep(
            arm.name, experiment.rates[arm.name], experiment.full_steps, self._options.sweep_budget, train_short,
            note, grows=arm.name not in experiment.given_rates, possible=experiment.train_rows.steps_near,
        )  # fmt: skip
        final = len(experiment.seeds) * experiment.full_steps
        state.steps_left[arm.name] = min(before, final)
        if result.points:
            chosen = f"{result.learning_rate:g}" if result.learning_rate else "none: every run diverged"
            self._watch.say(f"{arm.label}: learning rate {chosen}")

    def _train_final(self, arm: Arm, seed: int) -> None:
        experiment, state = self._experiment, self._state
        rate = state.sweeps[arm.name].learning_rate
        if rate is None:
            return
        trial = final_trial(experiment.settings, arm, rate, seed, experiment.full_steps, experiment.identity)
        entry, record, folder = self._trained(trial, score_base=state.base is None)
        if record is None:
            return
        state.trained.setdefault(arm.name, []).append(Trained(entry, record, folder))
        if state.base is None and record.before is not None:
            state.base = record
        self._write("running")

    def _trained(self, trial: Trial, *, score_base: bool) -> tuple[RunEntry, RunRecord | None, Path]:
        """Train unless that has been done."""
        root, state = self._experiment.folder, self._state
        folder = root / _RUNS / trial.name
        fault = read_fault(folder)
        if finished(folder, trial) is None and not (fault and fault.is_final):
            self._watch.begin(_title(trial), trial.steps, state.pace.left(state.steps_left))
            train(
                trial,
                folder,
                skip_bad_rows=self._options.skip_bad_rows,
                score_base=score_base,
                adapters=root / ADAPTERS,
                on_step=self._watch.step,
            )
        entry, record = entry_of(trial, folder, root)
        state.entries.append(entry)
        if entry.wall_seconds is not None:
            state.pace.add(trial.arm.name, entry.wall_seconds, entry.steps)
        state.steps_left[trial.arm.name] = max(0.0, state.steps_left[trial.arm.name] - trial.steps)
        return entry, record, root / entry.folder

    # Measurements.

    def _measure_serving(self) -> None:
        for arm in self._experiment.arms:
            runs = self._state.trained.get(arm.name)
            if not runs:
                continue
            run = runs[0].folder
            if read_serving(run) is None:
                self._watch.begin(f"{arm.label}: serving", None, None)
                order = {
                    "checkpoint": str(run / "best"),
                    "base": self._experiment.base,
                    "output": str(run / SERVING),
                }
                self._helper("serving", order, f"{arm.label}: serving was not measured")
            found = read_serving(run)
            if found is not None:
                self._state.serving[arm.name] = found
            self._write("running")

    def _measure_forgetting(self) -> None:
        files = self._options.forgetting
        runs = [run for arm in self._experiment.arms for run in self._state.trained.get(arm.name, [])]
        missing = [run for run in runs if read_forgetting(run.folder, files) is None]
        if missing:
            self._watch.begin("forgetting: general text before and after", None, None)
            order = {
                "base": self._experiment.base,
                "runs": [(str(run.folder), run.entry.arm, run.entry.seed) for run in missing],
                "files": list(files),
            }
            self._helper("forgetting", order, "forgetting was not measured")
        for run in runs:
            self._state.forgetting += read_forgetting(run.folder, files) or ()

    def _helper(self, kind: str, order: dict[str, Any], failed: str) -> None:
        """A measurement that fails is said, and the comparison goes on without it."""
        folder = self._experiment.folder / "measurements"
        file = folder / f"{kind}.json"
        file.with_suffix(".fault").unlink(missing_ok=True)
        write_json(file, {"kind": kind, "order": order})
        if run_helper("tunesmith.comparison.measure", [str(file)], folder) != 0:
            why = f"see {folder / 'log.txt'}"
            if (fault := file.with_suffix(".fault")).is_file():
                why = str(json.loads(fault.read_text(encoding="utf-8"))["message"])
            self._state.faults.append(f"{failed}: {why}")

    # Reports.

    def _write(self, status: Status) -> ComparisonRecord:
        record = self._record(status)
        folder = self._experiment.folder
        write_text(folder / REPORT_JSON, to_json(record))
        write_text(folder / REPORT_MD, comparison_markdown(record))
        if status in ("finished", "failed"):
            from tunesmith.comparison.report_html import write_html  # its plots are slow to import

            write_html(record, folder / REPORT_HTML)
        return record

    def _record(self, status: Status) -> ComparisonRecord:
        experiment, options, state = self._experiment, self._options, self._state
        summaries = tuple(
            summarise(
                arm,
                state.trained.get(arm.name, []),
                [entry for entry in state.entries if entry.arm == arm.name],
                state.sweeps[arm.name].learning_rate,
                at_edge=state.sweeps[arm.name].at_edge,
                serving=state.serving.get(arm.name),
                price_per_hour=options.price_per_hour,
            )
            for arm in experiment.arms
            if arm.name in state.sweeps
        )
        found = differences(experiment.arms, state.trained)
        verdict = decide(experiment.arms, summaries, found, state.forgetting)
        first = next(iter(state.trained.values()), [None])[0]
        score = state.base.before if state.base else None
        return ComparisonRecord(
            format=FORMAT,
            name=experiment.folder.name,
            status=status,
            created=state.created,
            seconds=math.fsum(entry.wall_seconds or 0.0 for entry in state.entries),
            runs_done=len(state.entries),
            runs_planned=len(state.entries) + self._finals_left(status),
            model_id=str(experiment.settings["model_id"]),
            task=experiment.task,
            metric=experiment.metric,
            rows=experiment.rows,
            metric_rows=len(first.values.values) if first and experiment.metric else None,
            price_per_hour=options.price_per_hour,
            arms=experiment.arms,
            base=_base_score(score, experiment, first) if score else None,
            sweep=tuple(p for points in state.points.values() for p in points),
            runs=tuple(state.entries),
            summaries=summaries,
            differences=found,
            forgetting=tuple(state.forgetting),
            verdict=verdict or (undecided(experiment.arms, summaries) if status == "finished" else None),
            samples=self._samples(),
            settings=experiment.settings,
            options={
                "arms": [arm.name for arm in experiment.arms],
                "seeds": list(experiment.seeds),
                "learning_rates": {arm: list(rates) for arm, rates in experiment.rates.items()},
                "sweep_budget": options.sweep_budget,
                "forgetting": list(options.forgetting),
            },
            lineage={
                "base": experiment.base,
                "base_fingerprint": experiment.identity["base"],
                "data": experiment.data,
            },
            machine=machine(),
            versions=versions(),
            notes=tuple(self._notes()),
        )

    def _finals_left(self, status: Status) -> int:
        if status == "finished":
            return 0
        planned = len(self._experiment.arms) * len(self._experiment.seeds)
        return max(0, planned - sum(entry.purpose == "final" for entry in self._state.entries))

    def _samples(self) -> tuple[SampleAnswers, ...]:
        """The first held-out rows, whatever was answered: chosen ones would tell another story."""
        state = self._state
        runs = {arm: runs[0].values.shown for arm, runs in state.trained.items() if runs}
        if not runs:
            return ()
        base = {s.prompt: s.before for s in state.base.samples} if state.base else {}
        rows = next(iter(runs.values()))
        return tuple(
            SampleAnswers(
                row.prompt,
                row.expected,
                base.get(row.prompt),
                {arm: shown[index].answer for arm, shown in runs.items()},
            )
            for index, row in enumerate(rows)
        )

    def _notes(self) -> list[str]:
        experiment, state = self._experiment, self._state
        notes = list(state.faults)
        if experiment.is_selected_on:
            notes.append(
                "the compared rows also chose learning rate and checkpoint, which flatters every arm; "
                "evaluation.test_path names rows that choose nothing"
            )
        if experiment.rows == 1:
            notes.append("one held-out row: no interval says how another row would turn out")
        if len(experiment.seeds) == 1:
            notes.append(
                "one seed: intervals are over rows alone, and another seed may turn the result round"
            )
        for arm in experiment.arms:
            result = state.sweeps.get(arm.name)
            if result and result.at_edge:
                notes.append(
                    f"{arm.label}: the best rate stands at the edge of what was tried; a better one may lie beyond"
                )
            if result and result.learning_rate is None:
                notes.append(f"{arm.label}: no learning rate that was tried stayed finite to the end")
            elif result and _was_let_go(result):
                notes.append(
                    f"{arm.label}: the rates that were best after fewer steps diverged after more; "
                    f"{result.learning_rate:g} was chosen below them"
                )
        if len(experiment.arms) > 2:
            notes.append("intervals of differences are widened for the number of pairs (Bonferroni)")
        notes += trained_otherwise(
            [run.record for runs in state.trained.values() for run in runs], versions()
        )
        notes += scored_base_alone(experiment.arms, state.trained)
        diverged = [e for e in state.entries if e.purpose == "final" and e.status == "failed"]
        notes += [f"{e.arm}, seed {e.seed} failed: {e.fault}" for e in diverged]
        return notes


def _was_let_go(result: SweepResult) -> bool:
    last = max((point.round for point in result.points), default=0)
    return bool(result.points) and all(p.eval_loss is None for p in result.points if p.round == last)


def trained_otherwise(records: Sequence[RunRecord], now: Mapping[str, str]) -> list[str]:
    """Runs that an earlier call trained with other versions: their numbers may not be those of today."""
    changed = sorted(
        {
            f"{name} {old}, now {now[name]}"
            for record in records
            for name, old in record.versions.items()
            if name in now and now[name] != old
        }
    )
    if not changed:
        return []
    return [
        f"some runs were trained with other versions ({'; '.join(changed)}); a new folder trains all alike"
    ]


def scored_base_alone(arms: Sequence[Arm], trained: Mapping[str, Sequence[Trained]]) -> list[str]:
    """An arm whose only run scored the base too: its time and memory have that in them."""
    return [
        f"{arm.label}: its run scored the untuned base too, which its time a run, cost and peak memory include"
        for arm in arms
        if (runs := trained.get(arm.name)) and all(run.record.before is not None for run in runs)
    ]


def _base_score(score: Any, experiment: Experiment, first: Trained | None) -> BaseScore:
    if score.value is None:
        return BaseScore(score.loss, None)
    answered = len(first.values.values) if first else experiment.rows
    return BaseScore(score.loss, Estimate(score.value, score.interval, answered))


def _title(trial: Trial) -> str:
    part = "" if trial.purpose == "final" else f"sweep round {(trial.round or 0) + 1}, "
    return f"{trial.arm.label}: {part}rate {trial.learning_rate:g}, seed {trial.seed}"


def print_comparison(console: Console, record: ComparisonRecord) -> None:
    """The verdict."""
    if record.verdict is not None:
        console.print(record.verdict.headline, markup=False, soft_wrap=True, style="bold")
        for sentence in record.verdict.sentences:
            console.print(f"  {sentence}", markup=False, soft_wrap=True)
        for advice in record.verdict.advice:
            label = next((arm.label for arm in record.arms if arm.name == advice.arm), "not shown")
            console.print(f"  {advice.use}: {label} ({advice.reason})", markup=False, soft_wrap=True)
    for note in record.notes:
        console.print(f"  Note: {note}", markup=False, soft_wrap=True)
