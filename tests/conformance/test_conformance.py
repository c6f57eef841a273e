"""OpenAI's own client against a server on the models of ``conformance_parts.py``: ours, or one that is named."""

import math
from typing import Any

import openai
import pytest

from conformance_parts import MESSAGES, PROMPT, TOKENS

pytestmark = pytest.mark.flow
ASKED: list[Any] = MESSAGES


def test_the_base_and_both_adapters_are_models(client, target):
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"base", "red", "green"}
    assert {found[name].parent for name in ("red", "green")} == {"base"}
    assert found["base"].max_model_len == 256


def test_a_chat_is_answered_as_by_peft(client, target, name):
    reply = client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_tokens=TOKENS)
    wanted = target.answer(name, "chat")
    assert reply.model == name
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == wanted["text"]
    assert reply.choices[0].finish_reason == wanted["finish"]
    assert reply.usage.prompt_tokens == target.expected["chat_tokens"]
    assert reply.usage.completion_tokens == wanted["tokens"]


def test_a_plain_prompt_is_answered_as_by_peft(client, target, name):
    reply = client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=TOKENS)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == target.answer(name, "plain")["text"]
    assert reply.usage.prompt_tokens == target.expected["plain_tokens"]


def test_the_models_differ(target):
    texts = {answer["chat"]["text"] for answer in target.expected["answers"].values()}
    assert len(texts) == 3  # else one taken for another would not be seen


def test_a_chat_stream_is_the_whole_answer_in_pieces_and_counts(client, target, name):
    *pieces, last = client.chat.completions.create(
        model=name, messages=ASKED, temperature=0, max_tokens=TOKENS, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    wanted = target.answer(name, "chat")
    assert last.choices == []
    assert last.usage.prompt_tokens == target.expected["chat_tokens"]
    assert last.usage.completion_tokens == wanted["tokens"]
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert pieces[0].choices[0].delta.role == "assistant"
    assert len(pieces) > 2
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted["text"]
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == [
        wanted["finish"]
    ]
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece.id for piece in [*pieces, last]}) == 1


def test_a_stream_that_is_not_asked_to_does_not_count(client):
    chunks = list(client.completions.create(model="base", prompt=PROMPT, max_tokens=3, stream=True))
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client, target, name):
    whole = target.answer(name, "chat")["text"]
    stop = whole[len(whole) // 2 :][:2]
    for given in (stop, ["never said", stop]):
        reply = client.chat.completions.create(
            model=name, messages=ASKED, temperature=0, max_tokens=TOKENS, stop=given
        )
        assert reply.choices[0].message.content == whole[: whole.index(stop)]
        assert reply.choices[0].finish_reason == "stop"


def test_a_stop_text_holds_in_a_stream_too(client, target):
    whole = target.answer("red", "chat")["text"]
    stop = whole[len(whole) // 2 :][:2]
    chunks = client.chat.completions.create(
        model="red", messages=ASKED, temperature=0, max_tokens=TOKENS, stop=stop, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole[: whole.index(stop)]


def test_n_answers_are_numbered_and_greedy_ones_are_one(client, target):
    reply = client.chat.completions.create(model="red", messages=ASKED, temperature=0, max_tokens=TOKENS, n=1)
    drawn = client.chat.completions.create(
        model="red", messages=ASKED, temperature=1.5, max_tokens=TOKENS, n=3, seed=5
    )
    assert reply.choices[0].message.content == target.answer("red", "chat")["text"]
    assert [choice.index for choice in drawn.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in drawn.choices}) == 3


def test_a_seed_decides_the_answer(client):
    def text(seed: int) -> str | None:
        reply = client.chat.completions.create(
            model="green", messages=ASKED, temperature=1.5, max_tokens=TOKENS, seed=seed
        )
        return reply.choices[0].message.content

    assert text(7) == text(7)
    assert text(8) != text(7)


def test_log_probabilities_are_those_of_the_model(client, target, name):
    reply = client.chat.completions.create(
        model=name, messages=ASKED, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    told = reply.choices[0].logprobs.content
    assert len(told) == 4
    wanted = target.expected["answers"][name]["chat_logprobs"]
    assert sorted((item.logprob for item in told[0].top_logprobs), reverse=True) == pytest.approx(
        wanted, abs=1e-3
    )
    assert told[0].logprob == pytest.approx(wanted[0], abs=1e-3)


def test_log_probabilities_in_the_older_form(client):
    reply = client.completions.create(model="red", prompt=PROMPT, temperature=0, max_tokens=4, logprobs=2)
    told = reply.choices[0].logprobs
    assert (
        len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 4
    )
    assert all(math.isfinite(value) and value <= 0 for value in told.token_logprobs)
    assert told.text_offset[0] == 0


def test_several_prompts_are_answered_in_order(client, target):
    reply = client.completions.create(model="red", prompt=[PROMPT, PROMPT], temperature=0, max_tokens=TOKENS)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert [choice.text for choice in reply.choices] == [target.answer("red", "plain")["text"]] * 2


def test_token_ids_are_a_prompt_too(client, target):
    reply = client.completions.create(model="red", prompt=[5, 6, 7], temperature=0, max_tokens=1)
    assert reply.usage.prompt_tokens == 3


def test_a_bias_forces_a_token(client):
    reply = client.completions.create(
        model="base", prompt=PROMPT, temperature=0, max_tokens=3, logit_bias={"5": 100}
    )
    again = client.completions.create(
        model="base", prompt=PROMPT, temperature=0, max_tokens=1, logit_bias={"5": 100}
    )
    assert reply.choices[0].text == again.choices[0].text * 3


def test_a_model_that_is_not_there_is_404_and_never_the_base(client):
    for ask in (
        lambda: client.chat.completions.create(model="nobody", messages=ASKED, max_tokens=1),
        lambda: client.completions.create(model="nobody", prompt=PROMPT, max_tokens=1),
    ):
        with pytest.raises(openai.NotFoundError) as found:
            ask()
        assert "nobody" in found.value.message
        assert found.value.param == "model"


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"n": 0}, {"max_tokens": 100_000}, {"top_logprobs": 2},
        {"messages": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_400_in_openai_s_form(client, more):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "base", "messages": ASKED, **more})
    body = refused.value.body
    assert isinstance(body, dict)
    assert body["message"]
    assert {"message", "type", "param", "code"} <= body.keys()


def test_health_needs_no_key(target):
    import httpx

    assert httpx.get(f"{target.url.removesuffix('/v1')}/health").status_code == 200
