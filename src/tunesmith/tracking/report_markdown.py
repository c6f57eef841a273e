"""The text of ``report.md``: what a run did, for people."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.tracking.events import RunRecord, SampleAnswer, Score
from tunesmith.tracking.formats import (
    ABSENT,
    compare,
    count,
    duration,
    fraction,
    metric_label,
    number,
    same_answer,
    shorten,
    size,
    visible,
)

_SAMPLES = 3
_TEXT_CHARACTERS = 800
# What Markdown would act on inside a line. An underscore within a word is plain text to it, and a
# bracket is unless a link's target follows; both stay readable in the source.
_MARKUP = re.compile(r"[\\`*~$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
_METHODS = {"lora": "LoRA", "full": "Full-parameter"}


def report_markdown(record: RunRecord) -> str:
    """The report in GitHub's Markdown; all text of users and models is shown literally."""
    parts = [
        f"# {_inline(record.tag)}",
        outcome(record),
        *_scores(record),
        *_samples(record.samples),
        "## Loss",
        "![Training and evaluation loss over the steps](loss.png)",
        "## Training",
        _table(("", ""), _facts(record)),
        "## Checkpoint",
        *_checkpoint(record),
        "## Data",
        _data(record),
        "## Versions and machine",
        _table(("", ""), [*record.versions.items(), *_machine(record)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def outcome(record: RunRecord) -> str:
    """What came of the run, in one paragraph."""
    method = _METHODS.get(record.method, record.method)
    ended = {"finished": "finished", "interrupted": "was interrupted", "failed": "failed"}
    text = (
        f"{method} training of {_inline(record.model_id)} on {count(record.rows)} rows "
        f"{ended.get(record.status, record.status)} after {_many(record.steps, 'step')} "
        f"({_many(record.epochs, 'epoch')}) in {duration(record.wall_seconds)}."
    )
    before, after = record.before, record.after
    if after is not None:
        text += f" On {count(after.rows)} held-out rows"
        if before is not None:
            text += f" the loss went from {number(before.loss)} to {number(after.loss)}"
            text += _metric_sentence(before, after)
        else:
            text += f" its loss is {number(after.loss)}"
            if after.metric is not None and after.value is not None:
                text += f" and its {metric_label(after.metric)} {fraction(after.value)}"
        text += "."
    elif record.eval_loss is not None:
        text += f" Its best eval loss is {number(record.eval_loss)}."
    return text


def _metric_sentence(before: Score, after: Score) -> str:
    if after.metric is None or after.metric != before.metric or None in (before.value, after.value):
        return ""
    change = f" and {metric_label(after.metric)} from {fraction(before.value)} to {fraction(after.value)}"
    if before.interval is None or after.interval is None:
        return change
    apart = before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0]
    return change + (
        "; their 95 % intervals do not overlap"
        if apart
        else "; their 95 % intervals overlap, so this change may be chance"
    )


def _scores(record: RunRecord) -> list[str]:
    lines = compare(record.before, record.after)
    if record.before is None and record.after is None:
        return []
    rows = [(line.label, line.before, line.after, line.change) for line in lines]
    note = "Numbers in brackets are 95 % intervals."
    scored = any(score is not None and score.interval is not None for score in (record.before, record.after))
    table = _table(("", "base", "tuned", "change"), rows)
    return ["## Before and after", table, note if scored else ""]


def _samples(samples: Sequence[SampleAnswer]) -> list[str]:
    if not samples:
        return []
    rows = []
    for sample in samples[:_SAMPLES]:
        right = " ✓" if same_answer(sample.expected, sample.after) else ""
        before = ABSENT if sample.before is None else _cell(sample.before)
        rows.append((_cell(sample.prompt), _cell(sample.expected), before, _cell(sample.after) + right))
    lines = [_row(("prompt", "expected", "base", "tuned")), "|---|---|---|---|", *map(_row, rows)]
    note = "✓: equal to the expected answer, whitespace aside."
    return ["## Sample answers", "\n".join(lines), note]


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    share = record.trainable_parameters / record.total_parameters if record.total_parameters else 0.0
    predicted = record.predicted_peak_rss_bytes
    peak = size(record.peak_rss_bytes)
    return [
        ("method", _METHODS.get(record.method, record.method)),
        ("base model", record.model_id),
        ("task", record.task),
        ("status", record.status),
        ("steps", count(record.steps)),
        ("epochs", count(record.epochs)),
        ("rows", count(record.rows)),
        ("wall time", duration(record.wall_seconds)),
        ("time to first step", duration(record.seconds_to_first_step)),
        (
            "tokens of the rows",
            f"{count(record.real_tokens)} ({count(record.real_tokens_per_second)} a second)",
        ),
        (
            "trained tokens",
            f"{count(record.trained_tokens)} ({count(record.trained_tokens_per_second)} a second)",
        ),
        ("peak memory", peak if predicted is None else f"{peak} (planned: {size(predicted)})"),
        (
            "trained parameters",
            f"{count(record.trainable_parameters)} of {count(record.total_parameters)} ({100 * share:.3g} %)",
        ),
        ("best eval loss", number(record.eval_loss)),
        ("its perplexity", number(record.perplexity)),
    ]


def _checkpoint(record: RunRecord) -> list[str]:
    if record.best_checkpoint is None:
        return ["No checkpoint was saved."]
    text = f"Best checkpoint is stored in: {_code(record.best_checkpoint)}"
    return [text if record.checkpoint_bytes is None else f"{text} ({size(record.checkpoint_bytes)})"]


def _data(record: RunRecord) -> str:
    rows = []
    for split, facts in record.data.items():
        known = facts.get("rows")
        number_of_rows = count(known) if isinstance(known, int) else ABSENT
        rows.append((split, facts.get("path", ABSENT), number_of_rows, facts.get("sha256", ABSENT)))
    return _table(("split", "path", "rows", "SHA-256"), rows) if rows else "None recorded."


def _machine(record: RunRecord) -> list[tuple[str, Any]]:
    """The machine's facts; those counted in bytes in units people read."""
    facts: list[tuple[str, Any]] = []
    for key, value in record.machine.items():
        in_bytes = key.endswith("_bytes") and isinstance(value, int)
        facts.append((metric_label(key.removesuffix("_bytes")), size(value) if in_bytes else value))
    return facts


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of plain values, each escaped."""
    lines = [_row(heads), "|" + "---|" * len(heads)]
    lines += [_row([_inline(str(value)) for value in row]) for row in rows]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Text of a model in a table cell: literal, its line breaks kept."""
    return _inline(shorten(text.strip(), _TEXT_CHARACTERS)) or "(empty)"


def _inline(text: str) -> str:
    """``text`` so that Markdown shows it as it is, on one line of source."""
    safe = _MARKUP.sub(r"\\\g<0>", html.escape(visible(text), quote=False))
    return safe.replace("|", "&#124;").replace("\n", "<br>")


def _code(path: str) -> str:
    """A path as code, to be copied; longer fences where it holds a backtick."""
    path = visible(path).replace("\n", "\\n")
    return f"`` {path} ``" if "`" in path else f"`{path}`"


def _many(number_of: int, noun: str) -> str:
    return f"{count(number_of)} {noun}" + ("" if number_of == 1 else "s")
