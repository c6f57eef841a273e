"""Answers held to schemas: valid by an independent checker, beside free requests whose bits do not change."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_parts import ask, prompt, save_base
from serving_parts import served
from tiny_models import chatml_tokenizer
from tunesmith.data.rendering import Renderer
from tunesmith.models.base import BaseFolder
from tunesmith.models.stops import Stops
from tunesmith.serving.chat import Voice
from tunesmith.serving.engine import CpuEngine
from tunesmith.serving.faults import Refusal
from tunesmith.serving.seam import EngineError
from tunesmith.serving.structured import MAX_SCHEMA_CHARACTERS, Begin, Held, constraint_for, json_form

TOKENIZER = chatml_tokenizer()
END, OTHER_END = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|endoftext|>")
VOICE = Voice(TOKENIZER, Renderer(TOKENIZER), Stops((END,), ()))
VOCABULARY = 400
COLOUR = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema's rules, as far as ``schemas`` draws them."""
    if "anyOf" in schema:
        return any(is_valid(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(is_valid(item, known[key]) for key, item in value.items())
        )
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(is_valid(item, schema["items"]) for item in value)
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and schema["minimum"] <= value <= schema["maximum"]
    return isinstance(value, bool) if kind == "boolean" else value is None


def _object(properties: dict[str, Any], required: int) -> dict[str, Any]:
    names = list(properties)[:required]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b},
        st.integers(-200, 200),
        st.integers(0, 300),
    ),
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.builds(
        lambda e: {"enum": e},
        st.lists(
            st.text('aé"\\ \n', max_size=4) | st.integers(0, 9) | st.booleans(),
            min_size=1,
            max_size=3,
            unique_by=repr,
        ),
    ),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda i, a, b: {"type": "array", "items": i, "minItems": a, "maxItems": a + b},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(
            _object,
            st.dictionaries(st.text("abé", min_size=1, max_size=3), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuEngine]:
    found = CpuEngine(save_base(tmp_path_factory.mktemp("base")))
    yield found
    found.close()


def held(
    engine: CpuEngine, schema: dict[str, Any], stops: frozenset[int] = frozenset({END}), **more: Any
) -> Any:
    begin = constraint_for(json_form(schema, "schema"), VOICE, VOCABULARY, stops)
    return ask(engine, prompt(5), constraint=begin, stop_token_ids=stops, **{"count": 150, **more})


def text_of(tokens: list[Any], stops: frozenset[int] = frozenset({END})) -> str:
    assert all(token.id not in stops for token in tokens[:-1])
    return TOKENIZER.decode([token.id for token in tokens if token.id not in stops])


@settings(max_examples=60, deadline=None)
@given(schema=schemas, temperature=st.sampled_from([0.0, 1.0, 2.0]), seed=st.integers(0, 99))
def test_every_finished_answer_is_valid(
    engine: CpuEngine, schema: dict[str, Any], temperature: float, seed: int
) -> None:
    tokens = held(engine, schema, temperature=temperature, seed=seed, top_p=0.95).tokens()
    if tokens[-1].finish == "stop":
        assert is_valid(json.loads(text_of(tokens)), schema)
    else:
        assert len(tokens) == 150


def test_most_answers_do_finish(engine: CpuEngine) -> None:
    answers = [held(engine, COLOUR, temperature=1.0, seed=seed) for seed in range(8)]
    tokens = [answer.tokens() for answer in answers]
    assert [found[-1].finish for found in tokens].count("stop") >= 6
    assert len({text_of(found) for found in tokens if found[-1].finish == "stop"}) > 1


def test_too_few_tokens_end_by_length(engine: CpuEngine) -> None:
    tokens = held(engine, COLOUR, count=3).tokens()
    assert [token.finish for token in tokens] == [None, None, "length"]
    assert text_of(tokens)[0] == "{"


def test_any_of_the_models_ends_may_end_it_and_only_at_the_end(engine: CpuEngine) -> None:
    begin = constraint_for(json_form({"enum": [12]}, "schema"), VOICE, VOCABULARY, frozenset({OTHER_END}))()
    for text in ("1", "2"):
        (token,) = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert np.flatnonzero(begin.mask()).tolist() == [token]
        begin.accept(token)
    assert np.flatnonzero(begin.mask()).tolist() == [OTHER_END]


def test_free_requests_beside_held_ones_keep_their_bits_and_logprobs(engine: CpuEngine) -> None:
    asked = {"temperature": 1.0, "seed": 3, "top_logprobs": 2}
    alone = ask(engine, prompt(7, 1), count=20, **asked).tokens()
    begin = constraint_for(json_form(COLOUR, "schema"), VOICE, VOCABULARY, frozenset({END}))
    other = ask(engine, prompt(7, 2), count=20, constraint=begin, stop_token_ids=frozenset({END}))
    free = ask(engine, prompt(7, 1), count=20, **asked)
    found = free.tokens()
    other.tokens()
    assert [token.id for token in found] == [token.id for token in alone]
    assert [token.logprob for token in found] == pytest.approx([token.logprob for token in alone], abs=1e-5)


def test_logprobs_are_of_the_unmasked_softmax(engine: CpuEngine) -> None:
    (free,) = ask(engine, prompt(5), count=1, top_logprobs=VOCABULARY).tokens()
    (first,) = held(engine, COLOUR, count=1, top_logprobs=2).tokens()
    assert first.id == TOKENIZER.convert_tokens_to_ids("{")
    assert first.logprob == pytest.approx(dict(free.top)[first.id], abs=1e-5)
    assert [token for token, _ in first.top] == [token for token, _ in free.top[:2]]
    assert math.exp(first.logprob or 0) < 0.9


@pytest.mark.parametrize(
    ("schema", "place", "said"),
    [
        ({"type": "objct"}, "schema", "Invalid type: objct"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "schema.properties.a", "uniqueItems"),
        ({"properties": {"a": {"anyOf": [{}, {"format": "wat"}]}}}, "schema.properties.a.anyOf.1", "wat"),
        ({"properties": {"a": {"pattern": "("}}}, "schema.properties.a", "unclosed group"),
        ({"$ref": "https://example.org/x"}, "schema", "example.org"),
        ({"$ref": "#/$defs/x"}, "schema", "does not exist"),
        ({"enum": []}, "schema", "Unsatisfiable"),
        ({"x-guidance": {"lenient": True}}, "schema", "x-guidance"),
        ({"description": "a" * MAX_SCHEMA_CHARACTERS}, "schema", "65,536 are the most"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_with_the_place(
    schema: dict[str, Any], place: str, said: str
) -> None:
    with pytest.raises(Refusal) as found:
        constraint_for(json_form(schema, "schema"), VOICE, VOCABULARY, frozenset({END}))
    assert found.value.status == 400
    assert found.value.message.startswith(f"{place}: ")
    assert said in found.value.message


# By HTTP


@pytest.fixture(scope="module")
def http(
    base_folder: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(adapters["red"], root / "red")
    cpu = CpuEngine(BaseFolder("tiny", base_folder, None))
    with served(base_folder, root, cpu) as running, running.client() as client:
        yield client


def body(schema: dict[str, Any] | None = COLOUR, **more: Any) -> dict[str, Any]:
    form = (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        if schema
        else {"type": "json_object"}
    )
    turns = [{"role": "user", "content": "colour"}]
    return {"model": "tiny", "messages": turns, "response_format": form, "max_tokens": 150, "seed": 1, **more}


@pytest.mark.parametrize("model", ["tiny", "red"])
@pytest.mark.parametrize("stream", [False, True])
def test_answers_by_http_are_valid(http: httpx.Client, model: str, stream: bool) -> None:
    reply = http.post("/v1/chat/completions", json=body(model=model, stream=stream, n=1 if stream else 3))
    assert reply.status_code == 200, reply.text
    if stream:
        chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
        texts = ["".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)]
        ends = [chunks[-1]["choices"][0]["finish_reason"]]
    else:
        texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
        ends = [choice["finish_reason"] for choice in reply.json()["choices"]]
    for text, end in zip(texts, ends, strict=True):
        assert end in ("stop", "length")
        assert end == "length" or is_valid_colour(json.loads(text))


def is_valid_colour(value: Any) -> bool:
    return (
        set(value) == {"colour", "count"} and value["colour"] in ("red", "blue") and 0 <= value["count"] <= 99
    )


def test_any_object_on_both_routes(http: httpx.Client) -> None:
    chat = http.post("/v1/chat/completions", json=body(None, max_tokens=5)).json()
    assert chat["choices"][0]["message"]["content"].startswith("{")
    form = {"type": "json_object"}
    text = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "response_format": form}).json()
    assert text["choices"][0]["text"].startswith("{")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ignore_eos": True}, "ignore_eos"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "calls tools"),
    ],
)
def test_what_a_form_does_not_go_with(http: httpx.Client, more: dict[str, Any], said: str) -> None:
    reply = http.post("/v1/chat/completions", json=body(**more))
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_a_bad_schema_by_http_names_its_place(http: httpx.Client) -> None:
    reply = http.post("/v1/chat/completions", json=body({"properties": {"a": {"type": "wat"}}}))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "response_format", "invalid_schema")
    assert error["message"].startswith("response_format.json_schema.schema.properties.a: ")


# Schemas that would take for ever


MERGED = {"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}
REFERRED = {
    "$defs": {"n": {"type": "integer", "multipleOf": 9_973}},
    "properties": {f"p{n}": {"$ref": "#/$defs/n", "minimum": n} for n in range(500)},
}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
        ({"properties": {f"p{n}": {"type": "integer", "multipleOf": 9_973 - n} for n in range(20)}}, "multipleOf"),
        ({"items": {"type": "number", "multipleOf": 0.1234567}}, "multipleOf"),
        (MERGED, "multipleOf"),
        (REFERRED, "multipleOf"),
        ({"patternProperties": {f"^{n}x*$": {} for n in range(2_500)}}, "patternProperties"),
        ({"type": "integer", "minimum": -(10**400)}, "a number in it is too large"),
    ],
)  # fmt: skip
def test_a_schema_that_would_take_for_ever_is_refused_at_once(schema: dict[str, Any], said: str) -> None:
    began = time.monotonic()
    with pytest.raises(Refusal, match=said) as refused:
        held_to(schema)
    assert (refused.value.status, refused.value.code) == (400, "invalid_schema")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "multipleOf": 0.01},
        {"type": "integer", "multipleOf": 1_000},
        {"allOf": [{"type": "integer", "multipleOf": 4}, {"multipleOf": 6}]},
        {"type": "object", "patternProperties": {f"^{n}_": {} for n in range(20)}},
        {"properties": {"multipleOf": {"type": "string"}, "patternProperties": {"type": "string"}}},
    ],
)
def test_what_looks_alike_and_is_small_is_taken(schema: dict[str, Any]) -> None:
    mask = held_to(schema)().mask()
    assert 0 < mask.sum() < VOCABULARY  # something can begin such an answer, and not everything


def held_to(schema: dict[str, Any]) -> Begin:
    return constraint_for(json_form(schema, "schema"), VOICE, VOCABULARY, frozenset({END}))


# Faults of a matcher


class Matcher:
    """llguidance's, as far as it is used here; ``compute_bitmask`` raises ``fault``."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault = fault

    def compute_bitmask(self) -> bytes:
        if self.fault is not None:
            raise self.fault
        return b"\xff" * 2

    def is_error(self) -> bool:
        return False

    def is_accepting(self) -> bool:
        return True


class Panic(BaseException):
    """As PyO3 raises where Rust gives up: no Exception."""


@pytest.mark.parametrize("fault", [ValueError("no such token"), Panic()])
def test_whatever_a_matcher_raises_ends_its_own_answer_alone(fault: BaseException) -> None:
    with pytest.raises(EngineError, match="too intricate"):
        Held(Matcher(fault), 16, 0, frozenset({0})).mask()


def test_an_end_that_the_engine_has_no_logit_for_is_no_fault() -> None:
    mask = Held(Matcher(), 10, 12, frozenset({3, 12})).mask()
    assert mask.tolist() == [True] * 10
