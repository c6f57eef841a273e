"""OpenAI's own client, unmodified, against a served tiny model; answers worked out by transformers and PEFT alone."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from serving_parts import Served, greedy, served
from tiny_models import chatml_tokenizer, tiny_model
from tunesmith.models.base import BaseFolder

TOKENIZER = chatml_tokenizer()
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "colour is red"},
]
PROMPT = TOKENIZER.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False)
STOPS = (TOKENIZER.eos_token_id,)


def answer(
    base: Path, count: int, adapter: Path | None = None, prompt: list[int] = PROMPT
) -> tuple[str, list[int]]:
    """The greedy answer's text, and its tokens without the stop token."""
    ids = greedy(base, prompt, count, adapter)
    cut = next((place for place, token in enumerate(ids) if token in STOPS), count)
    return TOKENIZER.decode(ids[:cut], skip_special_tokens=True), ids[:cut]


def test_models_are_the_base_and_the_adapters_with_their_parent(client: openai.OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["tiny", "green", "tiny:red:abcde"]
    assert found["tiny"].parent is None
    assert {found[name].parent for name in ("green", "tiny:red:abcde")} == {"tiny"}
    assert found["tiny"].max_model_len == 256


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("tiny", None),
        ("green", "green"),
        ("tiny:green", "green"),
        ("tiny:red:abcde", "red"),
        ("red:abcde", "red"),
    ],
)
def test_each_name_answers_with_its_own_weights(
    client: openai.OpenAI, base_folder: Path, adapters: dict[str, Path], name: str, adapter: str | None
) -> None:
    reply = client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=12)
    text, ids = answer(base_folder, 12, adapters[adapter] if adapter else None)
    assert reply.model == name
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == text
    assert reply.choices[0].finish_reason == ("length" if len(ids) == 12 else "stop")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(PROMPT)
    assert reply.usage.completion_tokens == min(len(ids) + 1, 12)


def test_the_three_models_differ(base_folder: Path, adapters: dict[str, Path]) -> None:
    texts = {answer(base_folder, 12, adapter)[0] for adapter in (None, adapters["red"], adapters["green"])}
    assert len(texts) == 3


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, base_folder: Path) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, temperature=0, max_tokens=12, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == len(PROMPT) + last.usage.completion_tokens
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer(base_folder, 12)[0]
    assert [p.choices[0].finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert len({piece.id for piece in chunks}) == 1


def test_without_being_asked_a_stream_does_not_count(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="red", max_tokens=3, stream=True))
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)


def test_a_plain_prompt_is_what_training_reads_of_a_plain_text(
    client: openai.OpenAI, base_folder: Path
) -> None:
    prompt = TOKENIZER("colour is", add_special_tokens=False)["input_ids"]
    text, _ = answer(base_folder, 10, prompt=prompt)
    for given in ("colour is", prompt):
        reply = client.completions.create(model="tiny", prompt=given, temperature=0, max_tokens=10)
        assert reply.choices[0].text == text


def test_several_prompts_have_n_answers_each_in_order(client: openai.OpenAI, base_folder: Path) -> None:
    prompts = ["red", "blue"]
    reply = client.completions.create(model="tiny", prompt=prompts, n=2, temperature=0, max_tokens=6)
    texts = [
        answer(base_folder, 6, prompt=TOKENIZER(p, add_special_tokens=False)["input_ids"])[0] for p in prompts
    ]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == [texts[0], texts[0], texts[1], texts[1]]


def test_a_seed_decides_the_answer_and_n_answers_differ(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int = 3) -> list[str | None]:
        reply = client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=seed, n=n, max_tokens=12, temperature=1.5
        )
        return [choice.message.content for choice in reply.choices]

    first = texts(7)
    assert first == texts(7)
    assert len(set(first)) == 3
    assert texts(7, 1) == first[:1]
    assert texts(8) != first
    assert texts(-1) == texts(-1)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, base_folder: Path) -> None:
    whole, _ = answer(base_folder, 24)
    stop = whole[len(whole) // 2 :][:2]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never said", stop]):
        reply = client.chat.completions.create(
            model="tiny", messages=MESSAGES, temperature=0, max_tokens=24, stop=given
        )
        assert reply.choices[0].message.content == expected
        assert reply.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=24, stop=stop, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI, base_folder: Path) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    with torch.inference_mode():
        row = tiny_model(tied=False)(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert reply.choices[0].logprobs is not None
    told = reply.choices[0].logprobs.content
    assert told is not None
    assert len(told) == len(answer(base_folder, 4)[1])
    best = row.topk(3)
    assert [item.logprob for item in told[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [item.token for item in told[0].top_logprobs] == [TOKENIZER.decode([i]) for i in best.indices]
    assert told[0].logprob == pytest.approx(float(best.values[0]), abs=1e-4)


def test_log_probabilities_in_the_older_form(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt="red", temperature=0, max_tokens=4, logprobs=2)
    told = reply.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert told.text_offset is not None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert all(math.isfinite(value) and value <= 0 for value in told.token_logprobs if value is not None)
    assert told.text_offset[0] == 0


def test_a_bias_forbids_or_forces_a_token(client: openai.OpenAI) -> None:
    (token,) = TOKENIZER("!", add_special_tokens=False)["input_ids"]
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=3, logit_bias={str(token): 100}
    )
    assert reply.choices[0].message.content == "!!!"


def test_tools_need_a_template_that_shows_them(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with pytest.raises(openai.BadRequestError, match="does not show tools"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=tools, tool_choice="none", max_tokens=1
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(PROMPT)


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12)
    asked: list[Any] = [*MESSAGES, reply.choices[0].message, {"role": "user", "content": "and blue"}]
    again = client.chat.completions.create(model="tiny", messages=asked, max_tokens=1)
    plain = [
        *MESSAGES,
        {"role": "assistant", "content": reply.choices[0].message.content},
        {"role": "user", "content": "and blue"},
    ]
    ids = TOKENIZER.apply_chat_template(plain, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert again.usage is not None
    assert again.usage.prompt_tokens == len(ids)


def test_errors_become_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert found.value.code == "model_not_found"
    assert found.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wat"}}},
        )  # fmt: skip
    assert refused.value.param == "response_format"
    assert refused.value.message.endswith("response_format.json_schema.schema: Invalid type: wat")


@pytest.fixture
def own_engine(base_folder: Path, tmp_path: Path, adapters: dict[str, Path]) -> Iterator[Served]:
    engine = pytest.importorskip("tunesmith.serving.engine")
    shutil.copytree(adapters["blue"], tmp_path / "blue")
    made = engine.CpuEngine(BaseFolder(str(base_folder), base_folder, None))
    with served(base_folder, tmp_path, made) as running:
        yield running


def test_the_engine_of_this_project_answers_the_same(
    own_engine: Served,
    base_folder: Path,
    adapters: dict[str, Path],
) -> None:
    with openai.OpenAI(base_url=f"{own_engine.url}/v1", api_key="none", max_retries=0) as client:
        for name, adapter in (("tiny", None), ("blue", adapters["blue"])):
            reply = client.chat.completions.create(
                model=name, messages=MESSAGES, temperature=0, max_tokens=12
            )
            assert reply.choices[0].message.content == answer(base_folder, 12, adapter)[0]
