"""From single runs to medians, ratios and tables."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

OURS = "tunesmith"
Run = Mapping[str, Any]
_MEDIANS = (
    "real_tokens_per_second",
    "trained_tokens_per_second",
    "seconds_per_step",
    "peak_rss_bytes",
    "seconds_to_first_step_done",
    "matmul_efficiency",
)


def speed_facts(
    step_ends: Sequence[float], real_tokens: Sequence[int], trained_tokens: Sequence[int]
) -> dict[str, float]:
    """Speed from the end of the first step, which warms up, to the end of the last.

    Args:
        step_ends: seconds on one clock, one a step, two or more.
        real_tokens, trained_tokens: of each step.

    Raises:
        ValueError: there are fewer than two steps.
    """
    if len(step_ends) < 2:
        raise ValueError("speed needs at least two finished steps")
    seconds = step_ends[-1] - step_ends[0]
    count = len(step_ends)
    return {
        "real_tokens_per_second": sum(real_tokens[1:count]) / seconds,
        "trained_tokens_per_second": sum(trained_tokens[1:count]) / seconds,
        "seconds_per_step": seconds / (count - 1),
    }


def summarise(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """One row for each data set, method and trainer: medians, and how our speed compares.

    ``ratio`` is our median speed by the peer's, ``pair_ratios`` the same for the two runs of each round; above 1
    we are faster. A trainer whose every run failed has only its ``error``.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["data"], run["method"], run["trainer"]), []).append(run)
    rows = []
    for (data, method, trainer), members in groups.items():
        row: dict[str, Any] = {"data": data, "method": method, "trainer": trainer}
        good = [run for run in members if not run["error"]]
        if not good:
            rows.append(row | {"runs": 0, "error": members[-1]["error"]})
            continue
        row |= {"runs": len(good), "error": next((r["error"] for r in members if r["error"]), None)}
        for key in _MEDIANS:
            values = [run[key] for run in good if run.get(key) is not None]
            row[key] = median(values) if values else None
        row["same_loss"] = all(run.get("same_loss") is not False for run in good)
        if trainer != OURS:
            ours = [run for run in groups.get((data, method, OURS), []) if not run["error"]]
            row |= compared(ours, good)
        rows.append(row)
    return rows


def compared(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    """Ratio of median speeds, and the ratio of each round in which both ran."""
    if not ours or not theirs:
        return {"ratio": None, "pair_ratios": []}
    key = "real_tokens_per_second"
    by_round = {run["pair"]: run[key] for run in theirs}
    pairs = [run[key] / by_round[run["pair"]] for run in ours if run["pair"] in by_round]
    ratio = median(run[key] for run in ours) / median(run[key] for run in theirs)
    return {"ratio": ratio, "pair_ratios": pairs}


def best_peers(summary: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(data, method) -> the summary row of the fastest peer."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in summary:
        if row["trainer"] == OURS or not row["runs"]:
            continue
        place = (row["data"], row["method"])
        if place not in best or row["real_tokens_per_second"] > best[place]["real_tokens_per_second"]:
            best[place] = row
    return best


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: facts, speeds, and what did not run and why."""
    settings, machine = result["settings"], result["machine"]
    lines = [
        "# Training speed beside other trainers",
        "",
        f"Measured {result['date']} on {machine['processor']}, {settings['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, by `benchmarks/train_vs_peers.py`. "
        f"{settings['model']}, {settings['steps']} steps of {settings['rows_per_step']} rows, float32, the same "
        f"token ids and labels in the same steps for all; the first step is not timed. Medians of up to "
        f"{settings['pairs']} rounds in which the trainers took turns. Ratio: tunesmith's speed by the peer's, "
        "in brackets the lowest and highest of a round.",
        "",
        "| data | method | trainer | real tokens/s | trained tokens/s | s/step | peak GB "
        "| first step done, s | GEMM efficiency | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    measured = [row for row in result["summary"] if row["runs"]]
    lines += [_speed_line(row) for row in measured]
    best = best_peers(measured)
    ratios = [(place, row) for place, row in best.items() if row.get("ratio") is not None]
    if ratios:
        lines += ["", "Against the fastest peer of each line:", ""]
        lines += [
            f"- {data}, {method}: {row['ratio']:.2f} times {row['trainer']}" for (data, method), row in ratios
        ]
    if others := [row for row in measured if not row["same_loss"]]:
        lines += ["", "The loss of the first step was not ours, so these trained something else:", ""]
        lines += [f"- {row['data']}, {row['method']}: {row['trainer']}" for row in others]
    lines += ["", "## Versions", "", "| trainer | packages |", "|---|---|"]
    for name, found in result["versions"].items():
        lines.append(f"| {name} | {', '.join(f'{k} {v}' for k, v in found.items())} |")
    failed = [row for row in result["summary"] if row["error"]]
    if failed:
        lines += ["", f"## Not measured, or not in every round ({result['date']})", ""]
        lines += ["| data | method | trainer | error |", "|---|---|---|---|"]
        lines += [
            f"| {row['data']} | {row['method']} | {row['trainer']} | {_cell(row['error'])} |"
            for row in failed
        ]
    return "\n".join(lines) + "\n"


def _speed_line(row: Mapping[str, Any]) -> str:
    efficiency, ratio = row.get("matmul_efficiency"), row.get("ratio")
    pairs = row.get("pair_ratios") or []
    spread = f" [{min(pairs):.2f}, {max(pairs):.2f}]" if pairs else ""
    cells = [
        row["data"],
        row["method"],
        row["trainer"],
        f"{row['real_tokens_per_second']:.1f}",
        f"{row['trained_tokens_per_second']:.1f}",
        f"{row['seconds_per_step']:.2f}",
        f"{row['peak_rss_bytes'] / 1e9:.1f}",
        f"{row['seconds_to_first_step_done']:.1f}",
        f"{efficiency:.0%}" if efficiency is not None else "–",
        f"{ratio:.2f}{spread}" if ratio is not None else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
