"""What `tunesmith plan --probe` foretells of a training on this machine, and what the training then takes.

    python benchmarks/plan_grid.py            # 16 cells, some minutes each
    python benchmarks/plan_grid.py --few      # 4 of them

A cell is a configuration: a model, a method, with or without checkpointing, short or long rows. It is planned by the
command that a user gives, with a probe, and then trained as a run of its own. Compared are the peak of memory, the
wall time of the steps, and their processor time, which other programs on the machine disturb less; how much of the
processors those took stands beside it. Results: ``plan_grid.json``, ``plan_grid.md``.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from memory_grid import METHODS, SMALL_MODEL, write_rows

from tunesmith.models.base import find_base
from tunesmith.tracking.environment import machine, versions

LENGTHS = (96, 384)
BATCH = 4
# A run as the command makes it, whose steps are also measured as the probe measures its own.
_RUN = """
import json, sys
from pathlib import Path
from rich.console import Console
import tunesmith.run
from tunesmith.config.load import load_config
from tunesmith.planning.probe import ProcessorUse

steps_after, steps = tunesmith.run.steps_after, []

def measured(*arguments):
    found = steps_after(*arguments)
    before = ProcessorUse.now()
    for event in found:
        after = ProcessorUse.now()
        steps.append((event.train_time_per_step, after.own - before.own, after.others_since(before)))
        yield event  # what follows, such as an evaluation, is no part of a step
        before = ProcessorUse.now()

tunesmith.run.steps_after = measured
tunesmith.run.finetune(load_config(sys.argv[1], []), Console(quiet=True))
Path(sys.argv[2]).write_text(json.dumps(steps))
"""


def settings(folder: Path, model: str, method: str, checkpointing: bool) -> dict[str, Any]:
    """A configuration, beside its rows."""
    return {
        "model_id": model, "train_path": str(folder / "train.jsonl"), "valid_path": str(folder / "valid.jsonl"),
        "num_epochs": 1, "train_batch_size_per_device": BATCH, "gradient_checkpointing": checkpointing,
        "output_dir": str(folder / "outputs"), **METHODS[method],
    }  # fmt: skip


def cell(model: str, method: str, checkpointing: bool, length: int, steps: int) -> dict[str, Any]:
    """What was foretold and what was measured of one configuration."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "train.jsonl", length, 0, steps * BATCH)
        write_rows(folder / "valid.jsonl", length, 1, BATCH)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(settings(folder, model, method, checkpointing)), encoding="utf-8")
        plan = json.loads(_said(["-m", "tunesmith", "plan", str(config), "--probe", "--json"]))
        _said(["-c", _RUN, str(config), str(folder / "steps.json")])
        (report,) = (folder / "outputs").glob("*-*/report.json")
        run = json.loads(report.read_text(encoding="utf-8"))
        taken = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    return {
        "model": Path(model).name, "method": method, "checkpointing": checkpointing, "length": length,
        **compared(plan, method, run["peak_rss_bytes"], taken),
    }  # fmt: skip


def compared(
    plan: dict[str, Any], method: str, peak: int, steps: list[tuple[float, float, float]]
) -> dict[str, Any]:
    """A plan with a probe beside the run: bytes, seconds, and foretold over measured.

    Args:
        plan: as ``tunesmith plan --json`` prints it.
        peak: highest resident memory of the run.
        steps: of each, wall seconds, processor seconds, share of the processors that others had.
    """
    here, probe, tokens = plan["methods"][method]["machines"][0], plan["probe"], plan["workload"]["tokens"]
    wall, own, others = (sum(column) for column in zip(*steps, strict=True))
    foretold_cpu = probe["cpu_seconds"] / probe["real_tokens"] * tokens
    return {
        "steps": len(steps), "probe_steps": probe["steps"],
        "predicted_bytes": here["total"], "measured_bytes": peak, "bytes_ratio": here["total"] / peak,
        "predicted_seconds": here["seconds"], "measured_seconds": wall, "seconds_ratio": here["seconds"] / wall,
        "predicted_cpu_seconds": foretold_cpu, "measured_cpu_seconds": own, "cpu_seconds_ratio": foretold_cpu / own,
        "others_in_probe": probe["taken_by_others"], "others_in_run": others / len(steps),
    }  # fmt: skip


def _said(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def table(cells: list[dict[str, Any]]) -> str:
    """One line a cell, and how far the ratios reach."""
    head = (
        "model", "method", "checkpointing", "row length", "steps, probed", "memory: plan, run", "ratio",
        "wall: plan, run", "ratio", "CPU time: probe, run", "ratio", "others had: probe, run",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for found in cells:
        row = [
            found["model"], found["method"], "yes" if found["checkpointing"] else "no", str(found["length"]),
            f"{found['steps']}, {found['probe_steps']}",
            f"{found['predicted_bytes'] / 1e9:.2f}, {found['measured_bytes'] / 1e9:.2f} GB",
            f"{found['bytes_ratio']:.3f}",
            f"{found['predicted_seconds']:.1f}, {found['measured_seconds']:.1f} s", f"{found['seconds_ratio']:.2f}",
            f"{found['predicted_cpu_seconds']:.1f}, {found['measured_cpu_seconds']:.1f} s",
            f"{found['cpu_seconds_ratio']:.2f}",
            f"{found['others_in_probe']:.0%}, {found['others_in_run']:.0%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    spans = []
    for key, name in (
        ("bytes_ratio", "memory"),
        ("seconds_ratio", "wall time"),
        ("cpu_seconds_ratio", "CPU time"),
    ):
        ratios = [found[key] for found in cells]
        spans.append(f"{name} {min(ratios):.3f} to {max(ratios):.3f}")
    return "\n".join(lines) + f"\n\nForetold over measured: {'; '.join(spans)}.\n"


def write(output_dir: Path, cells: list[dict[str, Any]]) -> None:
    """The results so far."""
    output_dir.mkdir(parents=True, exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS")
    result = {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions(),
        "OMP_NUM_THREADS": threads, "cells": cells,
    }  # fmt: skip
    (output_dir / "plan_grid.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (output_dir / "plan_grid.md").write_text(table(cells), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--steps", type=int, default=16, help="of each run")
    parser.add_argument("--few", action="store_true", help="the default model without checkpointing only")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        small, base = Path(temporary) / "llama-50m", find_base(chosen.model, weights=True, say=print)
        _said(["-c", SMALL_MODEL, str(base.path), str(small)])
        models, switches = (
            ((chosen.model,), (False,)) if chosen.few else ((str(small), chosen.model), (False, True))
        )
        for length, switch, method, model in itertools.product(LENGTHS, switches, METHODS, models):
            cells.append(cell(model, method, switch, length, chosen.steps))
            print({key: value for key, value in cells[-1].items() if "bytes" not in key}, flush=True)
            write(chosen.output_dir, cells)
    print(table(cells))


if __name__ == "__main__":
    main()
