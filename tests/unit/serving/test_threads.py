"""A flood of one kind of work holds up that kind alone: neither answers nor any other kind."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from serving_parts import VOCABULARY, Served, served, wait_for
from tunesmith.models.base import BaseFolder
from tunesmith.serving import answering
from tunesmith.serving.chat import VoiceBox
from tunesmith.serving.security import Keys
from tunesmith.serving.structured import constraint_for, json_form
from tunesmith.serving.threads import Kind, Threads

FLOOD = 12  # more than there are threads of a kind, and than asyncio has for all on a small machine
TEXT = {"model": "tiny", "prompt": "red", "max_tokens": 3, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 3}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ADMIN = {"Authorization": "Bearer admin"}


@pytest.mark.parametrize("flooded", get_args(Kind))
def test_each_kind_has_threads_of_its_own(flooded: Kind) -> None:
    gate, threads = threading.Event(), Threads()

    async def work() -> set[str]:
        held = [asyncio.ensure_future(threads.run(flooded, gate.wait)) for _ in range(FLOOD)]
        others = [kind for kind in get_args(Kind) if kind != flooded]
        done = await asyncio.gather(*(threads.run(kind, str, kind) for kind in others))
        assert not any(one.done() for one in held)
        gate.set()
        assert all(await asyncio.gather(*held))
        return set(done)

    assert asyncio.run(asyncio.wait_for(work(), 10)) == set(get_args(Kind)) - {flooded}


def test_what_is_known_of_a_request_goes_along() -> None:
    number: ContextVar[int] = ContextVar("number")

    async def work() -> list[Any]:
        number.set(7)
        return [await Threads().run("look", number.get), await Threads().run("text", int, "11", base=2)]

    assert asyncio.run(work()) == [7, 3]


@pytest.fixture
def server(base_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> Iterator[Served]:
    shutil.copytree(adapters["red"], tmp_path / "red")
    with served(base_folder, tmp_path, keys=Keys(admin="admin")) as running:
        assert (
            running.client().post("/v1/chat/completions", json=CHAT).status_code == 200
        )  # templates are warm
        yield running


@contextmanager
def flood(work: Callable[[int], httpx.Response], release: threading.Event) -> Iterator[list[httpx.Response]]:
    """As many requests as FLOOD at once, until the block has ended; the list then has their answers."""
    found: list[httpx.Response] = []
    with ThreadPoolExecutor(FLOOD) as pool:
        asking = [pool.submit(work, number) for number in range(FLOOD)]
        try:
            yield found
            assert not any(one.done() for one in asking)
        finally:
            release.set()
        found += [one.result() for one in asking]


def all_else_answers(server: Served, *kinds: str) -> None:
    """Every kind of request is answered at once but for those that are flooded."""
    body = {**CHAT, "response_format": FORM, "max_tokens": 4}
    with server.client(timeout=10, headers=ADMIN) as http:
        replies = {
            "plain": http.post("/v1/completions", json=TEXT),
            "chat": http.post("/v1/chat/completions", json=CHAT),
            "look": http.get("/v1/models"),
            "card": http.get("/v1/models/tiny"),
            "metrics": http.get("/metrics"),
            "text": http.post(
                "/v1/completions", json={**TEXT, "user": "a" * 500, "prompt": ["red " * 20] * 8}
            ),
        }
        if "form" in kinds:
            replies["form"] = http.post("/v1/chat/completions", json=body)
        if "load" in kinds:
            replies["load"] = http.post("/v1/load_lora_adapter", json={"lora_name": "red"}, headers=ADMIN)
    assert {kind: reply.status_code for kind, reply in replies.items()} == dict.fromkeys(replies, 200)


def test_schemas_that_take_long_hold_up_neither_answers_nor_loads(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, began, compile_it = threading.Event(), [], constraint_for

    def slowly(*given: Any) -> Any:
        began.append(given)
        gate.wait(30)
        return compile_it(*given)

    monkeypatch.setattr(answering, "constraint_for", slowly)
    body = {**TEXT, "response_format": FORM, "max_tokens": 4}
    del body["ignore_eos"]

    def ask(_: int) -> httpx.Response:
        return server.client(timeout=60).post("/v1/completions", json=body)

    long = {**TEXT, "max_tokens": 200, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        with flood(ask, gate) as found:
            wait_for(lambda: len(began) == 2 and server.service.preparing == FLOOD)
            all_else_answers(server, "load")
            *_, done = (line for line in lines if line)  # an answer under way comes to its end
            assert done == "data: [DONE]"
    assert {reply.status_code for reply in found} <= {200, 429}


def test_loads_that_are_waited_for_hold_up_neither_answers_nor_schemas(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, load = threading.Event(), server.engine.load
    for number in range(FLOOD):
        shutil.copytree(server.root / "red", server.root / f"slow{number}")

    def slowly(folder: Path) -> Any:
        gate.wait(30)
        return load(folder)

    monkeypatch.setattr(server.engine, "load", slowly)

    def ask(number: int) -> httpx.Response:
        body = {"lora_name": f"slow{number}"}
        return server.client(timeout=60, headers=ADMIN).post("/v1/load_lora_adapter", json=body)

    with flood(ask, gate) as found:
        wait_for(lambda: server.service.memory.facts().waited_for)
        all_else_answers(server, "form")
    assert [reply.status_code for reply in found] == [200] * FLOOD


def test_the_compiler_does_not_keep_pythons_lock(base_folder: Path) -> None:
    """Threads of its own would be of no use to a compiler that lets no other run meanwhile."""
    voice = VoiceBox().of_base(BaseFolder("tiny", base_folder, None))
    constraint_for(
        json_form({"type": "object"}, "x"), voice, VOCABULARY, frozenset({1})
    )  # reads the vocabulary
    slow = json_form({"type": "number", "multipleOf": 99_991}, "x")  # some 0.2 s
    compiling = threading.Thread(target=constraint_for, args=(slow, voice, VOCABULARY, frozenset({1})))
    ticks = 0
    compiling.start()
    while compiling.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10
