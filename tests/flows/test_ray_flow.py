"""``tunesmith serve --ray`` on a Ray of this machine: two replicas of a tiny model, one killed while both answer.

Ray is started once for all tests but the last, which run the command itself.
"""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import flow_parts
from serving_parts import Served, greedy, running, save_adapter, save_base, served, wait_for
from tunesmith.models.base import BaseFolder, load_tokenizer
from tunesmith.serving.engine import EngineSettings
from tunesmith.serving.engines import open_engine
from tunesmith.serving.ray_app import Deployed, build_ray_service, check_installed, started_ray
from tunesmith.serving.ray_config import BaseSettings, RayConfig, write_config
from tunesmith.serving.seam import EngineFacts
from tunesmith.serving.security import Keys
from tunesmith.serving.snapshots import Snapshots

pytestmark = [
    pytest.mark.flow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

MODELS = ("tiny", "red", "green")
PROMPTS = ([5, 6, 7, 8], [40, 41, 42, 43, 44, 45, 46], [9, 300, 12, 77, 31])
START_SECONDS = 300  # on a busy machine


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, seed) for seed, name in enumerate(("red", "green", "blue"), 1)}


@pytest.fixture(scope="module")
def root(adapters, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in ("red", "green"):
        shutil.copytree(adapters[name], folder / name)
    return folder


def config_for(base: Path, root: Path, **changed: Any) -> RayConfig:
    only = BaseSettings(
        base=str(base), min_replicas=2, max_replicas=2, max_num_multiplexed_models_per_replica=2, cpus=0.4
    )
    values = {
        "bases": (only,),
        "dynamic_lora_loading_path": str(root),
        "port": 0,
        "max_running": 4,
        **changed,
    }
    return RayConfig(**values)


@dataclass(frozen=True)
class OnRay:
    """The server, and the replicas behind it."""

    served: Served
    deployed: Deployed

    def facts(self) -> dict[int, EngineFacts]:
        """Of each replica at this very moment."""
        return dict(self.deployed._handle.broadcast("facts").results())

    def processes(self) -> set[int]:
        try:
            return set(self.facts())
        except Exception:  # one that has ended, of which Ray Serve does not know it yet
            return set()

    def at_work(self) -> int:
        return sum(found.running + found.waiting for found in self.facts().values())


@pytest.fixture(scope="module")
def on_ray(base: Path, root: Path) -> Iterator[OnRay]:
    check_installed()
    config, said = config_for(base, root), []
    with contextlib.closing(Snapshots()) as snapshots, started_ray(config):
        service = build_ray_service(config, root, Keys(admin="admin"), said.append, snapshots)
        with running(service, said, base, root) as found, service.memory.claim() as claim:
            engine = service.registry.hold("tiny", claim).result()
            both = OnRay(found, engine.engine._replicas)
            wait_for(lambda: len(both.processes()) == 2, START_SECONDS)
            yield both


@pytest.fixture(scope="module")
def single(base: Path, root: Path) -> Iterator[Served]:
    """One engine in this process, for what answers have to be."""
    engine = open_engine(BaseFolder(str(base), base, None), EngineSettings(running=4, waiting=8))
    with served(base, root, engine) as found:
        yield found


def body(model: str, prompt: list[int], **changed: Any) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": 100,
        "ignore_eos": True,
        "temperature": 0,
        **changed,
    }


def tokens_of(client: httpx.Client, asked: dict[str, Any]) -> list[str]:
    """The answer's tokens, which have to come to their proper end; streamed where that is asked for."""
    if not asked.get("stream"):
        reply = client.post("/v1/completions", json={**asked, "logprobs": 0})
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        assert choice["finish_reason"] == "length"
        return choice["logprobs"]["tokens"]
    parts, finish = [], None
    with client.stream("POST", "/v1/completions", json={**asked, "logprobs": 0}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "choices" in event, event
                parts += event["choices"][0]["logprobs"]["tokens"]
                finish = event["choices"][0]["finish_reason"] or finish
    assert finish == "length"
    return parts


def test_every_model_answers_as_peft_does(on_ray, base, adapters):
    tokenizer = load_tokenizer(BaseFolder("tiny", base, None))
    with on_ray.served.client() as client:
        for model in MODELS:
            ids = greedy(base, PROMPTS[0], 20, adapters.get(model))
            told = tokens_of(client, body(model, PROMPTS[0], max_tokens=20))
            assert told == [tokenizer.decode([token]) for token in ids]
        listed = client.get("/v1/models").json()["data"]
    assert {(m["id"], m["parent"]) for m in listed} == {("tiny", None), ("red", "tiny"), ("green", "tiny")}


def test_the_application_is_the_same_one(on_ray, single):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chat = {"model": "red", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 60, "seed": 3}
    asked = [
        (
            "/v1/completions",
            body("green", PROMPTS[1], seed=11, temperature=1.0, n=3, logprobs=2, max_tokens=12),
        ),
        ("/v1/chat/completions", {**chat, "response_format": form}),
        ("/v1/chat/completions", {**chat, "stop": ["e"]}),
        ("/v1/completions", body("none", PROMPTS[0])),
        ("/v1/completions", body("red", [400])),
        ("/v1/completions", body("red", [1] * 256)),
        ("/v1/completions", body("red", PROMPTS[0], temperature=3)),
    ]
    with on_ray.served.client() as ray, single.client() as one:
        for path, content in asked:
            there, here = ray.post(path, json=content), one.post(path, json=content)
            assert there.status_code == here.status_code, (content, there.text)
            left, right = there.json(), here.json()
            if here.status_code == 200:
                assert left["usage"] == right["usage"]
                left, right = left["choices"], right["choices"]
                drop_logprobs(left, right)
            assert left == right
        assert ray.get("/health").json() == {"status": "ok"}
        assert "<html" in ray.get("/").text
        assert 'vllm:num_requests_running{model_name="tiny"} 0' in ray.get("/metrics").text


def drop_logprobs(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """Compare them, which differ in the last digits by what runs beside, and take them out."""
    for mine, other in zip(left, right, strict=True):
        there, here = mine.pop("logprobs"), other.pop("logprobs")
        if here is not None:
            assert there["tokens"] == here["tokens"]
            assert there["token_logprobs"] == pytest.approx(here["token_logprobs"], abs=1e-4)


def test_requests_for_an_adapter_go_where_it_is_loaded(on_ray, adapters):
    """Two replicas with room for two adapters each serve three adapters; each stays itself."""
    shutil.copytree(adapters["blue"], on_ray.served.root / "blue")
    expected: dict[str, list[str]] = {}
    with on_ray.served.client() as client:
        for _ in range(4):
            for model in ("red", "green", "blue", "tiny"):
                told = tokens_of(client, body(model, PROMPTS[2], max_tokens=10))
                assert expected.setdefault(model, told) == told
    assert len(set(map(tuple, expected.values()))) == 4
    assert all(len(found.loaded) <= 2 for found in on_ray.facts().values())
    shutil.rmtree(on_ray.served.root / "blue")


def test_a_client_that_hangs_up_frees_its_place_in_the_replica(on_ray):
    asked = body("red", PROMPTS[0], max_tokens=250, n=4, stream=True)
    with on_ray.served.client() as client:
        with client.stream("POST", "/v1/completions", json=asked) as reply:
            next(reply.iter_lines())
        wait_for(lambda: on_ray.at_work() == 0, 5)
        assert len(tokens_of(client, body("red", PROMPTS[0], max_tokens=5))) == 5


@pytest.fixture(scope="module")
def right(single: Served) -> dict[str, list[str]]:
    """Requests, as JSON, and their answers by a single engine."""
    asked = [
        body(model, prompt, stream=stream, **how)
        for model in MODELS
        for prompt in PROMPTS
        for stream in (False, True)
        for how in ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_p": 0.9, "seed": 6})
    ]
    with single.client() as client:
        found = {json.dumps(one): tokens_of(client, {**one, "stream": False}) for one in asked}
    assert len(set(map(tuple, found.values()))) > 24  # of 27: a swap would be seen
    return found


@contextlib.contextmanager
def load(served: Served, right: dict[str, list[str]], clients: int) -> Iterator[list[int]]:
    """So many clients at work for as long as the block lasts; every answer has to be whole and right.

    Gives how many answers there were: in the block so far, at its end all of them.
    """
    is_over, done = threading.Event(), [0] * clients

    def work(number: int) -> None:
        order = random.Random(number)
        with served.client(timeout=START_SECONDS) as client:
            while not is_over.is_set():
                one = order.choice(sorted(right))
                assert tokens_of(client, json.loads(one)) == right[one], one
                done[number] += 1

    with ThreadPoolExecutor(clients) as pool:
        working = [pool.submit(work, number) for number in range(clients)]
        try:
            yield done
        finally:
            is_over.set()
            for future in working:
                future.result()


def test_no_request_is_lost_when_a_replica_is_killed_under_load(on_ray, right, caplog):
    """``load`` compares every answer, and raises what went wrong in a client when its block ends."""
    before = on_ray.processes()
    with load(on_ray.served, right, 6) as done:
        wait_for(lambda: sum(done) > 8, START_SECONDS)
        os.kill(next(process for process, found in on_ray.facts().items() if found.running), signal.SIGKILL)
        wait_for(lambda: "replica lost" in caplog.text, START_SECONDS)  # answers were under way in it
        by_then = sum(done)
        wait_for(lambda: sum(done) > by_then + 8, START_SECONDS)
    assert sum(done) > by_then + 8  # whole and right, all of them
    wait_for(lambda: on_ray.processes() - before, START_SECONDS)
    assert len(on_ray.processes() & before) < len(before)  # the one that was killed is gone, another has come


def test_load_raises_the_number_of_replicas_and_its_end_lowers_it_without_a_loss(on_ray, right, base, root):
    """From one to two and back to one; Ray itself looks every 10 s, at the mean of 30 s."""
    own = BaseSettings(
        base=str(base), min_replicas=1, max_replicas=2, target_ongoing_requests=1.5, upscale_delay_seconds=1,
        downscale_delay_seconds=1, cpus=0.4,
    )  # fmt: skip
    said: list[str] = []
    with contextlib.closing(Snapshots()) as snapshots:
        service = build_ray_service(
            config_for(base, root, bases=(own,)), root, Keys(), said.append, snapshots
        )
        with running(service, said, base, root) as found, service.memory.claim() as claim:
            grown = OnRay(found, service.registry.hold("tiny", claim).result().engine._replicas)
            assert len(grown.processes()) == 1
            with load(found, right, 6) as done:
                wait_for(lambda: len(grown.processes()) == 2, START_SECONDS)
                before = sum(done)
                wait_for(
                    lambda: all(facts.output_tokens > 100 for facts in grown.facts().values()), START_SECONDS
                )
                wait_for(lambda: sum(done) > before + 10, START_SECONDS)
            with load(found, right, 1) as done:
                wait_for(lambda: len(grown.processes()) == 1, START_SECONDS)
                before = sum(done)
                wait_for(lambda: sum(done) > before + 2, START_SECONDS)


def test_the_figures_of_caches_are_those_of_the_replicas(on_ray):
    asked = body("tiny", list(range(40, 140)), max_tokens=20)

    def figures() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for line in client.get("/metrics").text.splitlines():
            if 'replica="' in line:
                sample, value = line.rsplit(" ", 1)
                found.setdefault(sample.split('replica="')[1].rstrip('"}'), {})[sample.split("{")[0]] = float(
                    value
                )
        return found

    with on_ray.served.client() as client:
        for _ in range(6):
            tokens_of(client, asked)
        told = {str(process): facts for process, facts in on_ray.facts().items()}
        wait_for(lambda: {name: f.get("tunesmith:engine_tokens_total") for name, f in figures().items()}
                 == {name: facts.output_tokens for name, facts in told.items()})  # fmt: skip
        found = figures()
        lines = client.get("/metrics").text.splitlines()
    assert (
        sum(one["vllm:prefix_cache_hits_total"] for one in found.values()) >= 4 * 90
    )  # all but the first of each
    for name, one in found.items():
        assert one["vllm:prefix_cache_queries_total"] == told[name].prompt_tokens
        assert one["tunesmith:adapters_loaded"] == len(told[name].loaded)
        assert one["tunesmith:base_bytes"] > 0
    # Nothing that the replicas alone know stands there without a replica.
    families = {"vllm:kv_cache_usage_perc", *next(iter(found.values()))}
    assert not [line for line in lines if line.split("{")[0] in families and "replica=" not in line]


def test_loading_and_unloading_go_through(on_ray, adapters):
    key = {"Authorization": "Bearer admin"}
    shutil.copytree(adapters["blue"], on_ray.served.root / "hidden" / "blue")
    with on_ray.served.client(headers=key) as client:
        asked = {"lora_name": "mine", "lora_path": "hidden/blue"}
        assert client.post("/v1/load_lora_adapter", json=asked).json()["parent"] == "tiny"
        assert len(tokens_of(client, body("mine", PROMPTS[0], max_tokens=5))) == 5
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
        assert client.post("/v1/completions", json=body("mine", PROMPTS[0])).status_code == 404
        broken = on_ray.served.root / "hidden" / "blue" / "adapter_model.safetensors"
        broken.write_bytes(b"no tensors")
        reply = client.post("/v1/load_lora_adapter", json=asked)
    assert reply.status_code == 400
    assert str(on_ray.served.root) not in reply.text
    assert "tunesmith-adapters" not in reply.text
    shutil.rmtree(on_ray.served.root / "hidden")


# The command


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_the_command_serves_ends_what_runs_and_leaves_nothing(base, root, tmp_path):
    path = tmp_path / "serve.yaml"
    one = BaseSettings(base=str(base))
    write_config(config_for(base, root, bases=(one,)), path)
    process = flow_parts.start("serve", "--ray", "--config", str(path), TUNESMITH_API_KEY="secret")
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.extend(process.stderr), daemon=True)
    try:
        reader.start()
        wait_for(
            lambda: any(" at http://" in line for line in told) or process.poll() is not None, START_SECONDS
        )
        (url,) = [line.split(" at ")[1].strip() for line in told if " at http://" in line]
        family = descendants(process)
        open_to = [
            c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
        ]
        assert {host.removeprefix("::ffff:") for host in open_to} == {"127.0.0.1"}
        assert not any("secret" in value for p in family for value in p.environ().values())
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=url.removesuffix("/v1"), timeout=60, headers=headers) as client:
            assert client.get("/v1/models", headers={"Authorization": "Bearer no"}).status_code == 401
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(tokens_of, client, body("red", PROMPTS[0], max_tokens=240))
                time.sleep(0.1)
                process.send_signal(signal.SIGTERM)
                assert len(answer.result()) == 240
        assert process.wait(60) == 0
        wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 20)
    finally:
        process.kill()
        process.wait()
    assert not any("Traceback" in line for line in told), told


def test_without_ray_one_line_says_what_to_install(base, capfd, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray.serve", None)
    err = flow_parts.refused(capfd, ["serve", "--ray", "--base", str(base), "--port", "0"])
    assert err == "Error: --ray: needs ray.serve; run: pip install 'tunesmith[ray]'\n"


def test_more_cores_than_there_are_are_refused(base, capfd, tmp_path):
    path = tmp_path / "serve.yaml"
    write_config(RayConfig(bases=(BaseSettings(base=str(base), cpus=1e6),)), path)
    err = flow_parts.refused(capfd, ["serve", "--ray", "--config", str(path)])
    assert "the bases need 1e+06 cores" in err
