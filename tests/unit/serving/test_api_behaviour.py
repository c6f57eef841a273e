"""A server under load, with keys, with clients that leave, at its end."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flow_parts import start
from serving_parts import PlainEngine, Served, served, wait_for
from tunesmith.cli import main
from tunesmith.errors import ConfigError
from tunesmith.serving import app
from tunesmith.serving.security import Keys

LONG = {"model": "tiny", "prompt": "red", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
SHORT = {"model": "tiny", "prompt": "red", "max_tokens": 2, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def slow(base_folder: Path, tmp_path: Path) -> Iterator[Served]:
    """One answer at a time, one that waits, 10 ms a token."""
    engine = PlainEngine(running=1, waiting=1)
    engine.pause = 0.01
    with served(base_folder, tmp_path, engine) as running:
        yield running


def held(server: Served) -> int:
    facts = server.engine.facts()
    return facts.running + facts.waiting


def events(reply: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# Load


def test_a_full_queue_is_429_with_a_time_to_come_again(slow: Served) -> None:
    slow.engine.gate.clear()
    with (
        slow.client() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first,
    ):
        with slow.client() as other, other.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
            assert held(slow) == 2
            for n in (1, 2):
                reply = slow.client().post("/v1/completions", json={**SHORT, "n": n})
                assert reply.status_code == 429
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.json()["error"]["code"] == "queue_full"
            assert held(slow) == 2
        assert first.status_code == 200
        wait_for(lambda: held(slow) == 1)
        slow.engine.gate.set()
    wait_for(lambda: held(slow) == 0)


def test_a_request_that_fits_in_part_only_leaves_nothing_behind(slow: Served) -> None:
    slow.engine.gate.clear()
    with slow.client() as http, http.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
        assert slow.client().post("/v1/completions", json={**SHORT, "n": 2}).status_code == 429
        assert held(slow) == 1
        slow.engine.gate.set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot_at_once(slow: Served, stream: bool) -> None:
    slow.engine.gate.clear()
    body = {**LONG, "stream": stream}
    with slow.client(timeout=0.1) as http, contextlib.suppress(httpx.ReadTimeout):
        http.post("/v1/completions", json=body)
    wait_for(lambda: held(slow) == 0, seconds=1)
    assert len(slow.engine.cancelled) == 1
    slow.engine.gate.set()
    assert slow.client().post("/v1/completions", json=SHORT).status_code == 200


def test_a_client_that_leaves_amid_a_stream_frees_its_slot(slow: Served) -> None:
    with (
        slow.client() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply,
    ):
        lines = reply.iter_lines()  # kept: without it httpx closes the connection
        next(lines)
        assert held(slow) == 1
    wait_for(lambda: held(slow) == 0, seconds=1)


def test_a_deadline_ends_an_answer(base_folder: Path, tmp_path: Path) -> None:
    engine = PlainEngine()
    with served(base_folder, tmp_path, engine, deadline_seconds=0.2) as server, server.client() as http:
        engine.gate.clear()
        reply = http.post("/v1/completions", json=LONG)
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "deadline"
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as streamed:
            error, done = events(streamed)
        assert (error["error"]["code"], done) == ("deadline", "[DONE]")
        assert held(server) == 0
        assert len(engine.cancelled) == 2


def test_an_adapter_that_left_memory_is_loaded_again(
    base_folder: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    shutil.copytree(adapters["red"], tmp_path / "red")
    with served(base_folder, tmp_path) as server, server.client() as http:
        first = http.post("/v1/completions", json={**SHORT, "model": "red"}).json()
        server.engine.evict()
        again = http.post("/v1/completions", json={**SHORT, "model": "red"}).json()
        assert again["choices"] == first["choices"]
        assert again["system_fingerprint"] == first["system_fingerprint"] != ""


def test_many_requests_in_turn_leave_nothing(slow: Served) -> None:
    slow.engine.pause = 0
    with slow.client() as http:
        for _ in range(50):
            assert http.post("/v1/completions", json={**SHORT, "max_tokens": 1}).status_code == 200
    assert held(slow) == 0
    assert not slow.service.metrics.active


def test_a_body_that_does_not_come_is_waited_for_no_longer(
    slow: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    address = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 9\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


# Keys


@pytest.fixture(scope="module")
def locked(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(
        base_folder, tmp_path_factory.mktemp("locked"), keys=Keys("user-key", "admin-key")
    ) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "header",
    [{}, bearer("wrong"), {"Authorization": "Bearer"}, {"Authorization": "user-key"}, bearer("user-ke")],
)
def test_without_the_key_only_health_answers(locked: Served, header: dict[str, str]) -> None:
    with locked.client(headers=header) as http:
        assert http.get("/health").status_code == 200
        replies = [http.get("/v1/models"), http.get("/metrics")]
        replies += [
            http.post(f"/v1/{route}", json=SHORT)
            for route in ("completions", "chat/completions", "load_lora_adapter", "unload_lora_adapter")
        ]
        for reply in replies:
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "user-key" not in reply.text
            assert "admin-key" not in reply.text


def test_the_api_key_asks_and_only_the_admin_key_loads(locked: Served) -> None:
    for key in ("user-key", "admin-key"):
        with locked.client(headers=bearer(key)) as http:
            assert http.post("/v1/completions", json=SHORT).status_code == 200
            assert http.get("/metrics").status_code == 200
    for route in ("load_lora_adapter", "unload_lora_adapter"):
        body = {"lora_name": "nobody"}
        assert locked.client(headers=bearer("user-key")).post(f"/v1/{route}", json=body).status_code == 401
        assert locked.client(headers=bearer("admin-key")).post(f"/v1/{route}", json=body).status_code == 404


def test_without_an_admin_key_nobody_loads(server: Served) -> None:
    reply = server.client().post("/v1/load_lora_adapter", json={"lora_name": "green"})
    assert reply.status_code == 403
    assert "TUNESMITH_ADMIN_KEY" in reply.json()["error"]["message"]


def test_keys_are_read_from_the_environment_and_never_shown() -> None:
    keys = Keys.from_environment({"TUNESMITH_API_KEY": "abc", "TUNESMITH_ADMIN_KEY": "def"})
    assert (keys.api, keys.admin) == ("abc", "def")
    assert "abc" not in repr(keys)
    assert Keys.from_environment({}) == Keys()
    for bad in ("", "a b", "ä", "a\n"):
        with pytest.raises(ConfigError) as error:
            Keys.from_environment({"TUNESMITH_API_KEY": bad})
        assert str(error.value).startswith("TUNESMITH_API_KEY: is empty or has blanks")


# Metrics


def test_metrics_count_what_happened(base_folder: Path, tmp_path: Path, adapters: dict[str, Path]) -> None:
    shutil.copytree(adapters["red"], tmp_path / "red")
    with served(base_folder, tmp_path) as server, server.client() as http:
        for model in ("tiny", "tiny", "red"):
            http.post("/v1/completions", json={**SHORT, "model": model, "prompt": [5, 6, 7]})
        http.post("/v1/completions", json={**SHORT, "model": "nobody"})
        server.engine.gate.clear()
        with http.stream("POST", "/v1/completions", json={**LONG, "model": "red", "stream": True}):
            text = server.client().get("/metrics").text
            server.engine.gate.set()
        reply = server.client().get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples['vllm:num_requests_running{model_name="tiny"}'] == "1"
    assert samples['vllm:num_requests_waiting{model_name="tiny"}'] == "0"
    assert samples['vllm:generation_tokens_total{model_name="tiny"}'] == "4"
    assert samples['vllm:generation_tokens_total{model_name="red"}'] == "2"
    assert samples['vllm:prompt_tokens_total{model_name="tiny"}'] == "6"
    assert samples['vllm:request_success_total{model_name="tiny",finished_reason="length"}'] == "2"
    assert samples['tunesmith:http_errors_total{status="404"}'] == "1"
    assert samples['vllm:time_to_first_token_seconds_count{model_name="tiny"}'] == "2"
    assert samples['vllm:inter_token_latency_seconds_count{model_name="tiny"}'] == "2"
    assert samples['vllm:e2e_request_latency_seconds_bucket{model_name="tiny",le="+Inf"}'] == "2"
    assert samples['tunesmith:adapters_loaded{model_name="tiny"}'] == "1"
    lora = [name for name in samples if name.startswith("vllm:lora_requests_info")]
    assert lora == [
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="red",waiting_lora_adapters=""}'
    ]
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) [a-z0-9_:]+ .+|[a-z0-9_:]+\{.*\} \S+", line), line


# The end


def test_a_server_that_stops_takes_nothing_new(slow: Served) -> None:
    slow.service.is_stopping = True
    for reply in (slow.client().post("/v1/completions", json=SHORT), slow.client().get("/health")):
        assert reply.status_code == 503
        assert reply.headers["retry-after"]


def test_what_runs_is_finished_within_the_grace_time(base_folder: Path, tmp_path: Path) -> None:
    engine = PlainEngine()
    engine.pause = 0.005
    with served(base_folder, tmp_path, engine, grace_seconds=20) as server, server.client() as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 60, "stream": True}) as reply:
            server.server.stop()
            *_, last, done = events(reply)
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert server.said[-1] == "Stopping; 1 request to finish"
        with pytest.raises(httpx.ConnectError):
            server.client().get("/health")


def test_what_runs_longer_than_the_grace_time_is_cut_off(base_folder: Path, tmp_path: Path) -> None:
    engine = PlainEngine()
    with served(base_folder, tmp_path, engine, grace_seconds=1) as server, server.client() as http:
        engine.gate.clear()
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
            server.server.stop()
            error, done = events(reply)
        assert (error["error"]["code"], done) == ("stopping", "[DONE]")
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert held(server) == 0


@pytest.mark.flow
def test_sigterm_finishes_what_runs_and_exits_0(
    base_folder: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    shutil.copytree(adapters["red"], tmp_path / "red")
    process = start(
        "serve", "--base", str(base_folder), "--dynamic-lora-loading-path", str(tmp_path), "--port", "0"
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("Serving"))
    assert "tiny and 1 adapter at" in line
    url = line.split(" at ")[1].strip()
    chunks: list[Any] = []

    def ask() -> None:
        with httpx.stream(
            "POST", f"{url}/completions", json={**LONG, "model": "red", "stream": True}
        ) as reply:
            for chunk in events(reply):
                chunks.append(chunk)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(
        lambda: 'running{model_name="tiny"} 1' in httpx.get(url.replace("/v1", "/metrics")).text or chunks
    )
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(30) == 0
    assert time.monotonic() - began < 30
    asking.join(5)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url.replace("/v1", "/health"))
    process.stderr.close()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "no/such/place"], "no such model folder"),
        (["--dynamic-lora-loading-path", "no/such/place"], "no/such/place is no folder"),
        (["--host", "999.1.1.1"], "cannot be listened on"),
        (["--port", "70000"], "--port"),
        (["--max-running", "0"], "--max-running"),
    ],
)
def test_options_that_cannot_be_used(
    capfd: pytest.CaptureFixture[str], base_folder: Path, arguments: list[str], said: str
) -> None:
    assert main(["serve", "--base", str(base_folder), "--port", "0", *arguments]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_without_the_extra_the_command_says_what_to_install(
    capfd: pytest.CaptureFixture[str], base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--base", str(base_folder)]) == 2
    assert capfd.readouterr().err == "Error: serve: needs uvicorn; run: pip install 'tunesmith[serve]'\n"


def test_small_answers_are_sent_at_once(server: Served) -> None:
    """Nagle's algorithm and delayed acknowledgements would make 40 ms of every answer."""
    with server.client() as http:
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            http.get("/health")
            seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.03


def test_a_port_that_is_taken(capfd: pytest.CaptureFixture[str], base_folder: Path, server: Served) -> None:
    port = server.url.rpartition(":")[2]
    assert main(["serve", "--base", str(base_folder), "--port", port]) == 2
    assert f"--port {port}: cannot be listened on ({os.strerror(98)})" in capfd.readouterr().err
