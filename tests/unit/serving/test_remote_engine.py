"""The engine over replicas that may be lost: one answer, equal to the unbroken one, whatever is lost when.

Replicas here are workers in this process; a loss is a ``Lost`` after so many tokens.
"""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_parts import ask, expected, prompt, save_base, save_lora
from serving_parts import wait_for
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.serving.engine import EngineSettings
from tunesmith.serving.engines import open_engine
from tunesmith.serving.ray_replica import HeldAdapter, ReplicaPlan, Worker, read_adapter
from tunesmith.serving.remote_engine import Call, Lost, RemoteEngine, Unread
from tunesmith.serving.sampling import Chooser
from tunesmith.serving.seam import (
    AdapterKey,
    BadRequest,
    EngineError,
    EngineFacts,
    EngineFull,
    EngineLimits,
    Sampling,
    Token,
    UnknownAdapter,
)
from tunesmith.serving.snapshots import Snapshots

SETTINGS = EngineSettings(running=4, waiting=8, context_length=64)
LIMITS = EngineLimits(64, 400, running=4, waiting=4)


class InProcess:
    """``Replicas`` by turns.

    ``losses``: for each call in order the tokens after which it is lost, None: it is not. ``hangs``: after the first
    token of an answer nothing more comes.
    """

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.losses: list[int | None] = []
        self.hangs = False
        self.calls: list[Call] = []
        self.closed = 0
        self._adapters: dict[tuple[int, str], HeldAdapter] = {}

    async def answers(self, call: Call) -> AsyncGenerator[tuple[Token, ...] | EngineError, None]:
        left = self.losses.pop(0) if self.losses else None
        place = len(self.calls) % len(self.workers)
        self.calls.append(call)
        if left == 0:
            raise Lost("before the first token")

        async def adapter(name: str) -> HeldAdapter:
            return await self._adapter(place, name)

        async with aclosing(self.workers[place].answer(call, adapter)) as answers:
            async for items in answers:
                if self.hangs and not isinstance(items, EngineError):
                    yield items[:1]
                    await asyncio.Event().wait()
                if isinstance(items, EngineError) or left is None:
                    yield items
                    continue
                kept = items[:left]
                left -= len(kept)
                yield kept
                if not left:
                    raise Lost("in the middle")

    def facts(self) -> dict[str, EngineFacts]:
        return {str(place): worker.facts() for place, worker in enumerate(self.workers)}

    async def read(self, adapter: str) -> AdapterKey | Unread:
        if self.losses and self.losses.pop(0) == 0:
            raise Lost("while reading")
        return await read_adapter(adapter, lambda name: self._adapter(0, name))

    def close(self) -> None:
        self.closed += 1

    async def _adapter(self, place: int, name: str) -> HeldAdapter:
        if (place, name) not in self._adapters:
            self._adapters[place, name] = await asyncio.to_thread(self.workers[place].load, name)
        return self._adapters[place, name]

    def evict(self) -> None:
        for held in self._adapters.values():
            held.unload()
        self._adapters.clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory) -> Path:
    return save_lora(base, tmp_path_factory.mktemp("loras") / "one", 1)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    found = Snapshots(tmp_path_factory.mktemp("copies"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def workers(base, snapshots, tmp_path_factory):
    plan = ReplicaPlan(base, SETTINGS, snapshots.root, 4, tmp_path_factory.mktemp("facts"))
    engines = [open_engine(base, SETTINGS) for _ in range(2)]
    yield [Worker(plan, engine) for engine in engines]
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def alone(base):
    engine = open_engine(base, SETTINGS)
    yield engine
    engine.close()


@pytest.fixture
def replicas(workers) -> InProcess:
    return InProcess(workers)


@pytest.fixture
def engine(replicas, snapshots, monkeypatch):
    monkeypatch.setattr("tunesmith.serving.remote_engine._FIRST_PAUSE", 0.001)
    found = RemoteEngine(replicas, LIMITS, snapshots)
    yield found
    found.close()
    assert replicas.closed == 1


# Lost replicas


@pytest.mark.parametrize("losses", [[], [0], [1], [5], [11], [3, 0, 4], [2, 2, 2, 2]])
def test_a_greedy_answer_is_the_base_s_whatever_is_lost(engine, replicas, base, losses):
    ids, replicas.losses = prompt(9), list(losses)
    answer = ask(engine, ids, count=12)
    assert answer.ids() == expected(base, None, ids, 12)
    assert len(replicas.calls) == len(losses) + 1
    assert [len(call.prompt) for call in replicas.calls] == [
        9 + sum(losses[:n]) for n in range(len(losses) + 1)
    ]
    assert answer.got.empty()


@pytest.mark.parametrize("losses", [[4], [0, 6, 1]])
def test_an_adapter_s_answer_is_the_adapter_s_whatever_is_lost(engine, replicas, base, lora, losses):
    key, ids = engine.load(lora), prompt(9, 1)
    replicas.losses = list(losses)
    assert ask(engine, ids, key, count=12).ids() == expected(base, lora, ids, 12)
    assert {call.adapter for call in replicas.calls} != {None}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 8), max_size=4), st.integers(0, 2**63 - 1), st.integers(1, 12), st.integers(1, 12),
    st.sampled_from([(0.0, 1.0), (0.8, 1.0), (1.0, 0.7), (2.0, 0.95)]),
)  # fmt: skip
def test_a_joined_answer_is_the_unbroken_one(workers, snapshots, alone, losses, seed, length, count, chances):
    temperature, top_p = chances
    ids = prompt(length, seed % 1000)
    asked = {"count": count, "temperature": temperature, "top_p": top_p, "seed": seed, "top_logprobs": 2}
    replicas = InProcess(workers)
    replicas.losses = list(losses)
    engine = RemoteEngine(replicas, LIMITS, snapshots)
    engine_pause = "tunesmith.serving.remote_engine._FIRST_PAUSE"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_pause, 0.001)
        joined = ask(engine, ids, **asked).tokens()
        engine.close()
    unbroken = ask(alone, ids, **asked).tokens()
    assert [token.id for token in joined] == [token.id for token in unbroken]
    assert [token.finish for token in joined] == [token.finish for token in unbroken]
    assert [t.logprob for t in joined] == pytest.approx([t.logprob for t in unbroken], abs=1e-4)


def test_a_request_without_a_seed_gets_one_that_all_replicas_use(engine, replicas):
    replicas.losses = [3, 3]
    ask(engine, prompt(5), count=9, temperature=1.0).ids()
    seeds = {call.sampling.seed for call in replicas.calls}
    assert len(replicas.calls) == 3
    assert len(seeds) == 1
    assert seeds != {None}
    ask(engine, prompt(5), count=1, temperature=1.0).ids()
    assert replicas.calls[-1].sampling.seed not in seeds


def test_a_stop_token_ends_a_joined_answer_where_it_ends_the_unbroken_one(engine, replicas, base):
    ids = prompt(9)
    stop = expected(base, None, ids, 12)[7]
    first = expected(base, None, ids, 12).index(stop)
    replicas.losses = [2]
    tokens = ask(engine, ids, count=12, stop_token_ids=frozenset({stop})).tokens()
    assert len(tokens) == first + 1
    assert tokens[-1].finish == "stop"


def test_draws_go_on_after_those_that_were_made():
    import torch

    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    whole = Chooser(Sampling(20, temperature=1.0, seed=7))
    made = [whole.choose(row) for row in logits]
    for begun in (1, 8, 19):
        rest = Chooser(Sampling(20, temperature=1.0, seed=7, made=tuple(made[:begun])))
        assert [rest.choose(row) for row in logits[begun:]] == made[begun:]


def test_a_request_that_ends_every_replica_ends_itself(engine, replicas):
    replicas.losses = [0] * 9
    answer = ask(engine, prompt(4))
    with pytest.raises(EngineError, match="5 replicas were lost"):
        answer.next()
    assert len(replicas.calls) == 5
    wait_for(lambda: engine.facts().running + engine.facts().waiting == 0)


def test_an_answer_that_is_whole_is_not_asked_for_again(engine, replicas, base):
    replicas.losses = [6]  # right after its last token
    ids = prompt(9)
    assert ask(engine, ids, count=6).ids() == expected(base, None, ids, 6)
    wait_for(lambda: not asyncio.all_tasks(engine._loop))
    assert len(replicas.calls) == 1


# Bounds, cancelling, the end


def test_more_than_run_and_wait_are_told_to_come_again(engine, workers):
    answers = [ask(engine, prompt(4), count=50) for _ in range(8)]
    with pytest.raises(EngineFull):
        ask(engine, prompt(4))
    for answer in answers:
        assert len(answer.ids()) == 50
    assert len(ask(engine, prompt(4), count=2).ids()) == 2  # a place is free before the last token is told


def test_a_cancelled_answer_frees_its_place_in_the_replica(engine, workers):
    answer = ask(engine, prompt(4), count=59)
    answer.next()
    engine.cancel(answer.ticket)
    engine.cancel(answer.ticket)
    wait_for(lambda: engine.facts().running + engine.facts().waiting == 0)
    wait_for(lambda: not any(worker.facts().running for worker in workers))
    so_far = answer.got.qsize()
    time.sleep(0.02)
    assert answer.got.qsize() <= so_far + 1
    assert so_far < 58


@pytest.mark.parametrize(
    ("ids", "changed"), [([], {}), ([400], {}), ([1] * 64, {}), ([1], {"temperature": -1.0}), ([1], {"count": 0})]
)  # fmt: skip
def test_what_no_replica_takes_is_refused_at_once(engine, replicas, ids, changed):
    with pytest.raises(BadRequest):
        ask(engine, ids, **changed)
    assert replicas.calls == []


def test_closing_ends_what_runs(replicas, snapshots):
    engine, replicas.hangs = RemoteEngine(replicas, LIMITS, snapshots), True
    answer = ask(engine, prompt(4), count=59)
    answer.next()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        answer.tokens()
    with pytest.raises(EngineError, match="closed"):
        ask(engine, prompt(4))
    engine.close()
    assert replicas.closed == 1


def test_it_counts_what_it_did(engine):
    ask(engine, prompt(4), count=3).ids()
    facts = engine.facts()
    assert (facts.prompt_tokens, facts.output_tokens, facts.loaded) == (4, 3, ())
    assert engine.limits == LIMITS


def test_it_tells_what_its_replicas_do(engine, replicas, lora):
    key = engine.load(lora)
    ask(engine, prompt(4), count=3).ids()
    parts = engine.facts().parts
    assert set(parts) == {"0", "1"}
    assert parts == {name: worker.facts() for name, worker in zip("01", replicas.workers, strict=True)}
    assert sum(part.output_tokens for part in parts.values()) >= 3
    assert parts["0"].loaded
    engine.unload(key)


# Adapters


def test_a_replaced_adapter_answers_as_it_was_until_it_is_let_go_of(engine, replicas, base, lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "mine")
    key, ids = engine.load(folder), prompt(6)
    shutil.rmtree(folder)
    other = save_lora(base, folder, 2)
    replicas.evict()  # so that they read it anew
    assert ask(engine, ids, key).ids() == expected(base, lora, ids, 8)
    second = engine.load(other)
    assert second != key
    assert ask(engine, ids, second).ids() == expected(base, other, ids, 8)
    engine.unload(key)
    with pytest.raises(UnknownAdapter):
        ask(engine, ids, key)
    with pytest.raises(UnknownAdapter):
        engine.unload(key)
    assert engine.facts().loaded == (second,)
    assert engine.facts().adapter_bytes > 0


def test_an_adapter_taken_away_in_the_middle_finishes_its_answer(engine, replicas, snapshots, base, lora):
    key, ids = engine.load(lora), prompt(6)
    replicas.losses = [5]
    answer = ask(engine, ids, key, count=40)
    answer.next()
    engine.unload(key)
    assert [answer.next().id for _ in range(39)] == expected(base, lora, ids, 40)[1:]
    wait_for(lambda: list(snapshots.root.iterdir()) == [])


def test_loading_it_twice_wants_unloading_it_twice(engine, lora, snapshots):
    key = engine.load(lora)
    assert engine.load(lora) == key
    engine.unload(key)
    assert len(ask(engine, prompt(4), key, count=2).ids()) == 2
    engine.unload(key)
    with pytest.raises(UnknownAdapter):
        ask(engine, prompt(4), key)
    assert list(snapshots.root.iterdir()) == []


def test_a_bad_adapter_is_refused_by_its_own_name_and_leaves_nothing(engine, lora, snapshots, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "bad")
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError) as caught:
        engine.load(folder)
    assert str(folder) in str(caught.value)
    (folder / "tunesmith.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError):
        engine.load(folder)
    assert list(snapshots.root.iterdir()) == []


def test_an_adapter_is_read_by_another_replica_where_one_is_lost(engine, replicas, lora):
    replicas.losses = [0, 0]
    key = engine.load(lora)
    assert engine.facts().loaded == (key,)


def test_replicas_that_are_lost_reading_it_are_no_fault_of_its(engine, replicas, lora):
    replicas.losses = [0] * 5
    with pytest.raises(EngineError, match="5 replicas were lost"):
        engine.load(lora)


def test_many_threads_ask_at_once(engine, replicas, base, lora):
    key, right, got = engine.load(lora), {}, {}
    for model, folder in ((None, None), (key, lora)):
        right[model] = expected(base, folder, prompt(5), 6)
    replicas.losses = [None, 2, None, 4, 0, None, None, 1]

    def work(number: int) -> None:
        model = key if number % 2 else None
        got[number] = (model, ask(engine, prompt(5), model, count=6).ids())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids == right[model] for model, ids in got.values())
    assert len(got) == 8
