"""LoRA against full-parameter on slices of four public data sets: the results that docs/lora-or-full.md teaches with.

    python benchmarks/example_comparisons.py banking77 DATA/banking77

DATA/banking77 holds ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` as chats (``{"messages": [...]}``). The first
rows of each become a slice in a scratch folder, on which ``tunesmith compare`` is run; what it found is copied to
``benchmarks/results/comparisons/NAME.{json,md}``, without any row or answer. Ctrl-C stops it; the same command goes on.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.cli import main as tunesmith
from tunesmith.comparison.markdown import comparison_markdown
from tunesmith.comparison.record import ComparisonRecord, RunEntry, from_json, to_json
from tunesmith.config.yaml_file import dump_yaml

RESULTS = Path(__file__).parent / "results" / "comparisons"
ARMS = "full,lora"
# LoRA's rates are ten times those of full; as each may turn out best, so may a factor of 2.5 or 40.
RATES = ("full=1e-4,4e-4,1.6e-3", "lora=1e-3,4e-3,1.6e-2")
MODEL = "smollm2-135m-instruct-q4"


@dataclass(frozen=True)
class Example:
    """How a data set is sliced and scored.

    Attributes:
        train, valid, test: rows of each slice.
        answered: of the test rows, those that are answered too; the others only have a loss.
        max_new_tokens: longest answer.
        sweep_budget: in full runs; a second round with no more steps than the first would train the same again.
    """

    train: int
    valid: int
    test: int
    metric: str
    answered: int
    max_new_tokens: int
    sweep_budget: float


EXAMPLES = {
    "banking77": Example(240, 40, 100, "label_accuracy", 100, 16, 1.1),
    "sql": Example(160, 32, 60, "exact_match", 60, 64, 1.5),
    "viggo": Example(160, 32, 48, "record_match", 48, 96, 1.5),
    # A 135M model solves next to none of these: the loss is what can be told apart, and the words of a solution.
    "gsm8k": Example(128, 32, 40, "token_f1", 24, 160, 2.0),
}


def settings(example: Example, seed: int) -> str:
    """The configuration file, beside the slices."""
    return dump_yaml(
        {
            "model_id": MODEL,
            "train_path": "train.jsonl",
            "valid_path": "valid.jsonl",
            "num_epochs": 1,
            "train_batch_size_per_device": 4,
            "num_warmup_steps": 4,
            "seed": seed,
            "evaluation": {
                "metric": example.metric,
                "test_path": "test.jsonl",
                "max_rows": example.answered,
                "max_new_tokens": example.max_new_tokens,
            },
            "lora_config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
        }
    )


def write_slices(example: Example, data: Path, scratch: Path) -> None:
    """The first rows of each split.

    Raises:
        SystemExit: a file is missing or has fewer rows.
    """
    for split, count in (("train", example.train), ("valid", example.valid), ("test", example.test)):
        source = data / f"{split}.jsonl"
        if not source.is_file():
            raise SystemExit(f"{source}: is missing; see the docstring of {Path(__file__).name}")
        with source.open(encoding="utf-8") as stream:
            lines = list(itertools.islice(stream, count))
        if len(lines) < count:
            raise SystemExit(f"{source}: has {len(lines)} rows, {count} are wanted; give --{split}")
        (scratch / source.name).write_text("".join(lines), encoding="utf-8")


def shipped(record: ComparisonRecord, name: str, note: str | None) -> ComparisonRecord:
    """``record`` without rows and answers, and without the curves of the sweep, which no figure shows."""
    notes = (*record.notes, note) if note else record.notes
    return replace(
        record, name=name, samples=(), runs=tuple(_without_curves(run) for run in record.runs), notes=notes
    )


def _without_curves(run: RunEntry) -> RunEntry:
    return replace(run, train_curve=(), eval_curve=()) if run.purpose == "sweep" else run


def copy_results(report: Path, results: Path, name: str, note: str | None) -> None:
    """Leave the facts of ``report`` as ``NAME.json`` and ``NAME.md`` in ``results``."""
    record = shipped(from_json(report.read_text(encoding="utf-8")), name, note)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(to_json(record), encoding="utf-8")
    (results / f"{name}.md").write_text(comparison_markdown(record), encoding="utf-8")


def compare(scratch: Path, output: str, options: Sequence[str]) -> int:
    """``tunesmith compare`` in the scratch folder, so that no path of this machine gets into a report."""
    with contextlib.chdir(scratch):
        return tunesmith(["compare", "example.yaml", "--output", output, *options])


def main(arguments: Sequence[str] | None = None) -> int:
    """Slices, comparison, results; the exit code of ``tunesmith compare``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=EXAMPLES)
    parser.add_argument("data", type=Path, help="folder with train.jsonl, valid.jsonl and test.jsonl")
    for size in ("train", "valid", "test", "answered"):
        parser.add_argument(f"--{size}", type=int, help="rows")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--arms", default=ARMS)
    parser.add_argument("--rates", nargs="+", default=RATES, metavar="ARM=RATE,…")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=42)
    parser.add_argument("--sweep-budget", type=float, help="full runs")
    parser.add_argument("--name", help="of the results  [default: the data set's]")
    parser.add_argument("--scratch", type=Path, help="[default: outputs/example-NAME]")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", help="what a reader has to know of the machine")
    given = parser.parse_args(arguments)
    changes = {
        key: value
        for key in ("train", "valid", "test", "answered", "max_new_tokens", "sweep_budget")
        if (value := getattr(given, key)) is not None
    }
    example = replace(EXAMPLES[given.dataset], **changes)
    name = given.name or given.dataset
    scratch = given.scratch or Path("outputs") / f"example-{name}"
    scratch.mkdir(parents=True, exist_ok=True)
    write_slices(example, given.data, scratch)
    (scratch / "example.yaml").write_text(settings(example, given.first_seed), encoding="utf-8")
    options = ["--arms", given.arms, "--seeds", str(given.seeds), "--sweep-budget", str(example.sweep_budget)]
    for rates in given.rates:
        options += ["--learning-rates", rates]
    output = f"compare-{given.dataset}"  # that of a variant too, so that what is trained is not trained again
    code = compare(scratch, output, options)
    if code == 0:
        copy_results(scratch / output / "report.json", given.results, name, given.note)
    return code


if __name__ == "__main__":
    sys.exit(main())
