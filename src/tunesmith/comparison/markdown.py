"""``report.md`` of a comparison: the verdict and its tables, for people."""

import re
from collections.abc import Callable, Iterable, Sequence

from tunesmith.comparison.record import ArmSummary, ComparisonRecord, Estimate
from tunesmith.tracking.formats import ABSENT, count, duration, metric_label, number, shorten, size, visible

_MARKUP = re.compile(r"([\\`*_~$|<>&\[\]])")


def comparison_markdown(record: ComparisonRecord) -> str:
    """The report in GitHub's Markdown; texts of users and models are shown literally."""
    parts = [f"# {_inline(record.name)}", _state(record)]
    if record.verdict is not None:
        parts += [f"**{_inline(record.verdict.headline)}**"]
        parts += ["\n".join(f"- {_inline(text)}" for text in record.verdict.sentences)]
        parts += ["## Which to take"]
        rows = [
            [a.use, _label(record, a.arm) if a.arm else "not shown", _inline(a.reason)]
            for a in record.verdict.advice
        ]
        parts += [_table(["for", "arm", "because"], rows)]
    parts += ["## Arms", _table(["", *(_inline(arm.label) for arm in record.arms)], _facts(record))]
    if record.sweep:
        rows = [
            [
                _label(record, p.arm),
                str(p.round + 1),
                f"{p.learning_rate:g}",
                count(p.steps),
                _loss(p.eval_loss),
                "kept" if p.kept else "",
            ]
            for p in record.sweep
        ]
        parts += ["## Learning rates", _table(["arm", "round", "rate", "steps", "eval loss", ""], rows)]
    if record.forgetting:
        parts += ["## Forgetting", _forgetting(record)]
    if record.samples:
        parts += ["## Answers", *_samples(record)]
    if record.notes:
        parts += ["## To know", "\n".join(f"- {_inline(note)}" for note in record.notes)]
    return "\n\n".join(parts) + "\n"


def _state(record: ComparisonRecord) -> str:
    done = f"{record.runs_done} trainings" if record.status == "finished" else (
        f"{record.runs_done} of {record.runs_planned} trainings, {record.status}"
    )  # fmt: skip
    return (
        f"{_inline(record.model_id)} on {count(record.rows)} held-out rows; {done}, "
        f"{duration(record.seconds)} of training."
    )


def _facts(record: ComparisonRecord) -> list[list[str]]:
    by_arm = {summary.arm: summary for summary in record.summaries}

    def row(label: str, show: Callable[[ArmSummary], str]) -> list[str]:
        found = (by_arm.get(arm.name) for arm in record.arms)
        return [label, *(show(s) if s is not None else ABSENT for s in found)]

    metric = metric_label(record.metric) if record.metric else ""
    rows = [row("learning rate", lambda s: f"{s.learning_rate:g}" if s.learning_rate else ABSENT)]
    if record.metric:
        rows.append(row(f"{metric} [95 %]", lambda s: _estimate(s.metric, lambda v: f"{100 * v:.1f} %")))
    rows += [
        row("eval loss [95 %]", lambda s: _estimate(s.eval_loss, number)),
        row("seeds", lambda s: str(len(s.seeds))),
        row("training", lambda s: duration(s.training_seconds)),
        row("whole run", lambda s: duration(s.wall_seconds)),
        row("tokens/s", lambda s: count(s.tokens_per_second)),
        row("peak memory", lambda s: size(s.peak_memory_bytes)),
        row("trained parameters", lambda s: count(s.trainable_parameters)),
        row("checkpoint", lambda s: size(s.checkpoint_bytes)),
        row("load in the server", lambda s: duration(s.serving.load_seconds if s.serving else None)),
        row("swap in the server", lambda s: duration(s.serving.swap_seconds if s.serving else None)),
        row(
            "memory of each further model", lambda s: size(s.serving.bytes_per_variant if s.serving else None)
        ),
        row("answers, tokens/s", lambda s: _serving(s)),
    ]
    if record.price_per_hour is not None:
        rows.append(
            row("cost of a run", lambda s: ABSENT if s.training_cost is None else f"{s.training_cost:.4g}")
        )
    return rows


def _serving(summary: ArmSummary) -> str:
    serving = summary.serving
    if serving is None:
        return ABSENT
    if serving.unmerged_tokens_per_second is None:
        return count(serving.merged_tokens_per_second)
    return f"{count(serving.merged_tokens_per_second)} merged, {count(serving.unmerged_tokens_per_second)} unmerged"


def _forgetting(record: ComparisonRecord) -> str:
    rows = []
    for entry in record.forgetting:
        before, after = entry.choice_accuracy_before, entry.choice_accuracy_after
        change = entry.general_loss_change
        rows.append(
            [
                _label(record, entry.arm),
                str(entry.seed),
                _inline(entry.source),
                number(entry.general_loss_before),
                number(entry.general_loss_after),
                _estimate(change, lambda v: f"{v:+.4f}"),
                _estimate(before, lambda v: f"{100 * v:.0f} %"),
                _estimate(after, lambda v: f"{100 * v:.0f} %"),
            ]
        )
    heads = ["arm", "seed", "text", "loss before", "after", "change", "choices before", "after"]
    return _table(heads, rows)


def _samples(record: ComparisonRecord) -> Iterable[str]:
    for sample in record.samples:
        rows = [["asked", _text(sample.prompt)], ["expected", _text(sample.expected)]]
        if sample.base is not None:
            rows.append(["base", _text(sample.base)])
        rows += [[_label(record, arm), _text(answer)] for arm, answer in sample.answers.items()]
        yield _table(["", ""], rows)


def _text(value: str) -> str:
    return _inline(shorten(value, 300)).replace("\n", "<br>")


def _label(record: ComparisonRecord, name: str) -> str:
    return _inline(next((arm.label for arm in record.arms if arm.name == name), name))


def _estimate(value: Estimate | None, show: Callable[[float], str]) -> str:
    if value is None:
        return ABSENT
    if value.interval is None:
        return show(value.value)
    return f"{show(value.value)} \\[{show(value.interval[0])}, {show(value.interval[1])}\\]"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else number(value)


def _inline(text: str) -> str:
    return _MARKUP.sub(r"\\\1", visible(text))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
