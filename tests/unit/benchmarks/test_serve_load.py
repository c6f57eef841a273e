"""The pure parts of the load test and the soak: percentiles, arrivals, draws, summaries, verdicts, events."""

import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def load():
    """Imports a module of ``benchmarks`` as the scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in [name for name in sys.modules if name.startswith(("serving_", "serve_"))]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def stats(load):
    return load("serving_stats")


@pytest.fixture(scope="module")
def history(load):
    return load("serving_history")


# Statistics


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), share=st.floats(0, 1))
def test_percentiles_are_numpys(stats, values, share):
    assert stats.percentile(values, share) == pytest.approx(np.percentile(values, 100 * share), abs=1e-6)


def test_of_no_values_there_is_no_percentile(stats):
    assert stats.percentile([], 0.5) is None


def test_poisson_arrivals_have_the_rate_and_the_spread_of_independent_ones(stats):
    times = stats.poisson_arrivals(5.0, 20_000, seed=3)
    gaps = np.diff([0.0, *times])
    assert (gaps > 0).all()
    # Mean and standard deviation of exponential gaps are both 1/rate; 20,000 of them lie within 5/sqrt(20,000) of it.
    assert gaps.mean() == pytest.approx(0.2, rel=0.036)
    assert gaps.std() == pytest.approx(0.2, rel=0.06)
    # P(no arrival for a second) is exp(-5).
    assert (gaps > 1).mean() == pytest.approx(math.exp(-5), abs=0.003)
    counts = np.bincount(np.array(times).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.12)


def test_equal_seeds_give_equal_arrivals(stats):
    assert (
        stats.poisson_arrivals(2.0, 9, 1)
        == stats.poisson_arrivals(2.0, 9, 1)
        != stats.poisson_arrivals(2.0, 9, 2)
    )


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_of_nothing_is_refused(stats, rate):
    with pytest.raises(ValueError, match="above 0"):
        stats.poisson_arrivals(rate, 1, 0)


def test_zipf_weights_of_four(stats):
    # 1 + 1/2 + 1/3 + 1/4 = 25/12
    assert stats.zipf_weights(4) == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert stats.zipf_weights(2, exponent=2.0) == pytest.approx([4 / 5, 1 / 5])


# Models of a scenario


def test_scenarios_that_draw_nothing(stats):
    names = [f"a{n}" for n in range(16)]
    assert stats.models_of("base", names, 3, 0) == [None] * 3
    assert stats.models_of("one", names, 2, 0) == ["a0", "a0"]
    assert stats.models_of("mixed8", names, 10, 0) == [*names[:8], "a0", "a1"]
    with pytest.raises(ValueError, match="no scenario all"):
        stats.models_of("all", names, 1, 0)


def test_draws_follow_their_chances(stats):
    names, count = [f"a{n}" for n in range(20)], 40_000
    uniform = Counter(stats.models_of("uniform16", names, count, 5))
    zipf = Counter(stats.models_of("zipf16", names, count, 5))
    assert set(uniform) == set(zipf) == set(names[:16])
    harmonic = sum(1 / rank for rank in range(1, 17))
    for place, name in enumerate(names[:16]):
        for found, chance in ((uniform[name], 1 / 16), (zipf[name], 1 / (place + 1) / harmonic)):
            assert abs(found - count * chance) < 5 * math.sqrt(count * chance * (1 - chance))


# Summaries


def record(due, times, ended, error=None, tokens=None):
    tokens = len(times) if tokens is None else tokens
    return {"due": due, "sent": due, "times": times, "ended": ended, "error": error, "tokens": tokens}


def test_a_point_of_three_requests(stats):
    found = stats.summarise(
        [
            record(1.0, [1.5, 1.6, 1.8], 2.0),
            record(2.0, [2.1], 5.0, tokens=7),
            record(0.0, [], 9.0, "status 500"),
        ]
    )
    assert (found["requests"], found["errors"], found["error_kinds"]) == (3, 1, {"status 500": 1})
    assert found["output_tokens_per_second"] == pytest.approx(10 / 4)
    assert found["requests_per_second"] == pytest.approx(2 / 4)
    assert found["ttft_p50"] == pytest.approx(0.3)  # between 0.1 and 0.5
    assert found["inter_token_p50"] == pytest.approx(0.15)  # between 0.1 and 0.2
    assert found["request_p99"] == pytest.approx(1 + 0.99 * 2)


def test_a_point_without_an_answer_has_no_speed(stats):
    found = stats.summarise([record(0.0, [], 1.0, "ReadTimeout")])
    assert found["output_tokens_per_second"] is None
    assert found["errors"] == 1


def test_medians_over_rounds_keep_the_order_and_add_up_errors(stats):
    place = {"scenario": "base", "load": "closed", "clients": 4}
    points = [
        {**place, "engine": engine, "errors": errors, "output_tokens_per_second": speed}
        for engine, errors, speed in (("b", 1, 10.0), ("a", 0, 5.0), ("b", 2, 30.0), ("b", 0, None))
    ]
    found = stats.medians(points)
    assert [(line["engine"], line["errors"], line["rounds"]) for line in found] == [("b", 3, 3), ("a", 0, 1)]
    assert [line["output_tokens_per_second"] for line in found] == [20.0, 5.0]
    assert found[0]["ttft_p50"] is None


def test_growth_passes_over_the_start_and_single_peaks(stats):
    level = [50.0, 80.0, *[100.0] * 16, 110.0, 110.0]
    assert stats.growth(level) == pytest.approx(0.1)
    assert stats.growth([*[100.0] * 28, 300.0, 100.0, 100.0]) == pytest.approx(0.0)
    assert stats.growth([1.0, 2.0]) is None


# Verdicts of the soak


def test_what_a_name_meant_while_it_changed(history):
    name = history.History([0.0], ["x"])
    name.change(10.0, None)
    name.change(12.0, "x", None, "y")
    assert name.meanings(1.0, 9.0) == {"x"}
    assert name.meanings(9.0, 11.0) == {"x", None}
    assert name.meanings(11.0, 13.0) == {None, "x", "y"}
    assert name.meanings(12.5, 13.0) == {"y"}


@pytest.mark.parametrize(
    ("status", "text", "meanings", "said"),
    [
        (200, "one", {"x"}, "right"),
        (200, "two", {"x"}, "wrong"),
        (200, "two", {"x", "y", None}, "right"),
        (200, "one", {None}, "wrong"),
        (404, None, {"x"}, "wrong"),
        (404, None, {"x", None}, "away"),
        (429, None, {"x"}, "busy"),
        (400, None, {"x", None}, "wrong"),
        (503, None, {"x", None}, "server fault"),
    ],
)
def test_verdicts(history, status, text, meanings, said):
    assert history.verdict(status, text, meanings, {"x": "one", "y": "two"}) == said


# Events of a stream, as the client reads them


def event(text, finish=None, **more):
    return "data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}], **more})


@pytest.fixture(scope="module")
def read(load):
    def read(lines, expected=8):
        chunks = [(at, f"{line}\n\n".encode()) for at, line in enumerate(lines, 1)]
        found = {"error": None, "chunks": chunks}
        load("serving_client").read_events(found, expected)
        return found

    return read


def test_a_stream_with_a_count(read):
    usage = 'data: {"choices": [], "usage": {"completion_tokens": 5}}'
    found = read([event("a"), event(""), event("b", "length"), usage, "data: [DONE]"])
    assert (found["text"], found["times"], found["tokens"], found["error"]) == ("ab", [1, 3], 5, None)


def test_an_event_comes_when_its_end_comes(load):
    whole = f"{event('a')}\r\n\r\n{event('b', 'length')}\n\ndata: [DONE]\n\n".encode()
    found = {"error": None, "chunks": [(at, whole[at : at + 1]) for at in range(len(whole))]}
    load("serving_client").read_events(found, 8)
    ends = [place for place in range(len(whole)) if whole[place : place + 1] == b"\n"]
    assert (found["text"], found["times"], found["error"]) == ("ab", [ends[0], ends[2]], None)


def test_a_stream_without_a_count_has_all_tokens_at_its_length_and_pieces_otherwise(read):
    assert read([event("a"), event("b", "length"), "data: [DONE]"])["tokens"] == 8
    assert read([event("a"), event("b", "stop"), "data: [DONE]"])["tokens"] == 2


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([event("a")], "the stream broke off"),
        ([event("a"), "data: [DONE]"], "the stream broke off"),
        ([event("a", "stop")], "the stream broke off"),
        ([event("a"), 'data: {"error": {"message": "x"}}', "data: [DONE]"], "error in the stream"),
    ],
)
def test_streams_that_are_not_whole(read, lines, error):
    assert read(lines)["error"] == error
