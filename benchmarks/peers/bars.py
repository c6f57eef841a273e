"""Bars of tokens a second: one panel a data set, one group a method, one bar a trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.summary import OURS


def plot(summary: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Write a PNG; trainers without a measured run in a panel leave a gap there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = {(r["data"], r["method"], r["trainer"]): r for r in summary if r["runs"]}
    if not measured:
        return
    datasets, methods, trainers = (list(dict.fromkeys(key[i] for key in measured)) for i in range(3))
    trainers.sort(key=lambda name: name != OURS)
    colours = ["#c8102e", *plt.get_cmap("Greys")([0.75, 0.62, 0.5, 0.38, 0.28, 0.2])]
    width = 0.8 / len(trainers)
    size = (1.5 + 2.6 * len(datasets), 3.6)
    figure, panels = plt.subplots(1, len(datasets), figsize=size, sharey=True, squeeze=False)
    for panel, data in zip(panels[0], datasets, strict=True):
        for place, trainer in enumerate(trainers):
            for group, method in enumerate(methods):
                if row := measured.get((data, method, trainer)):
                    x = group + (place - (len(trainers) - 1) / 2) * width
                    bars = panel.bar(x, row["real_tokens_per_second"], width, color=colours[place % 7])
                    panel.bar_label(bars, fmt="%.0f", fontsize=6)
        panel.set_title(data, fontsize=10)
        panel.set_xticks(range(len(methods)), methods)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("real tokens/s")
    columns = min(len(trainers), 2 + 2 * len(datasets))
    legend_height = 0.07 * -(-len(trainers) // columns)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[i % 7]) for i in range(len(trainers))]
    figure.legend(handles, trainers, loc="lower center", ncol=columns, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, legend_height, 1, 1))
    figure.savefig(target, dpi=110)
    plt.close(figure)
