"""Kill runs at seeded random instants, resume them, and compare every bit with a run that nobody killed.

    python tests/torture/torture.py --instants 200

Each run is a child process, forked after everything has been imported (a run takes a second then), that ends itself
with SIGKILL at the n-th passage of a place: in the forward pass, in the backward pass, between micro-batches, at the
optimizer, in evaluation, before and after each operation of the save protocol; or its parent kills it after some time.
Or it lives and the disk fails: an operation meets ENOSPC or EIO, which must end the run in one line of ours, or not at
all.
Every second run is killed once more while it resumes. What must be equal: per-step losses and gradient norms,
evaluation losses, trained tensors and moments of the last checkpoint, the published best one.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
import tunesmith.assembly
import tunesmith.models.passes
import tunesmith.run
from tunesmith.checkpoints.atomic import FileOps
from tunesmith.config.load import load_config
from tunesmith.errors import TunesmithError
from tunesmith.models.kernels import decoder

METHODS = {"lora": {"lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}, "full": {}}
TIMED = "after some time"
OPERATIONS = ("make_folder", "write_bytes", "copy_file", "fsync", "rename", "remove")
FAULTS = {f"{name} at {at}": (number, f"before {at}")
          for name, number in (("ENOSPC", errno.ENOSPC), ("EIO", errno.EIO)) for at in OPERATIONS}  # fmt: skip
FAILED = 3  # exit code of a child whose run ended in an error of ours
Seam = Callable[[str], None]


@contextmanager
def seams(passed: Seam) -> Iterator[None]:
    """Within the block ``passed(place)`` is called at each place where a run may die."""

    def around(owner: Any, name: str, before: str | None, after: str | None) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any, **named: Any) -> Any:
            if before:
                passed(before)
            result = inner(*arguments, **named)
            if after:
                passed(after)
            return result

        setattr(owner, name, outer)

    around(decoder, "layer_forward", "in forward", None)
    around(decoder, "layer_backward", "in backward", None)
    around(tunesmith.models.passes.KernelPasses, "train", None, "between micro-batches")
    around(tunesmith.models.passes.KernelPasses, "losses", "in evaluation", None)
    around(tunesmith.run, "save_servable", "before saving", "while saving")
    around(safetensors.torch, "save_file", None, "while saving")
    for operation in OPERATIONS:
        around(FileOps, operation, f"before {operation}", f"after {operation}")
    # Small micro-batches, so that a step has several.
    tunesmith.assembly.TOKEN_BUDGETS = (64,)
    yield


def in_child(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Run ``work`` in a forked process; the status that it left. Its output is kept away."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ["OMP_NUM_THREADS"] = "1"
            work()
            code = 0
        except TunesmithError as error:
            code = 1 if "\n" in str(error) else FAILED
        except (
            BaseException
        ) as error:  # told by the exit status; a fork must not return into the parent's code
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def train(config: Path, place: str | None, number: int, counts: Path | None) -> None:
    """One run of ``config``, dying or failing at the ``number``-th passage of ``place``; passages go to ``counts``."""
    passages: Counter[str] = Counter()
    fault, at = FAULTS.get(place or "", (None, place))

    def passed(where: str) -> None:
        passages[where] += 1
        if where == at and passages[where] == number:
            if fault is not None:
                raise OSError(fault, os.strerror(fault))
            os.kill(os.getpid(), signal.SIGKILL)

    with seams(passed), Path(os.devnull).open("w", encoding="utf-8") as silent:
        tunesmith.run.finetune(load_config(str(config), []), Console(file=silent), resume="auto")
    if counts is not None:
        counts.write_text(json.dumps(passages), encoding="utf-8")


def is_finished(output_dir: Path) -> bool:
    """Whether the run came to write its report, the last thing it does."""
    return any(
        json.loads(path.read_text())["status"] == "finished" for path in output_dir.glob("*/report.json")
    )


def ended_early(status: int, place: str) -> bool:
    """Whether the run was killed, or ended in the error that a fault of the disk must end in."""
    return os.WIFSIGNALED(status) or (place in FAULTS and os.waitstatus_to_exitcode(status) == FAILED)


def outcome(output_dir: Path) -> dict[str, Any]:
    """Everything that must be equal: a digest of each tensor file, and the figures of each step."""
    (run,) = [path.parent for path in output_dir.glob("*/config.yaml")]
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [
        [
            e[key]
            for key in ("event", "step", "train_loss_batch", "grad_norm", "learning_rate", "eval_loss")
            if key in e
        ]
        for e in events
        if e["event"] in ("step", "eval")
    ]
    # Published and forwarded copies too; the run's folder has a name of its own.
    files = {
        str(path.relative_to(output_dir)).replace(run.name, "run"): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(output_dir.rglob("*.safetensors"))
    }
    report = json.loads((run / "report.json").read_text())
    told = {key: report[key] for key in ("status", "steps", "real_tokens", "eval_loss", "before", "after")}
    return {"figures": figures, "files": files, "report": told}


def prepare(folder: Path) -> None:
    """Model, rows and one configuration a method."""
    rows = folder / "rows"
    rows.mkdir()
    tiny_models.write_rows(rows / "train.jsonl", 22)
    tiny_models.write_rows(rows / "valid.jsonl", 5, start=100)
    tiny_models.save_tiny_model(folder / "model")
    for method, extra in METHODS.items():
        settings = {
            "model_id": str(folder / "model"), "train_path": str(rows / "train.jsonl"),
            "valid_path": str(rows / "valid.jsonl"), "num_epochs": 2, "learning_rate": 0.01, "num_warmup_steps": 2,
            "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2},
            "evaluation": {"metric": "token_f1", "max_new_tokens": 3}, "num_checkpoints_to_keep": 2,
            "custom_model_tag": f"torture-{method}", **extra,
        }  # fmt: skip
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def config_for(folder: Path, method: str, output_dir: Path) -> Path:
    settings = yaml.safe_load((folder / f"{method}.yaml").read_text())
    target = output_dir.with_suffix(".yaml")
    target.write_text(yaml.safe_dump(settings | {"output_dir": str(output_dir)}), encoding="utf-8")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
    try:
        return torture(folder, chosen.instants, random.Random(chosen.seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torture(folder: Path, instants: int, choice: random.Random) -> int:
    """Kill ``instants`` runs, resume them, compare; the exit code."""
    assert in_child(lambda: prepare(folder)) == 0
    wanted: dict[str, dict[str, Any]] = {}
    passages: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    for method in METHODS:
        output_dir, counts = folder / f"whole-{method}", folder / f"{method}.json"
        config, begun = config_for(folder, method, output_dir), time.monotonic()
        assert in_child(lambda c=config, n=counts: train(c, None, 0, n)) == 0
        seconds[method] = time.monotonic() - begun
        wanted[method], passages[method] = outcome(output_dir), json.loads(counts.read_text())
    tried: Counter[str] = Counter()
    for number in range(instants):
        method = choice.choice(list(METHODS))
        output_dir = folder / f"run-{number}"
        config = config_for(folder, method, output_dir)
        deaths: list[str] = []
        status = 1
        for _ in range(2 if number % 2 else 1):
            place = choice.choice([*sorted(passages[method]), TIMED, *FAULTS])
            at = choice.randint(1, passages[method].get(FAULTS.get(place, (0, place))[1], 1))
            after = choice.uniform(0.05, 1.0) * seconds[method] if place == TIMED else None
            deaths.append(f"{place} {at}")
            status = in_child(lambda c=config, p=place, n=at: train(c, p, n, None), kill_after=after)
            if not ended_early(status, place):
                break  # it was done before it came to that place, or a fault did not matter
            tried[place] += 1
            if is_finished(output_dir):
                break
        if ended_early(status, place):
            status = 0 if is_finished(output_dir) else in_child(lambda c=config: train(c, None, 0, None))
        if status != 0:
            print(f"instant {number}: {method} killed {', '.join(deaths)}: not resumed, status {status}")
            return 1
        found = outcome(output_dir)
        if found != wanted[method]:
            keys = [key for key in found if found[key] != wanted[method][key]]
            print(f"instant {number}: {method} killed {', '.join(deaths)}: other {', '.join(keys)}")
            for key in keys:
                print(f"  whole   {wanted[method][key]}\n  resumed {found[key]}")
            return 1
        shutil.rmtree(output_dir)
    print(
        f"{instants} runs, {tried.total()} kills and faults, every bit equal; places: {dict(sorted(tried.items()))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
