"""Arrivals, choices of a model and summaries of a load test: pure functions of the standard library."""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from statistics import median
from typing import Any

# What a point of two rounds is a median of.
NUMBERS = (
    "output_tokens_per_second", "requests_per_second", "ttft_p50", "ttft_p99", "inter_token_p50", "inter_token_p99",
    "request_p50", "request_p99", "rss_bytes", "client_cpu_share",
)  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` (0 to 1) of ``values`` lie, between neighbours in proportion; None of none.

    The definition of numpy's default (Hyndman and Fan 1996, type 7).
    """
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which ``count`` requests arrive, ``rate`` a second on average, each independent of the others."""
    if rate <= 0:
        raise ValueError("a rate of arrivals is above 0")
    generator = random.Random(seed)
    return list(accumulate(generator.expovariate(rate) for _ in range(count)))


def zipf_weights(count: int, exponent: float = 1.0) -> list[float]:
    """Chances of the first, second, ... of ``count`` things, each in proportion to 1 / rank ** exponent."""
    raw = [1 / rank**exponent for rank in range(1, count + 1)]
    total = sum(raw)
    return [weight / total for weight in raw]


def models_of(scenario: str, adapters: Sequence[str], count: int, seed: int) -> list[str | None]:
    """The model of each of ``count`` requests; None is the base.

    Args:
        scenario: "base"; "one": the first adapter; "mixed8": the first 8 in turn, so that neighbours differ;
            "uniform16" and "zipf16": drawn from the first 16.
        adapters: names; with fewer than the scenario speaks of, all there are.
        count: of requests.
        seed: of the draw.
    """
    generator = random.Random(seed)
    if scenario == "base":
        return [None] * count
    if scenario == "one":
        return [adapters[0]] * count
    if scenario == "mixed8":
        return [adapters[number % min(8, len(adapters))] for number in range(count)]
    known = list(adapters[:16])
    if scenario == "uniform16":
        return list(generator.choices(known, k=count))
    if scenario == "zipf16":
        return list(generator.choices(known, zipf_weights(len(known)), k=count))
    raise ValueError(f"no scenario {scenario}")


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One point of a load test from its requests.

    Args:
        records: each with "due", "sent", "ended" and "times" (of the pieces of text) in seconds of one clock,
            "tokens", and "error", None where the answer is whole. "due" is when the request should have been sent:
            latencies count from there, so that a client that comes late hides nothing.
    """
    good = [record for record in records if record["error"] is None]
    errors: dict[str, int] = {}
    for record in records:
        if record["error"] is not None:
            errors[record["error"]] = errors.get(record["error"], 0) + 1
    result: dict[str, Any] = {
        "requests": len(records),
        "errors": len(records) - len(good),
        "error_kinds": errors,
    }
    if not good:
        return result | {"output_tokens_per_second": None, "requests_per_second": None}
    wall = max(record["ended"] for record in good) - min(record["due"] for record in good)
    tokens = sum(record["tokens"] for record in good)
    first = [record["times"][0] - record["due"] for record in good if record["times"]]
    gaps = [b - a for record in good for a, b in zip(record["times"], record["times"][1:], strict=False)]
    whole = [record["ended"] - record["due"] for record in good]
    result |= {"output_tokens": tokens, "seconds": wall}
    result |= {"output_tokens_per_second": tokens / wall, "requests_per_second": len(good) / wall}
    for name, values in (("ttft", first), ("inter_token", gaps), ("request", whole)):
        result |= {f"{name}_p50": percentile(values, 0.5), f"{name}_p99": percentile(values, 0.99)}
    return result


def medians(points: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of all rounds as one line each: medians of the numbers, errors added up."""

    def kind(point: Mapping[str, Any]) -> tuple[str, str, str, int]:
        return (str(point["engine"]), str(point["scenario"]), str(point["load"]), int(point["clients"]))

    ordered = list(points)
    order = {key: place for place, key in reversed(list(enumerate(map(kind, ordered))))}
    found = []
    for key, group in groupby(sorted(ordered, key=lambda point: order[kind(point)]), key=kind):
        rounds = list(group)
        line: dict[str, Any] = dict(zip(("engine", "scenario", "load", "clients"), key, strict=True))
        line |= {"rounds": len(rounds), "errors": sum(int(point["errors"]) for point in rounds)}
        for name in NUMBERS:
            values = [point[name] for point in rounds if point.get(name) is not None]
            line[name] = median(values) if values else None
        found.append(line)
    return found


def growth(samples: Sequence[float], settled: float = 0.2, tail: float = 0.1) -> float | None:
    """By what share the end of a series lies above its beginning, once the first ``settled`` of it is passed over.

    Medians of stretches of ``tail`` of the series are compared, so that one sample decides nothing. None of fewer
    than three samples.
    """
    if len(samples) < 3:
        return None
    width = max(1, round(len(samples) * tail))
    start = min(int(len(samples) * settled), len(samples) - 2 * width)
    before = median(samples[max(start, 0) : max(start, 0) + width])
    return median(samples[-width:]) / before - 1
