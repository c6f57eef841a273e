"""What replicas tell of themselves, and how ``/metrics`` shows it: their own figures or none, never a false zero."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_parts import LIMITS, wait_for
from tunesmith.serving import replica_facts
from tunesmith.serving.memory import LoadedBase, MemoryFacts
from tunesmith.serving.metrics import Histogram, Metrics
from tunesmith.serving.replica_facts import read_facts, start_telling
from tunesmith.serving.seam import AdapterKey, EngineFacts

NOTHING = EngineFacts(0, 0, (), 0, 0, 0, 0, 0, 0, 0)
counts = st.integers(0, 2**53)
facts = st.builds(
    EngineFacts, counts, counts, st.lists(st.text("0123456789abcdef", max_size=8).map(AdapterKey)).map(tuple),
    counts, counts, counts, counts, counts, counts, counts,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(facts)
def test_what_is_told_is_read_back(tmp_path_factory: pytest.TempPathFactory, told: EngineFacts) -> None:
    folder = tmp_path_factory.mktemp("facts")
    start_telling(folder, lambda: told)
    wait_for(lambda: read_facts(folder))
    assert read_facts(folder) == {str(os.getpid()): told}
    shutil.rmtree(folder)


def test_it_is_told_anew_until_the_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_facts, "_PERIOD", 0.001)
    folder, calls = tmp_path / "facts", []

    def tell() -> EngineFacts:
        calls.append(1)
        return replace(NOTHING, output_tokens=len(calls))

    folder.mkdir()
    thread = start_telling(folder, tell)
    wait_for(lambda: [found for found in read_facts(folder).values() if found.output_tokens > 9])
    assert thread.is_alive()
    while folder.exists():  # it may be written into just now
        shutil.rmtree(folder, ignore_errors=True)
    wait_for(lambda: not thread.is_alive())


def test_of_a_replica_that_is_silent_nothing_is_told(tmp_path: Path) -> None:
    content = json.dumps({**vars(NOTHING), "running": 3})
    for name, age in (("1", 0), ("2", 4), ("3", 6), ("4", 6_000)):
        (tmp_path / f"{name}.json").write_text(content)
        now = (tmp_path / f"{name}.json").stat().st_mtime
        os.utime(tmp_path / f"{name}.json", (now - age, now - age))
    (tmp_path / "5.json").write_text("{")
    (tmp_path / "6.json").write_text('{"loaded": [], "colour": 1}')
    (tmp_path / "7.new").write_text(content)
    assert read_facts(tmp_path) == dict.fromkeys("12", replace(NOTHING, running=3))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "1.json",
        "2.json",
        "5.json",
        "6.json",
        "7.new",
    ]
    assert read_facts(tmp_path / "gone") == {}


# In /metrics


def samples_of(*bases: LoadedBase) -> dict[str, str]:
    seconds = {"base": Histogram(), "adapter": Histogram()}
    memory = MemoryFacts(bases, 17, None, Counter(), seconds, ())  # type: ignore[arg-type]
    text = Metrics().text(memory, 4, [], 0.0)
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


OWN = {"kv_cache_usage_perc", "prefix_cache_queries_total", "prefix_cache_hits_total", "adapters_loaded",
       "adapter_bytes", "engine_tokens_total", "base_bytes"}  # fmt: skip


def own_of(samples: dict[str, str]) -> dict[str, dict[str, str]]:
    """The figures of caches and memory, by their labels."""
    found: dict[str, dict[str, str]] = {}
    for sample, value in samples.items():
        family, labels = sample.partition(":")[2].rstrip("}").split("{")
        if family in OWN:
            found.setdefault(labels, {})[family] = value
    return found


def test_each_replica_has_its_own_figures() -> None:
    one = replace(
        NOTHING, cache_tokens=5, cache_capacity=20, prompt_tokens=70, reused_tokens=30, output_tokens=9
    )
    two = replace(NOTHING, loaded=(AdapterKey("a"),), adapter_bytes=12, cache_tokens=0, cache_capacity=20)
    front = replace(NOTHING, running=2, waiting=1, output_tokens=8, parts={"812": one, "99": two})
    samples = samples_of(LoadedBase("tiny", 1_000, front, LIMITS))
    assert own_of(samples) == {
        'model_name="tiny",replica="812"': {
            "kv_cache_usage_perc": "0.25", "prefix_cache_queries_total": "70", "prefix_cache_hits_total": "30",
            "adapters_loaded": "0", "adapter_bytes": "0", "engine_tokens_total": "9", "base_bytes": "1000",
        },
        'model_name="tiny",replica="99"': {
            "kv_cache_usage_perc": "0", "prefix_cache_queries_total": "0", "prefix_cache_hits_total": "0",
            "adapters_loaded": "1", "adapter_bytes": "12", "engine_tokens_total": "0", "base_bytes": "1000",
        },
    }  # fmt: skip
    # What the front itself knows is not the replicas'.
    assert samples['vllm:num_requests_running{model_name="tiny"}'] == "2"
    assert samples['vllm:num_requests_waiting{model_name="tiny"}'] == "1"
    assert not [name for name in samples if name.startswith("tunesmith:model_bytes")]


def test_replicas_that_cannot_tell_are_left_out_and_none_is_zero() -> None:
    front = replace(NOTHING, running=2, parts={})
    samples = samples_of(LoadedBase("tiny", 1_000, front, LIMITS))
    assert own_of(samples) == {}
    assert samples['vllm:num_requests_running{model_name="tiny"}'] == "2"


def test_an_engine_of_this_process_has_no_replicas() -> None:
    here = replace(NOTHING, cache_tokens=5, cache_capacity=10)
    samples = samples_of(LoadedBase("tiny", 1_000, here, LIMITS), LoadedBase("other", 7, here, LIMITS))
    assert set(own_of(samples)) == {'model_name="tiny"', 'model_name="other"'}
    assert set(own_of(samples)['model_name="tiny"']) == OWN
    assert samples["tunesmith:model_bytes{}"] == "17"
