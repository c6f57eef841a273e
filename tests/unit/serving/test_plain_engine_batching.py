"""Requests of the plain engine join and leave, adapters take turns, and slots, bounds and errors hold."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from engine_parts import VOCABULARY, Answer, ask, expected, prompt, save_base, save_lora
from tunesmith.models.base import BaseFolder
from tunesmith.serving.engine import EngineSettings
from tunesmith.serving.plain_engine import PlainEngine
from tunesmith.serving.seam import BadRequest, EngineError, EngineFull, Sampling, UnknownAdapter

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseFolder:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine(base):
    engine = PlainEngine(base, EngineSettings(running=2, waiting=3, prompt_pass=8))
    yield engine
    engine.close()


def held(engine: PlainEngine, ids: list[int], count: int) -> tuple[Answer, threading.Event]:
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
    assert [ahead, *first.ids()] == expected(base, None, prompt(5), 60)
    assert engine.facts().running == 0


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
    assert facts.cache_capacity == 2 * 256


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
    fourth = ask(engine, prompt(5), None, 200)
    fourth.next()
    engine.cancel(fourth.ticket)  # with nothing that comes after it
    until(lambda: not (engine._own or engine._groups))


def test_adapters_take_turns_whatever_the_number_of_their_requests(base, tmp_path):
    engine = PlainEngine(base, EngineSettings(running=8))
    keys = [engine.load(save_lora(base, tmp_path / str(seed), seed)) for seed in range(3)]
    order: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    def held(_token):
        begun.set()
        gate.wait(30)

    engine.submit(prompt(3), None, Sampling(1), held)  # all are there before they begin
    assert begun.wait(30)
    done = threading.Semaphore(0)

    def counted(adapter: int):
        def deliver(token):
            order.append(adapter)
            if token.finish:
                done.release()

        return deliver

    asked = [0, 0, 0, 0, 0, 1, 2]
    for adapter in asked:
        engine.submit(prompt(4), keys[adapter], Sampling(12, temperature=0.0), counted(adapter))
    gate.set()
    for _ in asked:
        assert done.acquire(timeout=30)
    turns = [adapter for n, adapter in enumerate(order) if n == 0 or adapter != order[n - 1]]
    assert turns[-9:] == [0, 1, 2] * 3
    assert order.count(0) == 60
    for adapter in (1, 2):  # between two tokens of one there is one round of the others
        places = [n for n, found in enumerate(order) if found == adapter][1:]
        assert {b - a for a, b in pairwise(places)} == {7}
    engine.close()


def test_seeds_stops_bounds_of_length_and_constraints(engine, base):
    wanted = expected(base, None, prompt(5), 12)
    stop = wanted[6]
    tokens = ask(engine, prompt(5), None, 12, stop_token_ids=frozenset({stop})).tokens()
    assert [token.id for token in tokens] == wanted[: wanted.index(stop) + 1]
    assert tokens[-1].finish == "stop"
    full = ask(engine, prompt(250), None, 50).tokens()
    assert (len(full), full[-1].finish) == (6, "length")  # 256 positions
    drawn = [ask(engine, prompt(5), None, 9, temperature=1.0, seed=seed).ids() for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]

    class Even:
        def __init__(self) -> None:
            self.taken: list[int] = []

        def mask(self):
            return np.arange(VOCABULARY) % 2 == len(self.taken) % 2

        def accept(self, token: int) -> None:
            self.taken.append(token)

    ids = ask(engine, prompt(5), None, 6, constraint=Even).ids()
    assert [token % 2 for token in ids] == [0, 1, 0, 1, 0, 1]


def test_what_is_out_of_bounds_is_refused_in_words(engine):
    for ids, sampling, reason in [
        ([], {}, "empty"),
        (prompt(256), {}, "255 are the most"),
        ([400], {}, "vocabulary of 400"),
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


def test_a_delivery_or_a_pass_that_fails_ends_its_own_requests_alone(engine, base, monkeypatch):
    def broken(_):
        raise ValueError("gone")

    engine.submit(prompt(5), None, Sampling(50), broken)
    assert ask(engine, prompt(7), None, 5).ids() == expected(base, None, prompt(7), 5)

    def fail(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "read", fail)
        with pytest.raises(EngineError, match=r"the forward pass failed \(RuntimeError\)"):
            ask(engine, prompt(5)).next()
    assert ask(engine, prompt(7), None, 5).ids() == expected(base, None, prompt(7), 5)
    until(lambda: engine.facts().running == 0)


def test_an_adapter_that_overflows_ends_its_own_requests_alone(engine, base, tmp_path):
    folder = save_lora(base, tmp_path / "huge", target_modules=["v_proj"])
    tensors = load_file(folder / TENSORS)
    save_file({n: t.fill_(10.0 if "lora_A" in n else 1e38) for n, t in tensors.items()}, folder / TENSORS)
    key = engine.load(folder)
    other = ask(engine, prompt(30, 1), None, 40)
    with pytest.raises(EngineError, match="not finite"):
        ask(engine, prompt(60, 2), key, 5).tokens()
    assert other.ids() == expected(base, None, prompt(30, 1), 40)


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
