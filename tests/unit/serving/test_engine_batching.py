"""Continuous batching: requests join and leave between passes, and slots, bounds and errors hold."""

import threading
import time

import pytest
from safetensors.torch import load_file, save_file

from engine_parts import Answer, ask, expected, prompt, save_base, save_lora
from tunesmith.models.base import BaseFolder
from tunesmith.serving.engine import CpuEngine, EngineSettings
from tunesmith.serving.seam import BadRequest, EngineError, EngineFull, Sampling, UnknownAdapter

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseFolder:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine(base):
    engine = CpuEngine(base, EngineSettings(running=2, waiting=3, prompt_pass=8))
    yield engine
    engine.close()


def held(engine: CpuEngine, ids: list[int], count: int) -> tuple[Answer, threading.Event]:
    """A request after whose first token the engine stands still until the event is set."""
    answer, go = Answer(), threading.Event()

    def deliver(what):
        answer(what)
        go.wait(30)

    answer.ticket = engine.submit(ids, None, Sampling(count, temperature=0.0), deliver)
    return answer, go


def test_a_request_joins_while_another_runs_and_changes_nothing_of_it(engine, base):
    first, go = held(engine, prompt(5), 60)
    ahead = first.next().id
    second = ask(engine, prompt(50, 2), None, 5)  # read in seven passes of eight tokens
    go.set()
    assert second.ids() == expected(base, None, prompt(50, 2), 5)
    running = engine.facts().running
    assert [ahead, *first.ids()] == expected(base, None, prompt(5), 60)
    assert running <= 1  # the later one had left before


def test_as_many_as_fit_run_and_the_rest_waits_its_turn(engine, base):
    first, go = held(engine, prompt(5), 4)
    first.next()
    others = [ask(engine, prompt(3 + n, n), None, 6) for n in range(4)]
    assert (engine.facts().running, engine.facts().waiting) == (1, 4)
    with pytest.raises(EngineFull, match="wait already"):
        ask(engine, prompt(3))
    go.set()
    for n, other in enumerate(others):
        assert other.ids() == expected(base, None, prompt(3 + n, n), 6)
    first.tokens()
    facts = engine.facts()
    assert (facts.running, facts.waiting, facts.cache_tokens) == (0, 0, 0)
    assert (facts.prompt_tokens, facts.output_tokens) == (5 + 3 + 4 + 5 + 6, 4 + 4 * 6)


def test_a_cancelled_request_frees_its_slot_and_says_nothing_more(engine, base):
    first, go = held(engine, prompt(5), 200)
    first.next()
    second, third = ask(engine, prompt(4), None, 200), ask(engine, prompt(6), None, 200)
    for answer in (first, third, third):
        engine.cancel(answer.ticket)
    go.set()
    second.next()
    engine.cancel(second.ticket)
    assert ask(engine, prompt(7), None, 3).ids() == expected(base, None, prompt(7), 3)
    assert engine.facts().running == 0
    assert first.got.empty()
    assert third.got.empty()


def test_an_answer_ends_at_a_stop_token_at_its_length_and_at_the_end_of_the_context(engine, base):
    wanted = expected(base, None, prompt(5), 12)
    stop = wanted[6]
    tokens = ask(engine, prompt(5), None, 12, stop_token_ids=frozenset({stop, 2})).tokens()
    assert [token.id for token in tokens] == wanted[: wanted.index(stop) + 1]
    assert [token.finish for token in tokens] == [None] * wanted.index(stop) + ["stop"]
    assert ask(engine, prompt(5), None, 1).tokens()[0].finish == "length"
    full = ask(engine, prompt(250), None, 50).tokens()
    assert (len(full), full[-1].finish) == (6, "length")  # 256 positions


def test_what_is_out_of_bounds_is_refused_in_words(engine):
    for ids, sampling, reason in [
        ([], {}, "empty"),
        (prompt(256), {}, "255 are the most"),
        ([400], {}, "vocabulary of 400"),
        ([-1], {}, "vocabulary of 400"),
        ([5], {"max_tokens": 0}, "max_tokens"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"logit_bias": {400: 1.0}}, "vocabulary"),
        ([5], {"logit_bias": {4: float("inf")}}, "logit_bias"),
        ([5], {"top_logprobs": -1}, "top_logprobs"),
    ]:
        with pytest.raises(BadRequest, match=reason):
            engine.submit(ids, None, Sampling(**{"max_tokens": 3, **sampling}), lambda _: None)
    with pytest.raises(UnknownAdapter, match="no adapter with the key abc"):
        engine.submit([5], "abc", Sampling(3), lambda _: None)
    assert engine.facts().waiting == 0


def test_a_delivery_that_fails_ends_its_own_request_alone(engine, base):
    def broken(_):
        raise ValueError("gone")

    engine.submit(prompt(5), None, Sampling(50), broken)
    assert ask(engine, prompt(7), None, 5).ids() == expected(base, None, prompt(7), 5)
    until(lambda: engine.facts().running == 0)


def test_a_pass_that_fails_ends_its_requests_and_the_next_works(engine, base, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("tunesmith.serving.engine.forward", fail)
        with pytest.raises(EngineError, match="the forward pass failed"):
            ask(engine, prompt(5)).next()
    assert engine.facts().running == 0
    assert ask(engine, prompt(7), None, 5).ids() == expected(base, None, prompt(7), 5)


def test_an_adapter_that_overflows_ends_its_own_requests_alone(tmp_path, base):
    engine = CpuEngine(base, EngineSettings(running=2))
    folder = save_lora(base, tmp_path / "huge", target_modules=["v_proj"])
    huge = {
        name: t.fill_(10.0 if "lora_A" in name else 1e38) for name, t in load_file(folder / TENSORS).items()
    }
    save_file(huge, folder / TENSORS)
    key = engine.load(folder)
    other = ask(engine, prompt(30, 1), None, 40)
    with pytest.raises(EngineError, match="not finite"):
        ask(engine, prompt(60, 2), key, 5).tokens()
    assert other.ids() == expected(base, None, prompt(30, 1), 40)
    both = [ask(engine, prompt(n, 3), None, 5) for n in (50, 3)]  # its slot is clean again
    assert [answer.ids() for answer in both] == [expected(base, None, prompt(n, 3), 5) for n in (50, 3)]
    engine.close()


def test_closing_ends_every_request_with_an_error(engine):
    first, go = held(engine, prompt(5), 100)
    first.next()
    rest = [ask(engine, prompt(4)) for _ in range(3)]
    threading.Timer(0.05, go.set).start()
    engine.close()
    for answer in rest:
        with pytest.raises(EngineError, match="closed"):
            answer.tokens()
    with pytest.raises(EngineError, match="closed"):
        ask(engine, prompt(4))


def until(holds) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
