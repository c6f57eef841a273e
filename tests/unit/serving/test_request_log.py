"""A line for each request: what is in it, what never is, and the id that goes back."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving_parts import Served, served, wait_for
from tunesmith.serving.request_log import start_request_log, stop_request_log
from tunesmith.serving.security import Keys

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "colour red"}],
    "max_tokens": 3,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def locked(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(base_folder, tmp_path_factory.mktemp("root"), keys=Keys("user-key", "admin-key")) as running:
        yield running


@pytest.fixture
def http(locked: Served) -> Iterator[httpx.Client]:
    with locked.client(headers={"Authorization": "Bearer user-key"}) as client:
        yield client


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    start_request_log(stream=stream)
    yield stream
    stop_request_log()


def lines(log: io.StringIO, count: int = 1) -> list[Any]:
    """The lines, once there are so many: an answer may be read before its line is written."""
    wait_for(lambda: log.getvalue().count("\n") >= count)
    found = [json.loads(line) for line in log.getvalue().splitlines()]
    assert len(found) == count
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_who_answered_how_much_and_how_fast(
    http: httpx.Client, log: io.StringIO, stream: bool
) -> None:
    reply = http.post("/v1/chat/completions?key=user-key", json={**CHAT, "stream": stream})
    (line,) = lines(log)
    assert line["request_id"] == reply.headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{24}", line["request_id"])
    assert (line["route"], line["status"], line["model"]) == ("/v1/chat/completions", 200, "tiny")
    assert (line["output_tokens"], line["finish_reason"]) == (3, "length")
    assert line["prompt_tokens"] > 3
    assert 0 <= line["first_token_seconds"] <= line["seconds"] < 30
    assert "version" not in line
    assert "colour" not in log.getvalue()
    assert "key" not in log.getvalue()


def test_several_answers_have_several_ends(http: httpx.Client, log: io.StringIO) -> None:
    http.post("/v1/chat/completions", json={**CHAT, "n": 2})
    (line,) = lines(log)
    assert (line["finish_reason"], line["output_tokens"]) == (["length", "length"], 6)


def test_contents_are_there_only_if_asked_for(http: httpx.Client, log: io.StringIO) -> None:
    start_request_log(contents=True, stream=log)
    reply = http.post("/v1/chat/completions", json=CHAT)
    (line,) = lines(log)
    assert line["prompts"] == ["<|im_start|>user\ncolour red<|im_end|>\n<|im_start|>assistant\n"]
    assert line["answers"] == [reply.json()["choices"][0]["message"]["content"]]
    assert "user-key" not in log.getvalue()


def test_refused_requests_are_logged_with_their_code(http: httpx.Client, log: io.StringIO) -> None:
    http.post("/v1/chat/completions", json={**CHAT, "model": "nobody"})
    http.post("/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer wrong"})
    unknown, locked_out = lines(log, 2)
    assert (unknown["status"], unknown["error"], unknown["model"]) == (404, "model_not_found", "nobody")
    assert (locked_out["status"], locked_out["error"]) == (401, "invalid_api_key")
    assert "wrong" not in log.getvalue()


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1.2:3", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("<x>", False)],
)
def test_a_clients_own_id_is_taken_over_if_it_is_sane(http: httpx.Client, given: str, is_kept: bool) -> None:
    for reply in (
        http.get("/health", headers={"X-Request-Id": given}),
        http.post("/v1/completions", json={}, headers={"X-Request-Id": given}),
    ):
        assert (reply.headers["x-request-id"] == given) is is_kept


def test_machines_that_look_in_are_not_logged(http: httpx.Client, log: io.StringIO) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        http.get(path)
    assert [line["route"] for line in lines(log)] == ["/v1/models"]


def test_a_client_that_leaves_is_an_abort(locked: Served, http: httpx.Client, log: io.StringIO) -> None:
    locked.engine.gate.clear()
    with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}):
        pass
    (line,) = lines(log)
    locked.engine.gate.set()
    assert (line["finish_reason"], line["output_tokens"]) == ("abort", 0)
