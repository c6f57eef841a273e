"""``report.html``: a comparison as one page that needs no network, in light, dark and on paper.

The template escapes whatever it is given; only our own pictures pass as they are. The page's own policy forbids it to
load or run anything, whatever may stand in a model's answer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.checkpoints.atomic import write_text
from tunesmith.comparison.plots import plots, rate_text
from tunesmith.comparison.record import (
    ArmSummary,
    ComparisonRecord,
    Difference,
    Estimate,
    Forgetting,
    RunEntry,
)
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.tracking.formats import (
    ABSENT,
    count,
    duration,
    fraction,
    metric_label,
    number,
    shorten,
    size,
    visible,
)

_TEMPLATE = "report.html.jinja"
_SAMPLES = 8
_NO_BREAK = "\N{NO-BREAK SPACE}"  # an interval stays on one line
_TEXT_CHARACTERS = 1200
_STATUS = {
    "running": "not finished: it goes on when the command is given again",
    "interrupted": "interrupted: it goes on when the command is given again",
    "failed": "failed",
    "finished": "finished",
}


@dataclass(frozen=True)
class Table:
    """Cells as text. ``numeric``: the columns that are set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class _Sample:
    prompt: str
    answers: Sequence[tuple[str, str, bool]]  # who, what, whether it is the expected text


def write_html(record: ComparisonRecord, path: Path) -> None:
    """Write the page, whole or not at all. Equal records give equal bytes.

    Raises:
        OutputError: it cannot be written.
    """
    text = html_page(record)
    try:
        write_text(path, text)
    except CheckpointError as error:  # what the shared writer calls it; this is no checkpoint
        raise OutputError(error.place, error.fault, "free space or choose another folder") from error


def html_page(record: ComparisonRecord) -> str:
    """The page of a comparison in whatever state it is."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    labels = {arm.name: arm.label for arm in record.arms}
    return environment.get_template(_TEMPLATE).render(
        record=record,
        labels=labels,
        facts=_facts(record),
        arms=_arms(record, labels),
        differences=_differences(record, labels),
        forgetting=_forgetting(record, labels),
        serving=_serving(record, labels),
        plots=[(plot.title, Markup(plot.svg), plot.caption) for plot in plots(record)],
        samples=[_sample(sample, labels) for sample in record.samples[:_SAMPLES]],
        samples_left_out=max(0, len(record.samples) - _SAMPLES),
        runs=_runs(record.runs, labels),
        details=_details(record),
    )


def _facts(record: ComparisonRecord) -> list[tuple[str, str]]:
    facts = [
        ("base model", record.model_id),
        ("task", record.task or ABSENT),
        ("held-out rows", count(record.rows)),
        ("runs", f"{record.runs_done} of {record.runs_planned}"),
        ("took", duration(record.seconds)),
        ("made", record.created),
    ]
    if record.status != "finished":
        facts.insert(0, ("status", _STATUS[record.status]))
    return facts


# Tables. Arms stand in rows, so that many of them make the page longer and not wider.


def _arms(record: ComparisonRecord, labels: Mapping[str, str]) -> Table | None:
    if not record.summaries:
        return None
    metric = metric_label(record.metric) if record.metric else None
    costs = record.price_per_hour is not None
    head = ["", "learning rate", "eval loss", *([metric] if metric else [])]
    head += ["runs", "time a run", "tokens / s", "peak memory", "trained parameters", "checkpoint"]
    head += ["cost a run"] if costs else []
    rows = []
    if record.base is not None:
        cells = ["base, untuned", ABSENT, number(record.base.eval_loss)]
        cells += [_share(record.base.metric)] if metric else []
        rows.append([*cells, *[ABSENT] * (len(head) - len(cells))])
    for summary in record.summaries:
        edge = " (edge of the grid)" if summary.at_edge_of_grid else ""
        cells = [
            _label(labels, summary.arm),
            _rate(summary.learning_rate) + edge,
            _estimate(summary.eval_loss),
        ]
        cells += [_share(summary.metric)] if metric else []
        cells += [
            _run_count(summary),
            duration(summary.wall_seconds),
            count(summary.tokens_per_second),
            size(summary.peak_memory_bytes),
            _trained(summary),
            size(summary.checkpoint_bytes),
        ]
        cells += (
            [ABSENT if summary.training_cost is None else f"{summary.training_cost:.4g}"] if costs else []
        )
        rows.append(cells)
    price = f" Cost at {record.price_per_hour:g} an hour." if record.price_per_hour is not None else ""
    note = f"In brackets: 95 % intervals. {ABSENT}: not measured.{price}"
    return Table(head, rows, frozenset(range(1, len(head))), note)


def _run_count(summary: ArmSummary) -> str:
    done = str(len(summary.seeds))
    return f"{done} ({summary.failed_runs} failed)" if summary.failed_runs else done


def _trained(summary: ArmSummary) -> str:
    if summary.trainable_parameters is None:
        return ABSENT
    if not summary.total_parameters:
        return count(summary.trainable_parameters)
    share = 100 * summary.trainable_parameters / summary.total_parameters
    return f"{count(summary.trainable_parameters)} ({share:.3g}{_NO_BREAK}%)"


def _differences(record: ComparisonRecord, labels: Mapping[str, str]) -> Table | None:
    if not record.differences:
        return None
    rows = []
    for found in record.differences:
        better = (
            "no difference shown" if found.better is None else f"{_label(labels, found.better)} is better"
        )
        pair = f"{_label(labels, found.first)} minus {_label(labels, found.second)}"
        measure, value, interval = _difference(found)
        rows.append([pair, measure, value, interval, f"{count(found.rows)} x {found.seeds}", better])
    level = 100 * record.differences[0].confidence
    head = ["", "measure", "difference", f"{level:.3g} % interval", "rows x seeds", ""]
    together = "" if level <= 95 else " The intervals are wider than 95 % so that all pairs hold together."
    note = f"Paired over rows.{together} Where the interval covers 0, no difference is shown, and there is no winner."
    return Table(head, rows, frozenset({2, 3, 4}), note)


def _difference(found: Difference) -> tuple[str, str, str]:
    low, high = found.interval
    if found.lower_is_better:
        return metric_label(found.measure), f"{found.value:+.4f}", f"{low:+.4f} to {high:+.4f}"
    scaled = (100 * found.value, 100 * low, 100 * high)
    return (
        metric_label(found.measure),
        f"{scaled[0]:+.1f} points",
        f"{scaled[1]:+.1f} to {scaled[2]:+.1f}",
    )


def _forgetting(record: ComparisonRecord, labels: Mapping[str, str]) -> Table | None:
    if not record.forgetting:
        return None
    rows = [_forgotten(entry, labels) for entry in record.forgetting]
    head = ["", "seed", "text", "texts", "loss before", "after", "change", "choices before", "choices after"]
    note = (
        "Loss in nats a token on text that no run was tuned for; choices: questions with four options answered right, "
        "by log-likelihood per character (acc_norm of lm-evaluation-harness); guessing gives 25 %."
    )
    return Table(head, rows, frozenset({1, 3, 4, 5, 6, 7, 8}), note)


def _forgotten(entry: Forgetting, labels: Mapping[str, str]) -> list[str]:
    change = entry.general_loss_change
    return [
        _label(labels, entry.arm),
        str(entry.seed),
        entry.source,
        count(entry.loss_rows),
        number(entry.general_loss_before),
        number(entry.general_loss_after),
        ABSENT if change is None else f"{change.value:+.4f}{_bracket(change, '{:+.4f}')}",
        _share(entry.choice_accuracy_before),
        _share(entry.choice_accuracy_after),
    ]


def _serving(record: ComparisonRecord, labels: Mapping[str, str]) -> Table | None:
    served = [(s.arm, s.serving) for s in record.summaries if s.serving is not None]
    if not served:
        return None
    rows = [
        [
            _label(labels, arm),
            duration(serving.load_seconds),
            duration(serving.swap_seconds),
            size(serving.bytes_per_variant),
            _speed(serving.merged_tokens_per_second),
            _speed(serving.unmerged_tokens_per_second),
        ]
        for arm, serving in served
    ]
    head = ["", "load", "swap in", "memory a variant", "tokens / s, merged", "tokens / s, unmerged"]
    note = "On this machine, one request at a time. Swap in: until a server that has the base can answer with it too."
    return Table(head, rows, frozenset(range(1, 6)), note)


def _speed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}"


def _runs(runs: Sequence[RunEntry], labels: Mapping[str, str]) -> Table | None:
    if not runs:
        return None
    rows = [
        [
            _label(labels, run.arm),
            "final" if run.round is None else f"sweep {run.round + 1}",
            _rate(run.learning_rate),
            str(run.seed),
            count(run.steps),
            number(run.eval_loss),
            fraction(run.metric_value),
            duration(run.wall_seconds),
            run.status if run.fault is None else f"{run.status}: {run.fault}",
            run.folder,
        ]
        for run in runs
    ]
    head = ["", "part", "rate", "seed", "steps", "eval loss", "metric", "time", "status", "folder"]
    return Table(head, rows, frozenset({2, 3, 4, 5, 6, 7}))


def _details(record: ComparisonRecord) -> list[tuple[str, Table]]:
    """Settings and lineage: nested facts flattened to ``a.b`` and their values."""
    parts: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("Options", record.options),
        *((f"Arm: {arm.label}", arm.lora_config) for arm in record.arms if arm.lora_config),
        ("Lineage", record.lineage),
        ("Settings that all arms share", record.settings),
        ("Machine", record.machine),
        ("Versions", record.versions),
    )
    return [(title, Table((), list(_flat(facts)))) for title, facts in parts if facts]


def _flat(facts: Mapping[str, Any], before: str = "") -> Iterable[list[str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        elif key.endswith("_bytes") and isinstance(value, int):
            yield [f"{before}{key.removesuffix('_bytes')}", size(value)]
        else:
            yield [f"{before}{key}", value if isinstance(value, str) else _written(value)]


def _written(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(str(item) for item in value) or "none"
    return ABSENT if value is None else json.dumps(value, ensure_ascii=False, default=str)


# Cells


def _shown(value: Any) -> Any:
    """What a template prints: without control characters, which are no HTML, our own pictures apart."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _sample(sample: Any, labels: Mapping[str, str]) -> _Sample:
    said = [] if sample.base is None else [("base, untuned", sample.base)]
    said += [(_label(labels, arm), answer) for arm, answer in sample.answers.items()]
    expected = sample.expected.split()
    answers = [("expected", shorten(sample.expected, _TEXT_CHARACTERS), False)]
    answers += [(who, shorten(text, _TEXT_CHARACTERS), text.split() == expected) for who, text in said]
    return _Sample(shorten(sample.prompt, _TEXT_CHARACTERS), answers)


def _label(labels: Mapping[str, str], arm: str) -> str:
    return labels.get(arm, arm)


def _rate(value: float | None) -> str:
    return ABSENT if value is None else rate_text(value)


def _estimate(found: Estimate | None) -> str:
    return ABSENT if found is None else number(found.value) + _bracket(found, "{:.4f}")


def _bracket(found: Estimate, form: str) -> str:
    if found.interval is None:
        return ""
    low, high = (form.format(bound) for bound in found.interval)
    return f" [{low},{_NO_BREAK}{high}]"


def _share(found: Estimate | None) -> str:
    if found is None:
        return ABSENT
    if found.interval is None:
        return fraction(found.value)
    low, high = found.interval
    return f"{fraction(found.value)} [{100 * low:.1f},{_NO_BREAK}{100 * high:.1f}]"
