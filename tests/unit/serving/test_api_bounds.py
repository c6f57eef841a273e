"""Every bound of a request once, and every error in OpenAI's form, by plain HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_parts import CONTEXT, VOCABULARY, Served, served
from tunesmith.serving.protocol import ChatRequest, CompletionRequest
from tunesmith.serving.security import Keys

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 1}
TEXT = {"model": "tiny", "prompt": "red", "max_tokens": 1}
FIELDS = [*ChatRequest.model_fields, *CompletionRequest.model_fields, "lora_name", "lora_path"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
JSON = {"Content-Type": "application/json"}
TURN = {"role": "user", "content": "a"}


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def open_to_all(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("open")
    with served(base_folder, root, keys=Keys(admin="admin")) as running, running.client() as client:
        yield client


def refused(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in reply.text
    return error


BOTH = [
    ("model", "../tiny"), ("model", ""), ("model", "-x"), ("model", "a" * 257), ("model", 1), ("model", "a\n"),
    ("n", 0), ("n", 17), ("n", True), ("n", 1.5),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "0"),
    ("top_p", 0), ("top_p", 1.01),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", "1"),
    ("max_tokens", 0), ("max_tokens", 1_000_001), ("max_tokens", CONTEXT),
    ("stop", ""), ("stop", [""]), ("stop", ["a"] * 17), ("stop", "a" * 257), ("stop", [1]),
    ("logit_bias", {"1": 101}), ("logit_bias", {"1": -101}), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(VOCABULARY): 1}), ("logit_bias", {str(i): 1 for i in range(1_025)}),
    ("logit_bias", {"9" * 600: 1}),
    ("stream", "yes"), ("stream_options", {"include_usage": True}), ("user", "a" * 513),
    ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("response_format", {"type": "json_schema"}),
    ("top_k", 5), ("min_p", 0.1), ("presence_penalty", 1), ("frequency_penalty", -1), ("repetition_penalty", 1.1),
    ("best_of", 2), ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {}), ("unheard_of", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BOTH, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", CHAT), ("completions", TEXT)], ids=("chat", "text")
)
def test_a_bound_of_both_routes(http: httpx.Client, path: str, body: Any, name: str, value: Any) -> None:
    error = refused(http.post(f"/v1/{path}", json={**body, name: value}))
    assert name in error["message"] or error["param"] in ("messages", "prompt")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", []), ("messages", [TURN] * 2_001), ("messages", "hi"), ("messages", [1]),
        ("messages", [{"role": "wizard", "content": "a"}]), ("messages", [TURN, TURN]),
        ("messages", [{**TURN, "colour": 1}]), ("messages", [{"role": "user", "content": ""}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [TURN, {"role": "assistant", "content": "b"}]),
        ("messages", [{"role": "user", "content": "red " * CONTEXT}]),
        ("max_completion_tokens", 0), ("top_logprobs", 1), ("tool_choice", "required"),
        ("tools", [{"type": "function", "function": {"name": "f"}}] * 129), ("tools", [{}]),
        ("metadata", {str(i): "x" for i in range(17)}), ("store", True), ("logprobs", 2),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_bound_of_chats(http: httpx.Client, name: str, value: Any) -> None:
    error = refused(http.post("/v1/chat/completions", json={**CHAT, name: value}))
    assert name in error["message"] or name == "tools"


@pytest.mark.parametrize("value", [-1, 21])
def test_the_bounds_of_top_logprobs(http: httpx.Client, value: int) -> None:
    error = refused(http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": value}))
    assert "top_logprobs" in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""), ("prompt", []), ("prompt", ["a"] * 65), ("prompt", [[]]), ("prompt", [-1]),
        ("prompt", [VOCABULARY]), ("prompt", [[1], [2**31]]), ("prompt", [1, "a"]), ("prompt", {}),
        ("prompt", "a" * 1_000_001), ("prompt", [1] * CONTEXT),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("echo", True), ("suffix", "x"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_bound_of_completions(http: httpx.Client, name: str, value: Any) -> None:
    error = refused(http.post("/v1/completions", json={**TEXT, name: value}))
    assert name in error["message"] or error["param"] == name


def test_more_prompts_than_can_run_and_wait(http: httpx.Client) -> None:
    error = refused(http.post("/v1/completions", json={**TEXT, "prompt": ["a"] * 13}))
    assert "13 answers are more than run and wait at once" in error["message"]
    assert error["param"] == "n"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_every_neutral_value_is_taken(http: httpx.Client, path: str) -> None:
    body = CHAT if path.startswith("chat") else TEXT
    neutral = {
        "temperature": 2, "top_p": 1, "n": 1.0, "seed": 0, "stop": None, "logit_bias": {}, "user": "someone",
        "best_of": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0.0, "frequency_penalty": 0,
        "repetition_penalty": 1.0, "response_format": {"type": "text"}, "ignore_eos": True,
    }  # fmt: skip
    reply = http.post(f"/v1/{path}", json={**body, **neutral})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"model": "tiny", "model": "x"}', b'{"n": NaN}', b'{"n": 1e999}',
     b'{"model": "\\u0000"}', b"[" * 5_000],
)  # fmt: skip
def test_a_body_that_is_no_object_of_json(http: httpx.Client, content: bytes) -> None:
    assert refused(http.post("/v1/completions", content=content, headers=JSON))["code"] == "invalid_json"


@pytest.mark.parametrize(
    "route", ["chat/completions", "completions", "load_lora_adapter", "unload_lora_adapter"]
)
@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_what_a_page_of_another_site_can_send_is_not_read(
    open_to_all: httpx.Client, route: str, kind: str | None
) -> None:
    headers = {"Authorization": "Bearer admin", **({"Content-Type": kind} if kind else {})}
    reply = open_to_all.post(f"/v1/{route}", content=json.dumps(TEXT), headers=headers)
    assert refused(reply, 415)["code"] == "not_json"


def test_a_character_set_beside_json_is_no_matter(http: httpx.Client) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert http.post("/v1/completions", content=json.dumps(TEXT), headers=headers).status_code == 200


def test_a_body_that_is_too_long_is_not_read_to_its_end(http: httpx.Client) -> None:
    body = json.dumps({**TEXT, "user": "a" * (4 * 2**20)}).encode()
    assert refused(http.post("/v1/completions", content=body, headers=JSON), 413)["code"] == "body_too_long"


def test_a_missing_field_is_named(http: httpx.Client) -> None:
    assert refused(http.post("/v1/completions", json={"model": "tiny"}))["message"] == "prompt: is missing"


def test_a_misspelt_field_is_met_with_the_nearest(http: httpx.Client) -> None:
    error = refused(http.post("/v1/completions", json={**TEXT, "max_token": 1}))
    assert (error["code"], error["param"]) == ("unknown_parameter", "max_token")
    assert "closest is max_tokens" in error["message"]


def test_prompt_and_answer_have_to_fit_the_context(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={**TEXT, "prompt": [5] * (CONTEXT - 1)}).status_code == 200
    error = refused(
        http.post("/v1/completions", json={**TEXT, "prompt": [5] * (CONTEXT - 1), "max_tokens": 2})
    )
    assert error["code"] == "context_length_exceeded"
    assert (
        error["message"]
        == "prompt: the prompt has 255 tokens and the answer may have 2; the context holds 256"
    )


@settings(max_examples=40, deadline=None)
@given(
    path=st.sampled_from(["chat/completions", "completions", "load_lora_adapter", "unload_lora_adapter"]),
    wrong=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
)
def test_no_request_is_a_fault_of_the_server(
    open_to_all: httpx.Client, path: str, wrong: dict[str, Any]
) -> None:
    body = {"chat/completions": CHAT, "completions": TEXT}.get(path, {"lora_name": "x"})
    header = {"Authorization": "Bearer admin", **JSON}
    reply = open_to_all.post(f"/v1/{path}", content=json.dumps({**body, **wrong}), headers=header)
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        refused(reply, reply.status_code)


@pytest.mark.parametrize(
    "name", ["nobody", "tiny:nobody", "red", "greenish", "TINY", "tiny/..", "a/../green"]
)
def test_an_unknown_model_is_404_and_never_the_base(http: httpx.Client, name: str) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", TEXT)):
        error = refused(http.post(f"/v1/{path}", json={**body, "model": name}), 404)
        assert error["code"] == "model_not_found"


def test_other_routes_and_methods(http: httpx.Client) -> None:
    assert refused(http.get("/v1/nothing"), 404)["code"] == "no_such_route"
    refused(http.get("/v1/completions"), 405)
    for path in ("/docs", "/redoc", "/openapi.json"):
        refused(http.get(path), 404)
    assert http.get("/health").json() == {"status": "ok"}
