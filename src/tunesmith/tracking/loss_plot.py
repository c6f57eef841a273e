"""``loss.png``: training loss, evaluation loss and learning rate over the steps of a run."""

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# Okabe and Ito's palette, told apart with every common kind of colour vision.
_TRAIN, _EVAL, _RATE = "#0072B2", "#D55E00", "#555555"
_COLOURS = 96  # enough for smooth edges, and a third of the size of true colour
_MAX_POINTS = 2000  # more than the picture has columns


def loss_png(events: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """The picture as PNG bytes (1100 x 660 pixels) of ``events`` as ``read_events`` gives them.

    Where a resumed run has repeated a step, its last value counts. Values that are not finite
    leave a gap (in runs of more than 2000 steps they are left out).
    """
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    figure.suptitle(title, parse_math=False, fontsize=12)
    train = _series(events, "step", "train_loss_batch")
    held_out = _series(events, "eval", "eval_loss")
    if train or held_out:
        _draw_losses(upper, train, held_out)
        upper.legend(frameon=False)
    else:
        upper.text(0.5, 0.5, "no step was completed", ha="center", va="center", transform=upper.transAxes)
    rate = _thinned(_series(events, "step", "learning_rate"))
    lower.plot([step for step, _ in rate], [value for _, value in rate], color=_RATE, linewidth=1.3)
    lower.set(xlabel="step", ylabel="learning\nrate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a tag may be in a script the font lacks
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(_COLOURS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw_losses(
    axes: Axes, train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]
) -> None:
    raw, smooth = _thinned(train), _thinned(smoothed(train))
    if raw:
        axes.plot(*_columns(raw), color=_TRAIN, alpha=0.3, linewidth=0.9, label="train, each step")
        axes.plot(*_columns(smooth), color=_TRAIN, linewidth=1.8, label="train, smoothed")
    finite = [point for point in held_out if math.isfinite(point[1])]
    if finite:
        axes.plot(*_columns(finite), color=_EVAL, marker="o", markersize=5, linewidth=1, label="eval")
        step, loss = min(finite, key=lambda point: point[1])
        label = f"best eval: {loss:.4f} at step {step}"
        axes.plot(
            [step], [loss], "*", color=_EVAL, markersize=17, markeredgecolor="black", label=label, zorder=5
        )
    axes.set_ylabel("loss (nats per trained token)")


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average over about a twentieth of the run, at least five steps.

    The start is corrected for bias as in Adam (Kingma and Ba 2015), so the first value is the first
    loss. Values that are not finite are skipped.
    """
    keep = 1 - 2 / (max(5, len(points) / 20) + 1)
    total, weight, result = 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            total = keep * total + (1 - keep) * value
            weight = keep * weight + (1 - keep)
            result.append((step, total / weight))
    return result


def _series(events: Iterable[Mapping[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    last = {int(event["step"]): float(event[name]) for event in events if event.get("event") == kind}
    return sorted(last.items())


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Long series cut to the lowest and the highest point of each stretch, at most 2000 in all."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stride = math.ceil(2 * len(points) / _MAX_POINTS)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), stride):
        part = [point for point in points[start : start + stride] if math.isfinite(point[1])]
        if not part:
            continue
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
