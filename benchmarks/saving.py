"""What saving costs a run of the default model, and how soon such a run ends after Ctrl-C or SIGTERM.

    python benchmarks/saving.py

Each shipped file of the default model is trained as it stands. Within that run all that saves is timed: gathering
tensors, writing, hashing, flushing to the disk, pruning, publishing and forwarding the best checkpoint. Then runs of
the same files get SIGTERM at seeded random instants (loading, scoring the base, training, saving), every second one
without the scoring, and the time until their process has ended is taken. Results: ``saving.json`` and ``saving.md``.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tunesmith.tracking.environment import machine, versions

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "LoRA": ROOT / "configs/smollm2-135m-lora.yaml",
    "full-parameter": ROOT / "configs/smollm2-135m-full-parameter.yaml",
}
_CHILD = """
import json, sys, time
import tunesmith.run
from rich.console import Console
from tunesmith.checkpoints.store import CheckpointStore
from tunesmith.config.load import load_config

spent = {}

def timed(owner, name):
    inner = getattr(owner, name)
    def outer(*arguments, **named):
        begun = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            spent.setdefault(name, []).append(time.perf_counter() - begun)
    setattr(owner, name, outer)

timed(tunesmith.run, "_save")
timed(tunesmith.run, "forward_best")
timed(CheckpointStore, "publish_best")
record = tunesmith.run.finetune(load_config(sys.argv[1], sys.argv[3:]), Console(quiet=True))
seconds = {"wall": record.wall_seconds, "steps": record.steps, "bytes": record.checkpoint_bytes}
with open(sys.argv[2], "w") as file:
    json.dump({**seconds, "spent": spent}, file)
"""


def saving_of(config: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Seconds of one run, and of what saves in it."""
    told = folder / "told.json"
    command = [
        sys.executable,
        "-c",
        _CHILD,
        str(config),
        str(told),
        *overrides,
        f"output_dir={folder}/outputs",
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(told.read_text())
    saving = sum(map(sum, found["spent"].values()))
    return {
        "steps": found["steps"],
        "saves": len(found["spent"]["_save"]),
        "checkpoint_bytes": found["bytes"],
        "seconds_of_each": {name: [round(one, 3) for one in times] for name, times in found["spent"].items()},
        "saving_seconds": round(saving, 3),
        "wall_seconds": round(found["wall"], 1),
        "percent": round(100 * saving / found["wall"], 3),
    }


def stop_after(config: Path, folder: Path, seconds: float, *, scored: bool) -> dict[str, Any]:
    """How long a run goes on after it got SIGTERM ``seconds`` after its start."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) | {"output_dir": str(folder / "outputs")}
    if not scored:
        del settings["evaluation"]
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "tunesmith", "finetune", str(file)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    begun = time.perf_counter()
    _, err = process.communicate()
    ended = time.perf_counter() - begun
    said = err.strip().splitlines()[-1].rpartition(": ")[2] if err.strip() else ""
    return {
        "at_seconds": round(seconds, 1),
        "scored": scored,
        "exit_code": process.returncode,
        "seconds": round(ended, 2),
        "said": said.partition(";")[0],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    host = result["machine"]
    lines = [
        f"On {host['cores']} cores of {host['processor']}, {result['taken']}, load when it began {result['load']:.1f}.",
        "",
        "| method | run | steps | saves | seconds of each | publishing, forwarding | percent of the run |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, found in result["saving"].items():
        each = found["seconds_of_each"]
        rest = sum(each["publish_best"]) + sum(each["forward_best"])
        saves = ", ".join(f"{one:.2f}" for one in each["_save"])
        lines.append(
            f"| {method} | {found['wall_seconds']:.0f} s | {found['steps']} | {found['saves']} | {saves} | "
            f"{rest:.2f} s | {found['percent']:.2f} % |"
        )
    lines += ["", "| method | SIGTERM after | until it had ended | said |", "|---|---|---|---|"]
    for method, stops in result["stops"].items():
        lines += [
            f"| {method}{'' if stop['scored'] else ', base not scored'} | {stop['at_seconds']:.0f} s | "
            f"{stop['seconds']:.1f} s | {stop['said']} |"
            for stop in stops
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=10, help="runs of each method that get SIGTERM")
    parser.add_argument(
        "--latest", type=float, default=90.0, help="seconds after the start within which they do"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for a shorter try")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    chosen = parser.parse_args()
    choice = random.Random(chosen.seed)
    result: dict[str, Any] = {
        "taken": datetime.now(UTC).date().isoformat(),
        "load": round(
            Path("/proc/loadavg").exists() and float(Path("/proc/loadavg").read_text().split()[0]), 2
        ),
        "machine": machine(),
        "versions": versions(),
        "overrides": chosen.set,
        "saving": {},
        "stops": {},
    }
    for method, config in CONFIGS.items():
        with tempfile.TemporaryDirectory(prefix="saving-") as folder:
            result["saving"][method] = saving_of(config, Path(folder), chosen.set)
        print(method, result["saving"][method], flush=True)
        result["stops"][method] = []
        for number in range(chosen.stops):
            with tempfile.TemporaryDirectory(prefix="saving-") as folder:
                seconds = choice.uniform(1, chosen.latest)
                stop = stop_after(config, Path(folder), seconds, scored=number % 2 == 0)
            result["stops"][method].append(stop)
            print(method, stop, flush=True)
    (chosen.output / "saving.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (chosen.output / "saving.md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
