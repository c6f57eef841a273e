"""Is the predicted peak of memory the measured one? Runs over models, methods, lengths of rows and micro-batches.

    python benchmarks/memory_grid.py

Every run is a process of its own that trains two steps, evaluates, saves, and answers held-out rows; its report holds
both figures. A prediction may be 10 % too high and 5 % too low. Results: ``memory_grid.json``, ``memory_grid.md``.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.tracking.environment import machine, versions

LENGTHS = (64, 128, 256, 512)
BUDGETS = (256, 512, 1408)
METHODS: dict[str, dict[str, Any]] = {"lora": {"lora_config": {"r": 8}}, "full": {}}
ROWS = 16
_WORDS = ["red", "blue", "green", "black", "white", "house", "tree", "river", "stone", "cloud"]
_CHILD = """
import sys
import tunesmith.assembly
from rich.console import Console
from tunesmith.config.load import load_config
from tunesmith.run import finetune
tunesmith.assembly.TOKEN_BUDGETS = (int(sys.argv[2]),)
finetune(load_config(sys.argv[1], []), Console(quiet=True))
"""
SMALL_MODEL = """
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
    num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=2048,
    bos_token_id=1, eos_token_id=2, pad_token_id=2)
LlamaForCausalLM(config).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""


def write_rows(path: Path, length: int, seed: int, count: int = ROWS) -> None:
    """``count`` chats of about ``length`` tokens, of which a third is trained."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked = " ".join(draw.choices(_WORDS, k=max(1, 2 * length // 3 - 25)))
            answered = " ".join(draw.choices(_WORDS, k=length // 3))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": messages}) + "\n")


def run(folder: Path, model: str, method: str, length: int, budget: int) -> dict[str, Any]:
    """One run's figures, from its report."""
    import yaml

    for name, seed in (("train", 0), ("valid", 1)):
        write_rows(folder / f"{name}.jsonl", length, seed)
    output_dir = folder / f"{Path(model).name}-{method}-{length}-{budget}"
    settings = {
        "model_id": model, "train_path": str(folder / "train.jsonl"), "valid_path": str(folder / "valid.jsonl"),
        "num_epochs": 1, "train_batch_size_per_device": 8, "output_dir": str(output_dir),
        "evaluation": {"metric": "exact_match", "max_rows": 4, "max_new_tokens": 8}, **METHODS[method],
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(config), str(budget)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    (report,) = output_dir.glob("*-*/report.json")
    facts = json.loads(report.read_text(encoding="utf-8"))
    predicted, measured = facts["predicted_peak_rss_bytes"], facts["peak_rss_bytes"]
    return {
        "model": Path(model).name, "method": method, "length": length, "budget": budget,
        "predicted_bytes": predicted, "measured_bytes": measured, "predicted_over_measured": predicted / measured,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """One line a run, the extremes below."""
    lines = [
        "| model | method | row length | tokens a micro-batch | predicted | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row[key] for key in ("model", "method", "length", "budget")]
        cells += [f"{row[key] / 1e9:.2f} GB" for key in ("predicted_bytes", "measured_bytes")]
        cells.append(f"{row['predicted_over_measured']:.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    ratios = [row["predicted_over_measured"] for row in rows]
    return "\n".join(lines) + f"\n\nRatios from {min(ratios):.3f} to {max(ratios):.3f}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args()
    from tunesmith.models.base import find_base

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small, base = folder / "llama-50m", find_base(chosen.model, weights=True, say=print)
        subprocess.run([sys.executable, "-c", SMALL_MODEL, str(base.path), str(small)], check=True)
        combinations = itertools.product(LENGTHS, BUDGETS, METHODS, (str(small), chosen.model))
        for length, budget, method, model in combinations:
            found.append(run(folder, model, method, length, budget))
            print({key: found[-1][key] for key in found[-1] if "bytes" not in key}, flush=True)
            write(chosen.output_dir, found)
    print(table(found))


def write(output_dir: Path, found: list[dict[str, Any]]) -> None:
    """The results so far."""
    output_dir.mkdir(parents=True, exist_ok=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions(), "runs": found
    }  # fmt: skip
    (output_dir / "memory_grid.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (output_dir / "memory_grid.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
