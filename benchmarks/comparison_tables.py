"""The tables of docs/lora-or-full.md, from the results in ``benchmarks/results/comparisons``.

python benchmarks/comparison_tables.py    # writes them between the marks of the guide
"""

import re
from collections.abc import Sequence
from pathlib import Path

from tunesmith.comparison.record import ArmSummary, ComparisonRecord, Difference, Estimate, read_comparison
from tunesmith.tracking.formats import size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "comparisons"
GUIDE = ROOT / "docs" / "lora-or-full.md"
DATASETS = ("banking77", "sql", "viggo", "gsm8k")
LABELS = {None: "none shown", "full": "full-parameter", "lora": "LoRA"}
_BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.S)


def shipped() -> list[ComparisonRecord]:
    """The results that are there, in the order of ``DATASETS``."""
    files = [RESULTS / f"{name}.json" for name in DATASETS]
    return [read_comparison(file) for file in files if file.is_file()]


def tables(records: Sequence[ComparisonRecord]) -> str:
    """What was compared; task metric; loss; costs and forgetting, each with one row a data set."""
    heads_and_rows = (
        (
            "data set | rows: trained on, choosing the rate, held out | steps | rate: full-parameter, LoRA | seeds",
            _setting,
        ),
        ("data set | metric, % | base | full-parameter | LoRA | full minus LoRA, points | better", _metric),
        (
            "data set | loss of the base | full-parameter | LoRA | full minus LoRA, nats a token | better",
            _loss,
        ),
        (
            "data set | arm | peak memory | trained parameters | checkpoint | swap in the server "
            "| loss on general text, change | choices right, before and after",
            _costs,
        ),
    )
    found = []
    for head, rows in heads_and_rows:
        rule = "|".join("---" for _ in head.split(" | "))
        lines = [f"| {head} |", f"|{rule}|", *(row for record in records for row in rows(record))]
        found.append("\n".join(lines))
    missing = [name for name in DATASETS if name not in {record.name for record in records}]
    if missing:
        found.append(f"Not finished, so not shown: {', '.join(missing)}.")
    return "\n" + "\n\n".join(found) + "\n\n"


def _setting(record: ComparisonRecord) -> list[str]:
    data, of = record.lineage["data"], _arms(record)
    rows = ", ".join(str(data[split]["rows"]) for split in ("train", "valid", "test"))
    steps = next(run.steps for run in record.runs if run.purpose == "final" and run.status == "finished")
    rates = ", ".join(f"{of[arm].learning_rate:g}" for arm in ("full", "lora"))
    return [f"| {record.name} | {rows} | {steps} | {rates} | {len(of['full'].seeds)} |"]


def _metric(record: ComparisonRecord) -> list[str]:
    (difference,) = (d for d in record.differences if d.measure == record.metric)
    of, base = _arms(record), record.base.metric if record.base else None
    cells = [_estimate(value, 100, 1) for value in (base, of["full"].metric, of["lora"].metric)]
    return [
        f"| {record.name} | {record.metric} | {' | '.join(cells)} "
        f"| {_difference(difference, 100, 1)} | {LABELS[difference.better]} |"
    ]


def _loss(record: ComparisonRecord) -> list[str]:
    (difference,) = (d for d in record.differences if d.measure == "eval_loss")
    of, base = _arms(record), record.base.eval_loss if record.base else None
    cells = [_estimate(value, 1, 3) for value in (of["full"].eval_loss, of["lora"].eval_loss)]
    return [
        f"| {record.name} | {'–' if base is None else f'{base:.3f}'} | {' | '.join(cells)} "
        f"| {_difference(difference, 1, 3)} | {LABELS[difference.better]} |"
    ]


def _costs(record: ComparisonRecord) -> list[str]:
    rows = []
    for arm, summary in _arms(record).items():
        entries = [e for e in record.forgetting if e.arm == arm and e.source == "shipped"]
        changes = [f"{e.general_loss_change.value:+.3f}" for e in entries if e.general_loss_change]
        before = [
            f"{100 * e.choice_accuracy_before.value:.0f} %" for e in entries if e.choice_accuracy_before
        ]
        after = [f"{100 * e.choice_accuracy_after.value:.0f} %" for e in entries if e.choice_accuracy_after]
        serving = summary.serving
        swap = f"{serving.swap_seconds:.2f} s" if serving and serving.swap_seconds is not None else "–"
        rows.append(
            f"| {record.name} | {LABELS[arm]} | {size(summary.peak_memory_bytes)} | {summary.trainable_parameters:,} "
            f"| {size(summary.checkpoint_bytes)} | {swap} | {' and '.join(changes)} "
            f"| {before[0] if before else '–'}, {' and '.join(after)} |"
        )
    return rows


def _arms(record: ComparisonRecord) -> dict[str, ArmSummary]:
    return {summary.arm: summary for summary in record.summaries}


def _estimate(found: Estimate | None, factor: float, digits: int) -> str:
    if found is None:
        return "–"
    value = f"{factor * found.value:.{digits}f}"
    if found.interval is None:
        return value
    low, high = (f"{factor * end:.{digits}f}" for end in found.interval)
    return f"{value} [{low}, {high}]"


def _difference(d: Difference, factor: float, digits: int) -> str:
    value, low, high = (f"{factor * number:+.{digits}f}" for number in (d.value, *d.interval))
    return f"{value} [{low}, {high}]"


def with_tables(guide: str) -> str:
    """``guide`` with the tables of today's results between its marks."""
    return _BLOCK.sub(lambda _: tables(shipped()), guide)


if __name__ == "__main__":
    GUIDE.write_text(with_tables(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
