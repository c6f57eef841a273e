"""Do several workers train what one process trains? Whole runs of a tiny model, compared step by step.

    python benchmarks/workers_parity.py

One, two and four processes over gloo, each run through ``run.carry_out`` with the workers that Ray would have set up:
all weights on each (``data-parallel``), or split by a DeepSpeed file of stage 2 or 3. Every run has the same steps of 8
rows, whose answers have 1 to 40 words: workers have unequal numbers of trained tokens. The last step of an epoch has 5
rows, so that one of four workers may have nothing to do. Printed and kept as ``workers_parity.md``: the largest
relative difference of a step's loss, and that of the trained weights at the end, |a - b| / |b| over all of them.
"""

import argparse
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import yaml
from rich.console import Console
from safetensors.numpy import load_file

import tiny_models
from tunesmith.config.load import load_config
from tunesmith.run import RunOptions, carry_out
from tunesmith.training.process_group import process_group
from tunesmith.training.sharded_group import ShardedGroup

RESULTS = Path(__file__).resolve().parent / "results"
STEP_ROWS, ROWS, EPOCHS = 8, 29, 2
RATE = 1e-3  # high, so that weights move and differences could grow
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}},
    "full-parameter": {},
}
SPREAD: dict[str, bool | None] = {"data-parallel": None, "sharded, stage 2": False, "sharded, stage 3": True}
BOUND = 1e-6


@dataclass(frozen=True)
class Left:
    """What a run left: the loss of each step, the weights at its end by name."""

    losses: list[float]
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class Compared:
    """One line of the table."""

    method: str
    spread: str
    workers: int
    loss: float
    weights: float


def write_rows(path: Path, count: int, seed: int) -> None:
    """Chats whose answers have 1 to 40 words."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, answered = (
                " ".join(draw.choices(tiny_models.COLOURS, k=draw.randint(1, most))) for most in (15, 40)
            )
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": messages}) + "\n")


def settings_for(folder: Path, method: str, spread: str, workers: int) -> Path:
    """The configuration of one run; its path."""
    own = folder / f"{method}-{spread}-{workers}".replace(", ", "-").replace(" ", "-")
    settings = {
        "model_id": str(folder / "model"), "train_path": str(folder / "train.jsonl"), "num_epochs": EPOCHS,
        "num_warmup_steps": 0, "learning_rate": RATE, "train_batch_size_per_device": STEP_ROWS // workers,
        "num_devices": workers, "precision": "fp32", "output_dir": str(own), **METHODS[method],
    }  # fmt: skip
    config = own.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return config


def one_of(rank: int, world: int, meeting: str, config: Path, spread: str) -> None:
    """One worker's part of a run."""
    torch.set_num_threads(1)
    silent = Console(file=io.StringIO())
    loaded = load_config(str(config), [])
    if world == 1:
        carry_out(loaded, silent, RunOptions())
        return
    with process_group(rank, world, meeting) as together:
        regather = SPREAD[spread]
        workers = together if regather is None else ShardedGroup(together.here, regather)
        carry_out(loaded, silent, RunOptions(), workers)


def left_by(config: Path) -> Left:
    """What the run of this configuration left."""
    (run,) = (path.parent for path in config.with_suffix("").glob("*/report.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weights: dict[str, np.ndarray] = {}
    for file in sorted((run / "best").glob("*.safetensors")):
        weights |= load_file(file)
    return Left([line["train_loss_batch"] for line in lines if line["event"] == "step"], weights)


def compare(alone: Left, together: Left) -> tuple[float, float]:
    """The largest relative difference of a loss, and that of all weights."""
    assert len(alone.losses) == len(together.losses)
    assert alone.weights.keys() == together.weights.keys()
    loss = max(abs(a - b) / abs(b) for a, b in zip(together.losses, alone.losses, strict=True))
    a, b = (
        np.concatenate([found.weights[name].ravel() for name in alone.weights]).astype(np.float64)
        for found in (together, alone)
    )
    return loss, float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure(folder: Path, crew: ProcessPoolExecutor) -> Iterator[Compared]:
    """Every line of the table, as it is found."""
    write_rows(folder / "train.jsonl", ROWS, seed=0)
    tiny_models.save_tiny_model(folder / "model")

    def run(method: str, spread: str, workers: int) -> Left:
        config = settings_for(folder, method, spread, workers)
        meeting = f"file://{config.with_suffix('.meeting')}"
        # Each process is busy until all have come, so none gets two of them.
        parts = [crew.submit(one_of, rank, workers, meeting, config, spread) for rank in range(workers)]
        for part in parts:
            part.result(timeout=600)
        return left_by(config)

    for method in METHODS:
        alone = run(method, "data-parallel", 1)
        for spread in SPREAD:
            for workers in (2, 4):
                yield Compared(method, spread, workers, *compare(alone, run(method, spread, workers)))


def table(found: list[Compared]) -> str:
    """In Markdown."""
    lines = [
        "| method | weights | workers | largest difference of a loss | of the trained weights |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {c.method} | {c.spread} | {c.workers} | {c.loss:.1e} | {c.weights:.1e} |" for c in found]
    worst = max(max(c.loss, c.weights) for c in found)
    steps = EPOCHS * -(-ROWS // STEP_ROWS)
    note = (
        f"Relative to one process, float32, {steps} steps, torch {torch.__version__}; the largest is {worst:.1e}, "
        f"{'within' if worst <= BOUND else 'beyond'} the {BOUND:.0e} that is promised."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    context = get_context("forkserver")
    context.set_forkserver_preload(["workers_parity"])  # the libraries are imported once, not in each process
    found: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNESMITH_CACHE"] = str(Path(folder) / "cache")
        with ProcessPoolExecutor(4, mp_context=context) as crew:
            for line in measure(Path(folder), crew):
                found.append(line)
                print(line, file=sys.stderr, flush=True)
    (chosen.output_dir / "workers_parity.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0 if max(max(c.loss, c.weights) for c in found) <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
