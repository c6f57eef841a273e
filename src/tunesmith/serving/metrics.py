"""Numbers of the server in Prometheus' text form, under vLLM's names where they mean the same.

The form is https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tunesmith.serving.memory import LoadedBase, MemoryFacts
    from tunesmith.serving.seam import EngineFacts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0)
_OTHERS = "other"  # labels are bounded: past so many models the rest are counted together
_MOST_LABELS = 1_000

Finish = Literal["stop", "length", "abort"]


class Histogram:
    """Counts of seconds in buckets whose upper borders are ``_SECONDS`` and infinity."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str, labels: Mapping[str, str]) -> Iterator[str]:
        """The samples of this histogram."""
        total = 0
        for border, count in zip([*map(_number, _SECONDS), "+Inf"], self.counts, strict=True):
            total += count
            yield f"{name}_bucket{_labels({**labels, 'le': border})} {total}"
        yield f"{name}_sum{_labels(labels)} {_number(self.sum)}"
        yield f"{name}_count{_labels(labels)} {total}"


class Metrics:
    """What requests have done; used from the event loop alone."""

    def __init__(self) -> None:
        self.active: Counter[str] = Counter()  # requests at work by model
        self.finished: Counter[tuple[str, Finish]] = Counter()
        self.refused: Counter[int] = Counter()  # answers by HTTP status from 400 on
        self.prompt_tokens: Counter[str] = Counter()
        self.output_tokens: Counter[str] = Counter()
        self.first_token: dict[str, Histogram] = {}
        self.between_tokens: dict[str, Histogram] = {}
        self.whole: dict[str, Histogram] = {}
        self._models: set[str] = set()

    def label(self, model: str) -> str:
        """The label under which a model is counted."""
        if model in self._models or len(self._models) < _MOST_LABELS:
            self._models.add(model)
            return model
        return _OTHERS

    def text(
        self, memory: "MemoryFacts", most_running: int, adapters: Sequence[str], stamp: float | None = None
    ) -> str:
        """Everything, for ``GET /metrics``.

        Args:
            memory: what is in memory, and the engines' facts.
            most_running: requests at work at once on a base.
            adapters: names of the adapters that requests at work ask for.
            stamp: seconds since 1970.
        """
        lines = [*_engines(memory.bases), *_memory(memory)]
        lines += _head(
            "gauge", "vllm:lora_requests_info", "Adapters that requests at work or waiting ask for."
        )
        lora = {
            "max_lora": str(most_running),
            "running_lora_adapters": ",".join(sorted(adapters)),
            "waiting_lora_adapters": ",".join(memory.waited_for),
        }
        lines.append(
            f"vllm:lora_requests_info{_labels(lora)} {_number(time.time() if stamp is None else stamp)}"
        )
        lines += self._requests()
        return "\n".join(lines) + "\n"

    def _requests(self) -> Iterator[str]:
        for name, what, counts in (
            ("vllm:prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens),
            ("vllm:generation_tokens_total", "Tokens of answers.", self.output_tokens),
        ):
            yield from _head("counter", name, what)
            yield from (f"{name}{_labels({'model_name': m})} {n}" for m, n in sorted(counts.items()))
        name = "vllm:request_success_total"
        yield from _head("counter", name, "Requests that ended, by reason.")
        for (model, finish), count in sorted(self.finished.items()):
            yield f"{name}{_labels({'model_name': model, 'finished_reason': finish})} {count}"
        name = "tunesmith:http_errors_total"
        yield from _head("counter", name, "Requests answered with an error, by HTTP status.")
        for status, count in sorted(self.refused.items()):
            yield f"{name}{_labels({'status': str(status)})} {count}"
        for name, what, histograms in (
            ("vllm:time_to_first_token_seconds", "From the request to its first token.", self.first_token),
            ("vllm:inter_token_latency_seconds", "From a token to the next.", self.between_tokens),
            ("vllm:e2e_request_latency_seconds", "From the request to its end.", self.whole),
        ):
            yield from _head("histogram", name, what)
            for model, histogram in sorted(histograms.items()):
                yield from histogram.lines(name, {"model_name": model})


def _engines(bases: "Sequence[LoadedBase]") -> Iterator[str]:
    for name, what, field in (
        ("vllm:num_requests_running", "Requests at work.", "running"),
        ("vllm:num_requests_waiting", "Requests that wait.", "waiting"),
    ):
        yield from _head("gauge", name, what)
        counts = {base.name: getattr(base.facts, field) for base in bases}
        yield from (f"{name}{_labels({'model_name': model})} {count}" for model, count in counts.items())
    makers = [maker for base in bases for maker in _makers(base)]
    for kind, name, what, value in (
        ("gauge", "vllm:kv_cache_usage_perc", "KV cache in use; 1 is all of it.", _cache_share),
        ("counter", "vllm:prefix_cache_queries_total", "Prompt tokens looked up.", lambda facts: facts.prompt_tokens),
        ("counter", "vllm:prefix_cache_hits_total", "Prompt tokens found.", lambda facts: facts.reused_tokens),
        ("gauge", "tunesmith:adapters_loaded", "Adapters in memory.", lambda facts: len(facts.loaded)),
        ("gauge", "tunesmith:adapter_bytes", "Memory of the adapters' tensors.", lambda facts: facts.adapter_bytes),
        ("counter", "tunesmith:engine_tokens_total", "Tokens made.", lambda facts: facts.output_tokens),
    ):  # fmt: skip
        yield from _head(kind, name, what)
        yield from (f"{name}{_labels(labels)} {_number(value(facts))}" for labels, _, facts in makers)
    name = "tunesmith:base_bytes"
    yield from _head("gauge", name, "Memory of the base, its cache when full included.")
    yield from (f"{name}{_labels(labels)} {base.bytes}" for labels, base, _ in makers)


def _makers(base: "LoadedBase") -> "Iterator[tuple[dict[str, str], LoadedBase, EngineFacts]]":
    """The processes that hold a base: this one, or each replica that could tell of itself."""
    labels = {"model_name": base.name}
    if base.facts.parts is None:
        yield labels, base, base.facts
        return
    for name, facts in sorted(base.facts.parts.items()):
        yield {**labels, "replica": name}, base, facts


def _cache_share(facts: "EngineFacts") -> float:
    return facts.cache_tokens / facts.cache_capacity if facts.cache_capacity else 0.0


def _memory(memory: "MemoryFacts") -> Iterator[str]:
    gauges = [("tunesmith:bases_loaded", "Bases in memory.", len(memory.bases))]
    if all(base.facts.parts is None for base in memory.bases):  # replicas' memory is not counted here
        gauges += [
            ("tunesmith:model_bytes", "Memory of all bases and adapters, as counted.", memory.bytes),
            ("tunesmith:model_bytes_limit", "What they may have; 0: no limit.", memory.limit or 0),
        ]
    for name, what, value in gauges:
        yield from [*_head("gauge", name, what), f"{name}{_labels({})} {value}"]
    name = "tunesmith:evictions_total"
    yield from _head("counter", name, "Models put out of memory to make room.")
    yield from (f"{name}{_labels({'kind': kind})} {memory.evictions[kind]}" for kind in memory.seconds)
    name = "tunesmith:load_seconds"
    yield from _head("histogram", name, "What loading a model took.")
    for kind, seconds in memory.seconds.items():
        yield from seconds.lines(name, {"kind": kind})


def _head(kind: str, name: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
