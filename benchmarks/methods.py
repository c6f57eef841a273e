"""How much faster is LoRA than full-parameter training, and what do adapters on embeddings and head cost?

    python benchmarks/methods.py --data DATA/viggo DATA/banking77 DATA/sql DATA/gsm8k

One optimizer step by each method, in turns, on the same rows in one process, by our own trainer; the learning rate is
0, so that every step does all its work. Folders hold ``train.jsonl``. Results: ``methods.json`` with every step,
``methods.md``.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ablation import METHODS, TARGETS, Variant, timed_step

from tunesmith.assembly import Assembly, assemble
from tunesmith.config.load import load_config
from tunesmith.models.method import trainable_parameters
from tunesmith.tracking.environment import machine, versions

LORA, FULL, WIDE = "LoRA", "full-parameter", "LoRA, embeddings and head too"
SETTINGS: dict[str, dict[str, Any]] = {
    LORA: METHODS["lora"],
    WIDE: {"lora_config": METHODS["lora"]["lora_config"] | {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]}},
    FULL: METHODS["full"],
}  # fmt: skip


def prepared(method: str, data: Path, rows_per_step: int) -> Assembly:
    """Model and rows of a run by ``method``."""
    settings = [f"{key}={json.dumps(value)}" for key, value in SETTINGS[method].items()]
    facts = ["model_id=smollm2-135m-instruct-q4", f"train_batch_size_per_device={rows_per_step}"]
    return assemble(
        load_config(None, [f"train_path={data}", *facts, *settings]), skip_bad_rows=False, say=print
    )


def measure(data: Path, rounds: int, rows_per_step: int) -> list[dict[str, Any]]:
    """Every method once a round, after a round that is not counted."""
    parts = {method: prepared(method, data, rows_per_step) for method in SETTINGS}
    optimizers = {
        method: {True: torch.optim.AdamW(trainable_parameters(found.model), lr=0.0, fused=True)}
        for method, found in parts.items()
    }
    rows, chosen = parts[LORA].text.splits.train, list(range(rows_per_step))
    real_tokens = int(rows.lengths[chosen].sum())
    steps = []
    for number in range(rounds + 1):
        for method, found in parts.items():
            seconds, _ = timed_step(found, found.passes, Variant("nothing"), optimizers[method], chosen)
            print(
                f"{data.parent.name} round {number} {method}: {real_tokens / seconds:.0f} tokens/s",
                flush=True,
            )
            facts = {"data": data.parent.name, "round": number, "method": method, "seconds": seconds}
            steps.append(facts | {"real_tokens_per_second": real_tokens / seconds})
    return [step for step in steps if step["round"]]


def table(steps: Sequence[dict[str, Any]]) -> str:
    """Medians of tokens/s; ratios of one round each, with the least and the most."""
    lines = [
        "| data | LoRA | full-parameter | LoRA over full | LoRA, embeddings and head too | its cost |",
        "|---|---|---|---|---|---|",
    ]
    for data in dict.fromkeys(step["data"] for step in steps):
        speeds = {
            method: [s["real_tokens_per_second"] for s in steps if (s["data"], s["method"]) == (data, method)]
            for method in SETTINGS
        }
        over = sorted(a / b for a, b in zip(speeds[LORA], speeds[FULL], strict=True))
        cost = sorted(a / b for a, b in zip(speeds[LORA], speeds[WIDE], strict=True))
        lora, full, wide = (f"{statistics.median(speeds[method]):.0f}" for method in (LORA, FULL, WIDE))
        lines.append(f"| {data} | {lora} | {full} | {_spread(over)} | {wide} | {_spread(cost)} |")
    return "\n".join(lines) + "\n"


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with train.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    steps: list[dict[str, Any]] = []
    for folder in chosen.data:
        steps += measure(folder / "train.jsonl", chosen.rounds, chosen.rows_per_step)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows_per_step": chosen.rows_per_step,
        "machine": machine(),
        "versions": versions(),
        "steps": steps,
    }
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    (chosen.output_dir / "methods.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (chosen.output_dir / "methods.md").write_text(table(steps), encoding="utf-8")
    print(table(steps))


if __name__ == "__main__":
    main()
