"""The pure parts of the comparison with other trainers: speeds, ratios, FLOPs, tables, error lines, children."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of ``benchmarks`` as the script itself does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [name for name in sys.modules if name == "peers" or name.startswith("peers.")]:
        del sys.modules[name]


@pytest.fixture
def summary(load):
    return load("peers.summary")


@pytest.fixture
def flops(load):
    return load("peers.flops")


def run(trainer, pair, speed, data="viggo", method="lora", error=None, **other):
    facts = {} if error else {
        "real_tokens_per_second": speed,
        "trained_tokens_per_second": speed / 4,
        "seconds_per_step": 100 / speed,
        "seconds_to_first_step_done": 9.0,
        "peak_rss_bytes": 2 * 10**9,
    }  # fmt: skip
    found = {"data": data, "method": method, "trainer": trainer, "pair": pair, "error": error}
    return found | facts | other


# Speeds and ratios


def test_the_first_step_is_not_timed(summary):
    facts = summary.speed_facts([50.0, 52.0, 56.0], [1000, 300, 600], [7, 30, 60])
    assert facts == {
        "real_tokens_per_second": 900 / 6,
        "trained_tokens_per_second": 90 / 6,
        "seconds_per_step": 3.0,
    }


def test_one_step_gives_no_speed(summary):
    with pytest.raises(ValueError, match="two finished steps"):
        summary.speed_facts([50.0], [10], [5])


def test_medians_and_ratios(summary):
    speeds = {"tunesmith": [300.0, 330.0, 280.0], "trl": [100.0, 110.0, 140.0]}
    runs = [run(name, pair, each[pair]) for pair in range(3) for name, each in speeds.items()]
    ours, theirs = summary.summarise(runs)
    assert (ours["real_tokens_per_second"], theirs["real_tokens_per_second"]) == (300.0, 110.0)
    assert "ratio" not in ours
    assert theirs["ratio"] == pytest.approx(300 / 110)
    assert theirs["pair_ratios"] == pytest.approx([3.0, 3.0, 2.0])
    assert theirs["matmul_efficiency"] is None


def test_a_round_without_the_peer_has_no_pair_ratio(summary):
    runs = [run("tunesmith", 1, 200.0), run("trl", 1, 100.0), run("tunesmith", 2, 220.0)]
    runs.append(run("trl", 2, 0, error="no memory"))
    _, theirs = summary.summarise(runs)
    assert theirs["runs"] == 1
    assert theirs["error"] == "no memory"
    assert theirs["pair_ratios"] == [2.0]


def test_a_peer_is_compared_on_its_own_data_and_method_only(summary):
    runs = [run("tunesmith", 1, 200.0), run("trl", 1, 50.0, method="full"), run("trl", 1, 50.0, data="sql")]
    assert [row.get("ratio") for row in summary.summarise(runs)] == [None, None, None]


def test_the_best_peer_is_the_fastest_that_ran(summary):
    runs = [run("tunesmith", 1, 200.0), run("a", 1, 50.0), run("b", 1, 80.0), run("c", 1, 0, error="broken")]
    best = summary.best_peers(summary.summarise(runs))
    assert {place: row["trainer"] for place, row in best.items()} == {("viggo", "lora"): "b"}


# FLOPs

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 50,
}


def test_weights_of_a_block(flops):
    weights = flops.weights_of(CONFIG)
    # q 8x8, k and v 8x4, o 8x8, gate and up 8x20, down 20x8
    assert weights.body == 3 * (64 + 32 + 32 + 64 + 160 + 160 + 160)
    assert weights.head == (8, 50)


def test_head_size_may_differ_from_hidden_by_heads(flops):
    weights = flops.weights_of(CONFIG | {"head_dim": 4})
    assert weights.shapes[:4] == ((8, 16), (8, 8), (8, 8), (16, 8))


@pytest.mark.parametrize(("method", "passes"), [("lora", 2), ("full", 3)])
def test_needed_flops(flops, method, passes):
    weights = flops.weights_of(CONFIG)
    wanted = 2 * passes * (2016 * 10 + 400 * 3)
    assert flops.needed_flops(weights, method, computed_tokens=10, trained_tokens=3) == wanted


def test_the_default_model_has_the_documented_cost(flops):
    """0.54 and 0.81 GFLOP a token where the head sees every token (SmolLM2-135M)."""
    config = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 30, "vocab_size": 49152,
    }  # fmt: skip
    weights = flops.weights_of(config)
    assert flops.needed_flops(weights, "lora", 1, 1) == pytest.approx(0.54e9, rel=0.01)
    assert flops.needed_flops(weights, "full", 1, 1) == pytest.approx(0.81e9, rel=0.01)


# The table


def result(summary, runs):
    return {
        "date": "2026-01-02",
        "machine": {"processor": "a processor", "memory_bytes": 24 * 2**30},
        "settings": {"threads": 2, "model": "m", "steps": 4, "rows_per_step": 16, "pairs": 3},
        "versions": {"trl": {"trl": "1.2", "torch": "3.4"}},
        "summary": summary.summarise(runs),
    }


def test_table(summary):
    runs = [run("tunesmith", 1, 200.0, matmul_efficiency=0.556), run("trl", 1, 80.0)]
    runs.append(run("other", 1, 0, error="no | way"))
    text = summary.table(result(summary, runs))
    assert "| viggo | lora | tunesmith | 200.0 | 50.0 | 0.50 | 2.0 | 9.0 | 56% | – |" in text
    assert "| viggo | lora | trl | 80.0 | 20.0 | 1.25 | 2.0 | 9.0 | – | 2.50 [2.50, 2.50] |" in text
    assert "- viggo, lora: 2.50 times trl" in text
    assert "| trl | trl 1.2, torch 3.4 |" in text
    assert "(2026-01-02)\n\n| data | method | trainer | error |" in text
    assert "| viggo | lora | other | no \\| way |" in text


def test_a_peer_that_trained_something_else_is_named(summary):
    runs = [
        run("tunesmith", 1, 200.0),
        run("trl", 1, 80.0, same_loss=False),
        run("x", 1, 9.0, same_loss=True),
    ]
    text = summary.table(result(summary, runs))
    assert "trained something else:\n\n- viggo, lora: trl\n\n" in text


def test_a_table_without_failures_does_not_speak_of_them(summary):
    assert "Not measured" not in summary.table(result(summary, [run("tunesmith", 1, 200.0)]))


# Children


def test_a_child_that_fails_is_named_by_its_error(load, tmp_path):
    children = load("peers.children")
    code = "print('begin'); raise ValueError('no such thing')"
    done = children.run_child([sys.executable, "-c", code], tmp_path / "logs" / "a.log", limit_seconds=60)
    assert done.error == "ValueError: no such thing (exit code 1)"
    assert "begin" in (tmp_path / "logs" / "a.log").read_text()


def test_a_child_is_ended_at_its_limit_with_what_it_started(load, tmp_path):
    children = load("peers.children")
    inner = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    done = children.run_child([sys.executable, "-c", code], tmp_path / "a.log", limit_seconds=0.5)
    assert done.error == "not done after 0 s, ended"
    assert done.seconds < 10


def test_a_childs_peak_memory_is_its_own(load, tmp_path):
    children = load("peers.children")
    code = "block = b'x' * 300_000_000"
    done = children.run_child([sys.executable, "-c", code], tmp_path / "a.log", limit_seconds=60)
    assert done.error is None
    assert done.peak_rss_bytes > 300e6


def test_an_error_line_is_fit_to_be_published(load, tmp_path):
    children = load("peers.children")
    log = tmp_path / "a.log"
    log.write_text(f"ERROR: nothing at https://host.example/x for {Path.home()}/y\n  more\n")
    assert children.error_line(log) == "ERROR: nothing at <address> for ~/y"
    log.write_text("only\nthis\n\n")
    assert children.error_line(log) == "this"


# What a runner writes


def test_meter(load, tmp_path):
    meters = load("peers.meter")
    job = meters.Job(
        "m", "m", str(tmp_path / "rows"), "lora", 2, 4, 2, 1e-4, 8, 16, 0.05, ("q_proj",),
        str(tmp_path / "meter.json"), "s", "c", 0.0, 1,
    )  # fmt: skip
    assert job.accumulation == 2
    meter = meters.Meter(job)
    assert not meter.has_begun
    for tokens, loss in ((10, 2.0), (20, 4.0)):
        meter.begin_micro_batch(tokens, tokens // 5)
        meter.micro_batch_loss(loss)
    meter.end_step()
    meter.begin_micro_batch(7, 3)
    meter.end_step()
    found = json.loads((tmp_path / "meter.json").read_text())
    assert found["real_tokens"] == [30, 7]
    assert found["trained_tokens"] == [6, 3]
    assert found["losses"] == pytest.approx([(2 * 2.0 + 4 * 4.0) / 6])
    assert found["first_step_began"] <= found["step_ends"][0] <= found["step_ends"][1]
