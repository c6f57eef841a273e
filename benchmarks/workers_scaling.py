"""What does a second worker bring? The same steps by one process and by two workers of Ray Train, in turn.

    python benchmarks/workers_scaling.py
    python benchmarks/workers_scaling.py --methods lora --rounds 5 --steps 12

Every run is `tunesmith finetune` in a process of its own, one thread a worker, the same rows in the same steps: one
process takes 2 x ``--rows`` of them, each of two workers ``--rows``. Runs alternate, so that a machine that is slow for
a while is slow for both. What is compared is the median of ``train_time_per_step`` over all steps of all rounds but
each run's first two. Efficiency is time of one / (2 x time of two): 100 % where nothing is lost. Results:
``workers_scaling.json`` and ``workers_scaling.md``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tunesmith.tracking.environment import machine, versions

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 2  # first steps of a run: memory is taken, caches are filled
METHODS: dict[str, dict[str, Any]] = {"lora": {"lora_config": {"r": 8}}, "full": {}}
SPREAD: dict[str, dict[str, Any]] = {
    "data-parallel": {},
    "sharded, stage 3": {"deepspeed": {"config_path": str(ROOT / "deepspeed_configs" / "zero_3.json")}},
}
ONE = "one process"


@dataclass(frozen=True)
class Arm:
    """What is measured: ``spread`` is a key of ``SPREAD``, or ``ONE``."""

    method: str
    spread: str

    @property
    def workers(self) -> int:
        return 1 if self.spread == ONE else 2


@dataclass(frozen=True)
class Measured:
    """Seconds of each step that counts, and the losses of all, over the rounds."""

    arm: Arm
    seconds: list[float]
    losses: list[list[float]]

    @property
    def typical(self) -> float:
        return median(self.seconds)


def settings_for(arm: Arm, model: str, rows: int, train: Path, output_dir: Path) -> dict[str, Any]:
    """Of one run: 2 x ``rows`` rows a step, whoever takes them."""
    return {
        "model_id": model, "train_path": str(train), "num_epochs": 1, "num_warmup_steps": 0,
        "train_batch_size_per_device": 2 * rows // arm.workers, "num_devices": arm.workers,
        "output_dir": str(output_dir), **METHODS[arm.method], **SPREAD.get(arm.spread, {}),
    }  # fmt: skip


def run(arm: Arm, model: str, rows: int, train: Path, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps of one run."""
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump(settings_for(arm, model, rows, train, folder / "outputs")), encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "finetune", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (metrics,) = (folder / "outputs").glob("*/metrics.jsonl")
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if step["event"] == "step"]
    return [step["train_time_per_step"] for step in steps], [step["train_loss_batch"] for step in steps]


def measure(arms: list[Arm], chosen: argparse.Namespace, folder: Path) -> Iterator[list[Measured]]:
    """What is known after each round."""
    lines = chosen.data.read_text(encoding="utf-8").splitlines(keepends=True)[
        : 2 * chosen.rows * chosen.steps
    ]
    train = folder / "train.jsonl"
    train.write_text("".join(lines), encoding="utf-8")
    found = [Measured(arm, [], []) for arm in arms]
    for number in range(chosen.rounds):
        for one in found if number % 2 == 0 else reversed(found):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                seconds, losses = run(one.arm, chosen.model, chosen.rows, train, Path(own))
            one.seconds.extend(seconds[SKIPPED:])
            one.losses.append(losses)
            print(
                f"round {number + 1}: {one.arm}: {median(seconds[SKIPPED:]):.3f} s",
                file=sys.stderr,
                flush=True,
            )
        yield found


def table(found: list[Measured]) -> str:
    """In Markdown: each arm beside one process of its method."""
    alone = {one.arm.method: one for one in found if one.arm.spread == ONE}
    lines = ["| method | workers | seconds a step | speed-up | efficiency |", "|---|---|---|---|---|"]
    for one in found:
        speed_up = alone[one.arm.method].typical / one.typical
        efficiency = f"{speed_up / one.arm.workers:.0%}"
        spread = "1" if one.arm.spread == ONE else f"2, {one.arm.spread}"
        spans = f"{one.typical:.2f} ({min(one.seconds):.2f} to {max(one.seconds):.2f})"
        lines.append(f"| {one.arm.method} | {spread} | {spans} | {speed_up:.2f} | {efficiency} |")
    steps = len(found[0].seconds)
    return (
        "\n".join(lines)
        + f"\n\nMedians of {steps} steps each, and the shortest and longest; one thread a worker.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "orders" / "train.jsonl")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rows", type=int, default=8, help="of each of two workers in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    arms = [Arm(method, spread) for method in chosen.methods for spread in (ONE, *SPREAD)]
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(arms, chosen, Path(folder)):
            facts = {
                "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions(),
                "model": chosen.model, "rows_a_step": 2 * chosen.rows, "runs": [asdict(one) for one in found],
            }  # fmt: skip
            chosen.output_dir.mkdir(parents=True, exist_ok=True)
            (chosen.output_dir / "workers_scaling.json").write_text(
                json.dumps(facts, indent=1) + "\n", encoding="utf-8"
            )
            (chosen.output_dir / "workers_scaling.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
