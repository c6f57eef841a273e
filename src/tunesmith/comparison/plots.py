"""The pictures of a comparison as SVG that stands inside a page: text stays text, colours follow the page.

Each picture is drawn with placeholder colours, which are then replaced by the page's own, so that it is readable on
light and dark ground. Arms differ in colour, line and marker, and are named beside their lines. Equal records give
equal bytes.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from tunesmith.comparison.record import ArmSummary, ComparisonRecord, Forgetting, LossPoint, SweepPoint
from tunesmith.tracking.formats import count, duration, metric_label, shorten, size, visible
from tunesmith.tracking.loss_plot import smoothed

# Placeholders, replaced by what the page's style sheet names so. No picture has these colours by chance.
_INK, _FAINT, _GROUND = "#010203", "#040506", "#070809"
_ARMS = tuple(f"#0a0b{number:02x}" for number in range(6))
_PAGE_COLOURS = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    _GROUND: "var(--ground)",
    **{colour: f"var(--arm-{number})" for number, colour in enumerate(_ARMS)},
}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = "osD^vP"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "figure.facecolor": "none",
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_LABEL_CHARACTERS = 26
_MOST_POINTS = 400  # of one line: more than its part of the picture has columns


@dataclass(frozen=True)
class Plot:
    """A picture: ``svg`` is one element, safe to stand in a page; ``caption`` says how to read it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class _Look:
    label: str
    colour: str
    dash: Any
    marker: str


def plots(record: ComparisonRecord) -> list[Plot]:
    """The pictures for which ``record`` has numbers, in the order of the report."""
    looks = {
        arm.name: _Look(
            shorten(visible(arm.label), _LABEL_CHARACTERS),
            _ARMS[number % len(_ARMS)],
            _DASHES[(number + number // len(_ARMS)) % len(_DASHES)],
            _MARKERS[number % len(_MARKERS)],
        )
        for number, arm in enumerate(record.arms)
    }
    drawers: tuple[Callable[[ComparisonRecord, dict[str, _Look]], Plot | None], ...] = (
        _loss_curves,
        _rates,
        _forgetting,
        _costs,
    )
    with matplotlib.rc_context(_STYLE):
        return [plot for draw in drawers if (plot := draw(record, looks)) is not None]


# Loss curves


def _loss_curves(record: ComparisonRecord, looks: dict[str, _Look]) -> Plot | None:
    finals = [run for run in record.runs if run.purpose == "final" and run.arm in looks]
    drawn = [run for run in finals if run.eval_curve or run.train_curve]
    if not drawn:
        return None
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends: dict[str, list[tuple[float, float]]] = {}
    for run in drawn:
        look = looks[run.arm]
        line = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.4, "alpha": 0.85}
        training = _thinned([(s, v) for s, v in smoothed([(p.step, p.loss) for p in run.train_curve])])
        if training:
            left.plot(*zip(*training, strict=True), **line)
        held_out = _finite(run.eval_curve)
        if held_out:
            right.plot(
                *zip(*held_out, strict=True),
                **line,
                marker=look.marker,
                markersize=4 if len(held_out) < 30 else 0,
            )
            ends.setdefault(run.arm, []).append(held_out[-1])
    left.set(title="training rows, smoothed", xlabel="step", ylabel="loss (nats per trained token)")
    right.set(title="held-out rows", xlabel="step")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axes in (left, right):
        _spread_losses(axes, [y for line in axes.lines for y in line.get_ydata()])
    _name_ends(right, [(fmean(y for _, y in points), looks[arm]) for arm, points in ends.items()])
    best = [
        f"{looks[s.arm].label} ends at {s.eval_loss.value:.4f}"
        for s in record.summaries
        if s.arm in looks and s.eval_loss is not None
    ]
    described = (
        f"Loss over the steps of {len(drawn)} final runs, one line a seed. {'; '.join(best)}".rstrip() + "."
    )
    caption = (
        "One line for each seed, at each arm's chosen rate. Lower is better; a held-out line that turns up "
        "shows overfitting."
    )
    return Plot("Loss curves", _svg(figure, "curves", "Loss curves of all arms", described), caption)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, _Look]]) -> None:
    """Names beside the last points, moved apart where they would overlap."""
    line = 0.075  # of the axes' height
    to_axes = axes.transScale + axes.transLimits
    ordered = sorted(((to_axes.transform((1, y))[1], look) for y, look in ends), key=lambda end: end[0])
    places = [place for place, _ in ordered]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + line)
    above = max(0.0, max(places, default=0.0) - 1)
    for place, (_, look) in zip(places, ordered, strict=True):
        axes.annotate(
            look.label,
            (1, place - above),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=look.colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


# Quality against learning rate


def _rates(record: ComparisonRecord, looks: dict[str, _Look]) -> Plot | None:
    points = [point for point in record.sweep if point.arm in looks]
    if not any(point.eval_loss is not None for point in points):
        return None
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    chosen_texts, chosen_points = [], []
    for arm, look in looks.items():
        mine = [point for point in points if point.arm == arm]
        last = max((point.round for point in mine), default=0)
        for number, group in groupby(
            sorted(mine, key=lambda p: (p.round, p.learning_rate)), lambda p: p.round
        ):
            row = [(p.learning_rate, p.eval_loss) for p in group if p.eval_loss is not None]
            if not row:
                continue
            is_last = number == last
            axes.plot(
                *zip(*row, strict=True),
                color=look.colour,
                linestyle=look.dash,
                linewidth=1.5 if is_last else 0.9,
                marker=look.marker,
                markersize=6 if is_last else 4,
                markerfacecolor=look.colour if is_last else _GROUND,
                alpha=1.0 if is_last else 0.65,
            )
        best = next((p for p in mine if p.round == last and p.kept and p.eval_loss is not None), None)
        if best is not None and best.eval_loss is not None:
            axes.plot(
                [best.learning_rate],
                [best.eval_loss],
                marker="*",
                markersize=17,
                color=look.colour,
                markeredgecolor=_INK,
                markeredgewidth=0.8,
                zorder=5,
            )
            chosen_points.append(
                (best.learning_rate, best.eval_loss, f"{look.label}: {rate_text(best.learning_rate)}", look)
            )
            chosen_texts.append(
                f"{look.label} {rate_text(best.learning_rate)} with eval loss {best.eval_loss:.4f}"
            )
        _mark_failed(axes, [p for p in mine if p.eval_loss is None], look)
    _spread_losses(axes, [p.eval_loss for p in points if p.eval_loss is not None])
    axes.margins(x=0.06, y=0.14)
    _name_points(axes, chosen_points)
    axes.set(xlabel="learning rate (logarithmic)", ylabel="eval loss (nats per trained token)")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: rate_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    described = f"Eval loss at each learning rate tried. Chosen: {'; '.join(chosen_texts) or 'none'}."
    caption = (
        "Stars: the chosen rates. Filled points are of the last round of each sweep, hollow ones of shorter rounds "
        "before it, whose losses are higher because they trained for fewer steps. A cross at the top: the run failed."
    )
    return Plot(
        "Quality against learning rate", _svg(figure, "rates", "Eval loss by rate", described), caption
    )


def _mark_failed(axes: Axes, failed: Iterable[SweepPoint], look: _Look) -> None:
    for rate in sorted({point.learning_rate for point in failed}):
        axes.plot([rate], [1], "x", transform=axes.get_xaxis_transform(), color=look.colour, clip_on=False)


def _spread_losses(axes: Axes, losses: Sequence[float]) -> None:
    """A logarithmic axis where a rate far too high would press all others together."""
    if losses and min(losses) > 0 and max(losses) > 4 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def rate_text(value: float) -> str:
    """``1e-4`` and ``2.5e-5``; from 0.01 on ``0.03``."""
    if value >= 0.01 or value <= 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# Forgetting against gain


def _forgetting(record: ComparisonRecord, looks: dict[str, _Look]) -> Plot | None:
    source = next((entry.source for entry in record.forgetting), None)
    entries = [e for e in record.forgetting if e.source == source and e.arm in looks]
    gains = {s.arm: gain for s in record.summaries if (gain := _gain(record, s)) is not None}
    entries = [entry for entry in entries if entry.arm in gains]
    if not entries:
        return None
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    axes = figure.subplots()
    named, told = [], []
    for arm, look in looks.items():
        mine = [entry for entry in entries if entry.arm == arm]
        if not mine:
            continue
        x, y = gains[arm], fmean(_lost(entry) for entry in mine)
        for index, entry in enumerate(mine):
            across = (index - (len(mine) - 1) / 2) * 7  # seeds beside each other, points apart
            moved = axes.transData + ScaledTranslation(across / 72, 0, figure.dpi_scale_trans)
            change = entry.general_loss_change
            if change is not None and change.interval is not None:
                axes.plot(
                    [x, x], change.interval, color=look.colour, alpha=0.5, linewidth=1.2, transform=moved
                )
            axes.plot(
                [x], [_lost(entry)], look.marker, color=look.colour, markersize=4, alpha=0.7, transform=moved
            )
            axes.update_datalim(
                [(x, value) for value in (change.interval if change and change.interval else ())]
            )
        axes.plot([x], [y], look.marker, color=look.colour, markersize=10, markeredgecolor=_INK)
        named.append((x, y, look.label, look))
        told.append(f"{look.label} gained {x:.4g} and its general loss changed by {y:+.4f}")
    axes.margins(x=0.18, y=0.15)
    axes.autoscale_view()
    axes.axhline(0, color=_INK, linewidth=0.9)
    _name_points(axes, named)
    axes.set(
        xlabel=_gain_label(record), ylabel="change of general loss\n(nats per token; above 0: forgotten)"
    )
    described = f"Forgetting against gain, text: {source}. {'; '.join(told)}."
    caption = (
        f"Right is better on your rows, low is better on general text ({_source_name(source)}). Large: mean over "
        "seeds; small: each seed, with its 95 % interval over the texts."
    )
    return Plot("Forgetting against gain", _svg(figure, "forgetting", "Forgetting", described), caption)


def _gain(record: ComparisonRecord, summary: ArmSummary) -> float | None:
    """Points of the task metric where there is one, else nats of eval loss; against the untuned base."""
    base = record.base
    if base is None:
        return None
    if base.metric is not None and summary.metric is not None:
        return 100 * (summary.metric.value - base.metric.value)
    if base.eval_loss is not None and summary.eval_loss is not None:
        return base.eval_loss - summary.eval_loss.value
    return None


def _gain_label(record: ComparisonRecord) -> str:
    if record.metric is not None and record.base is not None and record.base.metric is not None:
        return f"gain in {metric_label(record.metric)} over the base (points)"
    return "gain: eval loss of the base minus that of the arm (nats per trained token)"


def _lost(entry: Forgetting) -> float:
    return entry.general_loss_after - entry.general_loss_before


def _source_name(source: str | None) -> str:
    return "the shipped set" if source == "shipped" else str(source)


# Bars


def _costs(record: ComparisonRecord, looks: dict[str, _Look]) -> Plot | None:
    measures: tuple[tuple[str, Callable[[ArmSummary], float | None], Callable[[float | None], str]], ...] = (
        ("peak memory", lambda s: s.peak_memory_bytes, size),
        ("time of one run", lambda s: s.wall_seconds, duration),
        ("checkpoint on disk", lambda s: s.checkpoint_bytes, size),
        ("tokens a second", lambda s: s.tokens_per_second, count),
    )
    summaries = [s for s in record.summaries if s.arm in looks]
    shown = [m for m in measures if any(m[1](s) is not None for s in summaries)]
    if not shown:
        return None
    figure = Figure(figsize=(9.2, 0.9 + 0.42 * len(summaries)), layout="constrained")
    told = []
    for index, (axes, (name, read, written)) in enumerate(
        zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True)
    ):
        values = [read(summary) for summary in summaries]
        top = max(value for value in values if value is not None) or 1.0
        for row, (summary, value) in enumerate(zip(summaries, values, strict=True)):
            look = looks[summary.arm]
            axes.barh(row, (value or 0) / top, color=look.colour, height=0.62)
            text = "not measured" if value is None else written(value)
            inside = value is not None and value / top > 0.55
            axes.text(
                value / top - 0.03 if inside and value else (value or 0) / top + 0.03,
                row,
                text,
                va="center",
                ha="right" if inside else "left",
                color=_GROUND if inside else _INK,
                fontsize=9,
            )
            told.append(f"{look.label}, {name}: {text}")
        axes.set(title=name, xlim=(0, 1.02), xticks=[])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0, labelleft=index == 0)
    axes.set_yticks(range(len(summaries)), [looks[s.arm].label for s in summaries])  # shared by all panels
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    caption = (
        "Means over the final runs; peak memory is the largest. Each panel has a scale of its own, from zero."
    )
    return Plot("Memory, time and size", _svg(figure, "costs", "Costs", "; ".join(told) + "."), caption)


# Common parts


def _name_points(axes: Axes, points: Sequence[tuple[float, float, str, _Look]]) -> None:
    """Names beside points: on the side with more room, moved apart where two would stand in one place."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # final from here on
    width, height = 9.2 * 72 * 0.85, 3.8 * 72 * 0.78  # of the axes, about, in points
    to_axes = axes.transScale + axes.transLimits
    places = [to_axes.transform((x, y)) * (width, height) for x, y, _, _ in points]
    taken = [(x - 9, x + 9, y - 9, y + 9) for x, y in places]
    for x, y, label, look in sorted(points, key=lambda point: -point[1]):
        at_x, at_y = to_axes.transform((x, y))
        to_left = at_x > 0.6
        long = 6.6 * len(label)
        for dy in (0, 15, -15, 30, -30, 45, -45, 60):
            low = at_y * height + dy
            begin = at_x * width - 12 - long if to_left else at_x * width + 12
            box = (begin, begin + long, low - 7, low + 7)
            free = all(box[1] < b[0] or b[1] < box[0] or box[3] < b[2] or b[3] < box[2] for b in taken)
            if free and 4 < low < height - 4:
                break
        taken.append(box)
        axes.annotate(
            label,
            (x, y),
            xytext=(-12 if to_left else 12, dy),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="center",
            color=look.colour,
            fontweight="bold",
            annotation_clip=False,
        )


def _finite(curve: Iterable[LossPoint]) -> list[tuple[float, float]]:
    return [(point.step, point.loss) for point in curve if math.isfinite(point.loss)]


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    stride = math.ceil(len(points) / _MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """``figure`` as an ``svg`` element with a text alternative, its ids its own within a page."""
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", message="Glyph")  # a label may be in a script the font lacks
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<text (?=style="[^"]*\b(700|bold)\b)', '<text class="name" ', text)
    # Verdana is as wide, so that nothing overlaps where DejaVu is not installed.
    text = text.replace("font-family: 'DejaVu Sans'", "font-family: 'DejaVu Sans', Verdana, sans-serif")
    for placeholder, colour in _PAGE_COLOURS.items():
        text = text.replace(placeholder, colour)
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    opening = (
        f'<svg {view[0]} role="img" aria-labelledby="{name}-title {name}-desc" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    described = escape(visible(description))
    said = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{described}</desc>'
    return f"{opening}\n{said}{body}"
