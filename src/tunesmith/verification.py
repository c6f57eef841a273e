"""``tunesmith verify``: is what lies on the disk what was saved, and does the run give the same bits again?"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from tunesmith.assembly import Assembly, assemble
from tunesmith.checkpoints.lock import locked
from tunesmith.checkpoints.manifest import Manifest, read_manifest, verify
from tunesmith.checkpoints.store import BEST, TRAINING, checkpoints_newest_first
from tunesmith.config.load import load_config
from tunesmith.errors import CheckpointError, RunError, UserError
from tunesmith.resuming import ResumePoint, differences
from tunesmith.run_open import base_weights
from tunesmith.run_record import data_facts
from tunesmith.run_state import RunState, environment_of, read_state
from tunesmith.run_steps import make_optimizer, put_back, steps_after
from tunesmith.tracking.jsonl import read_events
from tunesmith.training.memory_errors import memory_errors
from tunesmith.training.state import STATE_NAME, named_trainable

Say = Callable[[str], None]


@dataclass(frozen=True)
class Proof:
    """What was shown.

    Attributes:
        verified: checkpoint folders, every file of which has the SHA-256 that was saved.
        first, last: steps that were computed again; equal in loss and gradient norm to the last bit.
        tensors: trained tensors and moments that were compared with a checkpoint, bit by bit; 0: the stretch ends at
            none.
    """

    run: str
    verified: tuple[str, ...]
    first: int
    last: int
    tensors: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


def verify_run(folder: Path, steps: int, say: Say) -> Proof:
    """Check every hash of the run in ``folder``, and compute ``steps`` of its steps again.

    The stretch begins at the last checkpoint before the final one that can be trained on, else at the start of the run.
    It ends at the final checkpoint where that is not further than ``steps``.

    Raises:
        CheckpointError: a file is not the one that was saved.
        UserError: there is nothing to compare with, or this machine would give other bits anyway.
        RunError: a step gave other bits; the message names the first.
    """
    begun = time.perf_counter()
    with ExitStack() as held:
        held.enter_context(locked(folder))
        held.enter_context(memory_errors())
        checkpoints = _verified(folder, say)
        final_path, final = checkpoints[0]
        state = read_state(final_path)
        start = next(((path, found) for path, found in checkpoints[1:] if found.step < final.step), None)
        loaded = load_config(str(folder / "config.yaml"), settled=True)
        parts = assemble(loaded, skip_bad_rows=True, say=say, token_budget=state.token_budget)
        _refuse_other_bits(folder, final_path, final, state, loaded.resolved(), parts)
        settings, done = loaded.config.optimization, start[1].step if start else 0
        last = min(final.step, done + steps)
        optimizer = make_optimizer(parts, settings)
        if start is not None:
            put_back(parts, optimizer, start[0])
        recorded = _recorded(folder)
        say(
            f"computing steps {done + 1} to {last} again, from {start[0] if start else 'the start of the run'}"
        )
        for event in steps_after(parts, settings, optimizer, done, begun):
            _compare_step(folder, recorded, event.step, event.train_loss_batch, event.grad_norm)
            if event.step == last:
                break
        tensors = _compare_tensors(parts, optimizer, final_path) if last == final.step else 0
    verified = [str(path) for path, _ in checkpoints]
    if (folder / BEST).is_dir():
        verified.append(str(folder / BEST))
    return Proof(folder.name, tuple(verified), done + 1, last, tensors, time.perf_counter() - begun)


def print_proof(console: Console, proof: Proof) -> None:
    """What was proved, and no more."""
    folders = f"{len(proof.verified)} folder{'s' if len(proof.verified) > 1 else ''}"
    console.print(Text(f"{folders}: every file has the SHA-256 that was saved"), style="green")
    stretch = f"steps {proof.first} to {proof.last} were computed again"
    console.print(Text(f"{stretch}: losses and gradient norms are equal to the last bit"), style="green")
    if proof.tensors:
        what = f"{proof.tensors} trained tensors and moments are those of the final checkpoint, bit by bit"
        console.print(Text(what), style="green")
    else:
        console.print(
            Text("the stretch ends before the final checkpoint: give --steps to go on to it"), style="dim"
        )
    console.print(Text(f"{proof.seconds:.0f} s, on this machine with these packages"), style="dim")


def _verified(folder: Path, say: Say) -> list[tuple[Path, Manifest]]:
    damaged: list[str] = []
    checkpoints = checkpoints_newest_first(folder, damaged)
    if damaged:
        raise CheckpointError(str(folder), damaged[0].removeprefix("passed over: "), "")
    if not checkpoints:
        raise UserError(str(folder), "has no checkpoint yet", "wait for its first one")
    for path in (*(path for path, _ in checkpoints), folder / BEST):
        if path.is_dir():
            verify(path)
            say(f"verified {path}: {len(read_manifest(path).files)} files")
    return sorted(checkpoints, key=lambda item: -item[1].step)


def _refuse_other_bits(
    folder: Path,
    path: Path,
    manifest: Manifest,
    state: RunState,
    resolved: Mapping[str, Any],
    parts: Assembly,
) -> None:
    point = ResumePoint(folder, path, manifest, state)
    budget = parts.memory.token_budget if parts.memory else None
    base = base_weights(parts.text.base)
    found = differences(point, resolved, data_facts(parts), base, environment_of(parts), budget)
    if found:
        fault = (
            f"its files are as they were saved, but its steps would have other bits here: {'; '.join(found)}"
        )
        raise UserError(str(folder), fault, "verify it where and as it was trained")


def _recorded(folder: Path) -> dict[int, tuple[float, float]]:
    events = read_events(folder / "metrics.jsonl")
    return {
        e["step"]: (e["train_loss_batch"], e.get("grad_norm", math.nan))
        for e in events
        if e["event"] == "step"
    }


def _compare_step(
    folder: Path, recorded: Mapping[int, tuple[float, float]], step: int, loss: float, norm: float
) -> None:
    if step not in recorded:
        raise UserError(
            str(folder / "metrics.jsonl"), f"has no step {step}", "verify a run whose metrics are whole"
        )
    if recorded[step] != (loss, norm) and not all(map(math.isnan, (loss, recorded[step][0]))):
        raise RunError(
            f"step {step}",
            f"loss {loss!r} and gradient norm {norm!r}, recorded were {recorded[step][0]!r} and {recorded[step][1]!r}",
            "the run does not reproduce here",
        )


def _compare_tensors(parts: Assembly, optimizer: torch.optim.Optimizer, checkpoint: Path) -> int:
    from safetensors.torch import load_file

    then = load_file(checkpoint / TRAINING / STATE_NAME)
    now: dict[str, torch.Tensor] = {}
    for name, parameter in named_trainable(parts.model).items():
        now |= {f"{kind}/{name}": optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")}
        if parts.kind == "lora":
            now[f"weight/{name}"] = parameter.detach()
    if parts.kind == "full":
        weights = _as_saved(parts.model)
        for file in sorted(checkpoint.glob("*.safetensors")):
            served = load_file(file)
            then |= served
            # Of tied weights one name is saved.
            now |= {name: weights[name] for name in served if name in weights}
    for name in sorted(now.keys() | {name for name in then if not name.startswith("step/")}):
        if name not in now or name not in then or not torch.equal(then[name], now[name]):
            raise RunError(f"{checkpoint}: {name}", "is not what the same steps give here", "")
    return len(now)


def _as_saved(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights by the names, and in the shapes, that they have in files: experts are fused in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, model.state_dict()))
