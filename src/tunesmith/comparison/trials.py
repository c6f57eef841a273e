"""The trainings of a comparison: settings of each, the folder it is kept in, and running it once and never again."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.checkpoints.atomic import write_text
from tunesmith.checkpoints.locate import run_status
from tunesmith.checkpoints.lock import is_locked
from tunesmith.checkpoints.store import CHECKPOINTS
from tunesmith.comparison.child import Order, read_fault, write_order
from tunesmith.comparison.record import Arm, LossPoint, RunEntry
from tunesmith.config.yaml_file import dump_yaml
from tunesmith.errors import Interrupted, RunError
from tunesmith.evaluation.heldout_file import HELD_OUT, read_heldout
from tunesmith.tracking.events import RunRecord
from tunesmith.tracking.formats import duration
from tunesmith.tracking.jsonl import read_events
from tunesmith.tracking.report import read_record

# Settings that say where results go; data files are compared by content.
_FREE = (
    "output_dir", "logger", "custom_model_tag", "forward_checkpoint_config", "num_checkpoints_to_keep",
    "train_path", "valid_path",
)  # fmt: skip
_CURVE_POINTS = 200
_POLL_SECONDS = 0.2
_ORPHAN_SECONDS = 1800.0  # far more than a step and a checkpoint take
_SLUG_CHARACTERS = 48  # of up to four bytes; a name in a folder may have 255
ADAPTERS = "adapters"


@dataclass(frozen=True)
class Trial:
    """One training, not yet done.

    Attributes:
        key: digest of all that decides its result; the end of the name of its folder.
        settings: as in a configuration file; where results go is added by ``train``.
        steps: optimizer steps it will take.
    """

    key: str
    arm: Arm
    purpose: Literal["sweep", "final"]
    round: int | None
    learning_rate: float
    seed: int
    settings: Mapping[str, Any]
    steps: int

    @property
    def name(self) -> str:
        """For people and as a folder: ``lora-r16-1e-04-seed42-1a2b3c4d``."""
        rate = f"{self.learning_rate:.1e}".replace(".0e", "e")
        part = "" if self.purpose == "final" else f"-round{self.round}"
        return f"{slug(self.arm.name)}-{rate}-seed{self.seed}{part}-{self.key[:8]}"


def slug(name: str) -> str:
    """``lora:r=16`` as part of a file's name; letters of any script stay, all else becomes a hyphen."""
    found = re.sub(r"[\W_]+", "-", name).strip("-") or "unnamed"
    if len(found) <= _SLUG_CHARACTERS:
        return found
    digest = hashlib.sha256(found.encode()).hexdigest()[:8]  # the end may be all in which two names differ
    return f"{found[: _SLUG_CHARACTERS - 9].rstrip('-')}-{digest}"


def final_trial(
    base: Mapping[str, Any], arm: Arm, rate: float, seed: int, steps: int, identity: Mapping[str, Any]
) -> Trial:
    """A run as the configuration has it, by ``arm``.

    Args:
        base: the configuration, resolved.
        identity: digests of data, base weights and, where there is one, of what the DeepSpeed file says.
    """
    settings = _of_arm(base, arm, rate, seed)
    return Trial(_key(settings, identity), arm, "final", None, rate, seed, settings, steps)


def sweep_trial(
    base: Mapping[str, Any],
    arm: Arm,
    rate: float,
    seed: int,
    steps: int,
    full_steps: int,
    rows: "TrainRows",
    identity: Mapping[str, Any],
    round_number: int,
) -> Trial:
    """A shortened run that only takes the eval loss, at its end.

    Warm-up is shortened as the run is, so that the shape of the schedule stays.
    """
    path, epochs, count = rows.for_steps(steps)
    steps = rows.steps_near(steps)
    share = steps / full_steps
    settings = _of_arm(base, arm, rate, seed) | {
        "train_path": path,
        "num_epochs": epochs,
        "num_warmup_steps": math.ceil(base["num_warmup_steps"] * share),
        "evaluation": None,
        "best_metric": "eval_loss",
        "eval_first": False,
        "logger": None,
        "checkpoint_and_evaluation_frequency": {"unit": "epochs", "frequency": epochs},
        "num_checkpoints_to_keep": 1,
    }
    key = _key(settings, {**identity, "train_rows": count})
    return Trial(key, arm, "sweep", round_number, rate, seed, settings, steps)


@dataclass(frozen=True)
class TrainRows:
    """How the training rows are shortened: ``subset(n)`` is a file with ``n`` of them, drawn by chance."""

    path: str
    count: int
    rows_per_step: int
    subset: Callable[[int], str]

    def for_steps(self, steps: int) -> tuple[str, int, int]:
        """(file, epochs, rows) for about ``steps`` steps: part of one epoch, or whole ones."""
        if steps < self._of_epoch:
            wanted = steps * self.rows_per_step
            return self.subset(wanted), 1, wanted
        return self.path, round(steps / self._of_epoch), self.count

    def steps_near(self, steps: int) -> int:
        """How many steps a training for about ``steps`` takes."""
        if steps < self._of_epoch:
            return steps
        return round(steps / self._of_epoch) * self._of_epoch

    @property
    def _of_epoch(self) -> int:
        return math.ceil(self.count / self.rows_per_step)


def _of_arm(base: Mapping[str, Any], arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    settings = {key: value for key, value in base.items() if key != "lora_config"}
    if arm.lora_config is not None:
        settings["lora_config"] = dict(arm.lora_config)
    return settings | {"learning_rate": rate, "seed": seed}


def _key(settings: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    decides = {name: value for name, value in settings.items() if name not in _FREE}
    if decides.get("evaluation"):
        decides["evaluation"] = {k: v for k, v in decides["evaluation"].items() if k != "test_path"}
    if decides.get("deepspeed"):  # known by what the file says, wherever it lies: see ``identity``
        decides["deepspeed"] = "by content"
    text = json.dumps([decides, identity], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# What a trial has left.


def run_folder(folder: Path) -> Path | None:
    """The finished run in the folder of a trial."""
    for report in sorted(folder.glob("*/report.json")):
        if run_status(report.parent) == "finished":
            return report.parent
    return None


def finished(folder: Path, trial: Trial) -> Path | None:
    """The run in ``folder`` if all is there that the comparison needs of it."""
    run = run_folder(folder)
    if run is None or (trial.purpose == "final" and not (run / HELD_OUT).is_file()):
        return None
    return run


def entry_of(trial: Trial, folder: Path, root: Path) -> tuple[RunEntry, RunRecord | None]:
    """What is told of a trial that is done: finished, or failed for good."""
    run = finished(folder, trial)
    fault = _fault_of(trial, folder, run)
    record = read_record(run / "report.json") if run and fault is None else None
    events = read_events(run / "metrics.jsonl") if run else []
    score = record.after if record else None
    loss = score.loss if score else record.eval_loss if record else None
    steps_per_epoch = max(1, record.steps // record.epochs) if record else 1
    train_seconds = sum(e["train_time_per_step"] for e in events if e["event"] == "step")
    entry = RunEntry(
        key=trial.key,
        arm=trial.arm.name,
        purpose=trial.purpose,
        round=trial.round,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        status="finished" if record else "failed",
        folder=str((run or folder).relative_to(root)),
        steps=record.steps if record else 0,
        eval_loss=_finite(loss),
        metric_value=_finite(score.value) if score else None,
        wall_seconds=record.wall_seconds if record else None,
        training_seconds=train_seconds if record else None,
        tokens_per_second=_finite(record.real_tokens_per_second) if record else None,
        peak_memory_bytes=record.peak_rss_bytes if record else None,
        train_curve=_thinned(
            LossPoint(e["step"], e["step"] / steps_per_epoch, e["train_loss_batch"])
            for e in events
            if e["event"] == "step" and math.isfinite(e["train_loss_batch"])
        ),
        eval_curve=tuple(
            LossPoint(e["step"], float(e["epoch"]), e["eval_loss"])
            for e in events
            if e["event"] == "eval" and math.isfinite(e["eval_loss"])
        ),
        fault=fault,
    )
    return entry, record


def _fault_of(trial: Trial, folder: Path, run: Path | None) -> str | None:
    """Why a trial has no numbers. A run may end well and still not be comparable: a row's loss is no number."""
    if run is None:
        fault = read_fault(folder)
        return fault.message if fault else None
    if trial.purpose == "sweep":
        return None
    losses = read_heldout(run / HELD_OUT)
    if not losses.not_finite:
        return None
    return f"the loss on {losses.not_finite:,} of {len(losses.losses):,} held-out rows is not finite"


def _thinned(points: Any) -> tuple[LossPoint, ...]:
    """At most 200 points: means over neighbouring steps, so that no step is passed over."""
    points = list(points)
    width = max(1, math.ceil(len(points) / _CURVE_POINTS))
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return tuple(
        LossPoint(group[-1].step, group[-1].epoch, math.fsum(p.loss for p in group) / len(group))
        for group in groups
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# Doing it.


def train(
    trial: Trial,
    folder: Path,
    *,
    skip_bad_rows: bool,
    score_base: bool,
    adapters: Path,
    on_step: Callable[[int], None],
) -> None:
    """Carry out a trial in a child process, or go on with it; on return it is finished or has failed for good.

    Args:
        folder: of the trial; made where it is new.
        score_base: whether this run scores the base too.
        adapters: where the adapters of final runs are copied to, for the server.
        on_step: told the steps done, now and then.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the child has saved its last step.
        RunError: it could not be trained, or another process still trains it; another try may help.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _wait_for_orphan(folder)
    final = trial.purpose == "final"
    places = {
        "output_dir": str(folder),
        "custom_model_tag": f"{slug(trial.arm.name)}-seed{trial.seed}" if final else None,
        "forward_checkpoint_config": {"tag": None, "remote_uri": str(adapters if final else folder)},
    }
    write_text(folder / "settings.yaml", dump_yaml({**trial.settings, **places}))
    write_order(folder, Order(skip_bad_rows, final, score_base))
    environment = dict(os.environ)
    if not final:
        environment.pop("WANDB_API_KEY", None)  # a tracker is for the runs that count
    code = _run_child(
        [sys.executable, "-m", "tunesmith.comparison.child", str(folder)], folder, environment, on_step
    )
    fault = read_fault(folder)
    if code == Interrupted.exit_code:
        raise Interrupted(str(folder), "the training was stopped", "give the same command to go on")
    if finished(folder, trial) is None and not (fault and fault.is_final):
        log = folder / "log.txt"
        raise RunError(
            trial.name,
            fault.message if fault else ended(code),
            f"see {log}; the same command goes on from here",
        )
    _prune(folder, trial)


def _wait_for_orphan(folder: Path) -> None:
    """Let a child whose parent was killed save its last step; one that hangs is not waited for for ever."""
    until = time.monotonic() + _ORPHAN_SECONDS
    while is_locked(folder):
        if time.monotonic() > until:
            raise RunError(
                str(folder),
                f"another process has trained there for {duration(_ORPHAN_SECONDS)}, and does not end",
                "end it, then give the same command",
            )
        time.sleep(_POLL_SECONDS)


def ended(code: int) -> str:
    """Why a child may have ended that left no word of its own."""
    if code == -signal.SIGKILL:
        return "its process was killed, as a system does that runs out of memory"
    if code < 0:
        return f"its process was ended by signal {-code}"
    return f"the training ended with exit code {code}"


def run_helper(module: str, arguments: Sequence[str], folder: Path) -> int:
    """``python -m MODULE ARGUMENTS`` with its output in ``folder/log.txt``; the exit code.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    return _run_child([sys.executable, "-m", module, *arguments], folder, dict(os.environ), lambda _: None)


def _run_child(
    command: list[str], folder: Path, environment: Mapping[str, str], on_step: Callable[[int], None]
) -> int:
    with (folder / "log.txt").open("ab") as log:
        # A session of its own: Ctrl-C in a terminal would otherwise reach it twice, and twice means at once.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            while (code := _wait(child)) is None:
                on_step(_steps_done(folder))
        except KeyboardInterrupt:
            child.terminate()
            try:
                child.wait()
            except KeyboardInterrupt:
                child.kill()
                child.wait()
            raise Interrupted(
                str(folder), "the comparison was stopped", "give the same command to go on"
            ) from None
        finally:
            if child.stdin is not None:
                child.stdin.close()
    return code


def _wait(child: "subprocess.Popen[bytes]") -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return child.wait(_POLL_SECONDS)
    return None


def _steps_done(folder: Path) -> int:
    done = 0
    for file in folder.glob("*/metrics.jsonl"):
        with suppress(OSError, ValueError):
            size = file.stat().st_size
            with file.open("rb") as stream:
                stream.seek(max(0, size - 4096))
                tail = stream.read()
            found = re.findall(rb'"event": "step", "step": (\d+)', tail)
            done = max(done, int(found[-1]) if found else 0)
    return done


def _prune(folder: Path, trial: Trial) -> None:
    """A finished run is never resumed: its training state goes; of a sweep's run the weights too."""
    run = run_folder(folder)
    if run is None:
        return
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    if trial.purpose == "sweep":
        shutil.rmtree(run / "best", ignore_errors=True)
        shutil.rmtree(folder / "lora_fine_tuning", ignore_errors=True)
