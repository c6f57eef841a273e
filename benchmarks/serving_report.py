"""The load test's results as a table and as bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ENGINE_COLOURS = ("#c8102e", "#404040", "#707070", "#989898", "#b8b8b8", "#d8d8d8")


def table(result: Mapping[str, Any]) -> str:
    """Markdown: machine and settings, every point, starts, checks, failures."""
    settings, computer = result["settings"], result["machine"]
    lines = [
        "# Serving under load",
        "",
        f"Measured {result['date']} on {computer['processor']}, {computer['cores']} cores, "
        f"{computer['memory_bytes'] / 2**30:.0f} GiB, by `benchmarks/serve_load.py`. {settings['model']}, float32, "
        f"adapters of rank 8 on seven modules, prompts of 32 tokens, {settings['tokens']} greedy tokens each, "
        f"{settings['threads']} threads; medians of {settings['rounds']} rounds in which the engines took turns. "
        "The client is one process on one core, the same for all, and shares the cores with the server. transformers "
        "and PEFT run batches without a server or client. llama-cpp computes with the quantised weights.",
        "",
        "| engine | models | load | output tokens/s | first token p50 / p99, ms | between tokens p50 / p99, ms | "
        "errors | RSS, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in result["summary"]:
        load = f"{line['clients']} at once" if line["load"] == "closed" else "Poisson, 0.8 of the most"
        lines.append(
            f"| {line['engine']} | {line['scenario']} | {load} | {_number(line['output_tokens_per_second'], 1, 1)} | "
            f"{_number(line['ttft_p50'])} / {_number(line['ttft_p99'])} | {_number(line['inter_token_p50'], 1e3, 1)} / "
            f"{_number(line['inter_token_p99'], 1e3, 1)} | {line['errors']} | {_number(line['rss_bytes'], 1e-6)} |"
        )
    lines += ["", "| engine | start, s |", "|---|---|"]
    lines += [
        f"| {name} | {_number(min(seconds), 1, 1)} |" for name, seconds in result["start_seconds"].items()
    ]
    if result["failures"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {failure['engine']}: {failure['error']}" for failure in result["failures"]]
    if result["checks"]:
        lines += ["", "## Checks of tunesmith", "", "| check | |", "|---|---|"]
        lines += [f"| {name} | {_said(check)} |" for name, check in result["checks"].items()]
    return "\n".join(lines) + "\n"


def _said(check: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in check.items() if not isinstance(value, list) or key == "different"}
    return ", ".join(
        f"{key.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in shown.items()
    )


def _number(value: float | None, times: float = 1e3, digits: int = 0) -> str:
    return "–" if value is None else f"{value * times:.{digits}f}"


def plot(summary: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Bars of output tokens a second with the most clients: one group a scenario, one bar an engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    closed = [line for line in summary if line["load"] == "closed" and line["output_tokens_per_second"]]
    if not closed:
        return
    most = max(line["clients"] for line in closed)
    speeds = {
        (line["engine"], line["scenario"]): line["output_tokens_per_second"]
        for line in closed
        if line["clients"] == most
    }
    engines, scenarios = (list(dict.fromkeys(key[i] for key in speeds)) for i in range(2))
    width = 0.8 / len(engines)
    figure, panel = plt.subplots(figsize=(2 + 1.6 * len(scenarios), 3.6))
    for place, engine in enumerate(engines):
        for group, scenario in enumerate(scenarios):
            if speed := speeds.get((engine, scenario)):
                x = group + (place - (len(engines) - 1) / 2) * width
                bars = panel.bar(x, speed, width, color=_ENGINE_COLOURS[place % len(_ENGINE_COLOURS)])
                panel.bar_label(bars, fmt="%.0f", fontsize=6)
    panel.set_xticks(range(len(scenarios)), scenarios)
    panel.set_ylabel(f"output tokens/s, {most} requests at once")
    panel.spines[["top", "right"]].set_visible(False)
    colours = [_ENGINE_COLOURS[i % len(_ENGINE_COLOURS)] for i in range(len(engines))]
    panel.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colours], engines, fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
