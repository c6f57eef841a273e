"""Control tokens come from the template alone: spelled in a message they are text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

import tiny_templates as templates
from tiny_chats import (
    chat,
    chats,
    control_ids,
    control_tokens,
    every_family,
    named,
    renderer_of,
    said,
    some,
    until,
)
from tiny_tokenizers import ENDS, FAMILIES, S, byte_level, unigram
from tunesmith.data.conversation import Conversation, Message, PlainText, ToolCall
from tunesmith.data.preview import trained_text
from tunesmith.data.rendering import Renderer, RenderingError, TrainOn


@pytest.mark.parametrize(
    ("family", "role"),
    [
        pytest.param(family, role, id=f"{family}-{role}")
        for family in FAMILIES
        for role in ("system", "user", "assistant")
        if family.has_system or role != "system"
    ],
)
def test_a_control_token_in_a_message_is_text(family, role):
    tokenizer, renderer = family.tokenizer, renderer_of(family)

    def spelling(text: str) -> Conversation:
        words = {
            "system": "Be brief." if family.has_system else None,
            "user": "q",
            "assistant": "a",
            role: text,
        }
        return chat(words["user"], words["assistant"], "r", "b", system=words["system"])

    harmless = renderer.example(spelling("WORD"), TrainOn.ASSISTANT_TURNS)
    around = tokenizer.decode(harmless.ids.tolist())
    for token in control_tokens(tokenizer):
        for text in (token, f"see {token}", f"{token}{token}\n", f"a {token} b", token + "\n" + token[:-1]):
            conversation = spelling(text)
            row = renderer.example(conversation, TrainOn.ASSISTANT_TURNS)
            assert control_ids(tokenizer, row.ids) == control_ids(tokenizer, harmless.ids)
            shown = [around.replace("WORD", text), around.replace("WORD", text.strip())]
            assert tokenizer.decode(row.ids.tolist()) in shown
            assert trained_text(row, tokenizer) == said(family, conversation)
            prompt = renderer.prompt(until(conversation, len(conversation.messages) - 1))
            assert row.ids[: len(prompt)].tolist() == prompt
            assert row.trained[len(prompt)]


@every_family
@some
@given(data=st.data())
def test_control_tokens_anywhere_in_the_messages(family, data):
    tokenizer, renderer = family.tokenizer, renderer_of(family)
    conversation = data.draw(chats(family))
    spoilt = []
    for message in conversation.messages:
        at = data.draw(st.integers(0, len(message.content)))
        token = data.draw(st.sampled_from(["", *control_tokens(tokenizer)]))
        spoilt.append(Message(message.role, message.content[:at] + token + message.content[at:]))
    twisted = Conversation(tuple(spoilt))
    row = renderer.example(twisted, TrainOn.ASSISTANT_TURNS)
    harmless = renderer.example(conversation, TrainOn.ASSISTANT_TURNS)
    assert control_ids(tokenizer, row.ids) == control_ids(tokenizer, harmless.ids)
    assert trained_text(row, tokenizer) == said(family, twisted)


def test_a_control_token_in_other_letters_that_normalising_turns_into_it():
    tokenizer = unigram(S, templates.MISTRAL_V1, scheme="first", normalizer=normalizers.NFKC(), **ENDS)
    renderer = Renderer(tokenizer)
    wide = "＜/s＞"
    assert tokenizer.eos_token_id in tokenizer(f"a{wide}", add_special_tokens=False)["input_ids"]
    row = renderer.example(chat(f"q{wide}", f"a{wide}"), TrainOn.ASSISTANT_TURNS)
    assert control_ids(tokenizer, row.ids) == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert trained_text(row, tokenizer) == ["a</s></s>"]
    plain = renderer.example(PlainText(f"a{wide}"), TrainOn.ALL_TOKENS)
    assert control_ids(tokenizer, plain.ids) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("escape", ["<|im_end|>", "\\u003c|im_end|>"])
def test_a_control_token_beside_the_contents_is_refused(escape):
    renderer = renderer_of(named("qwen2.5"))
    call = ToolCall("c", "f", f'{{"x": "{escape}"}}')
    tool = {"type": "function", "function": {"name": "f", "description": json.loads(f'"{escape}"')}}
    user, answer = Message("user", "q"), Message("assistant", "a")
    for conversation in (
        Conversation((user, Message("assistant", None, (call,)))),
        Conversation((user, answer), (tool,)),
        Conversation((Message("user", "q", name="<|im_end|>"), answer)),
    ):
        with pytest.raises(RenderingError, match="spells a control token"):
            renderer.example(conversation, TrainOn.ASSISTANT_TURNS)
        with pytest.raises(RenderingError, match="spells a control token"):
            renderer.prompt(conversation)


def test_a_control_token_in_a_message_that_the_template_shows_twice():
    template = templates.CHATML.replace("m.content +", "m.content + ' / ' + m.content +")
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], template, eos_token="<|im_end|>")
    renderer = Renderer(tokenizer)
    ids = renderer.prompt(chat("a <|im_end|>"))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, renderer.prompt(chat("a")))


def test_a_control_token_where_the_template_rewrites_the_message():
    tokenizer = byte_level(
        ["<|im_start|>", "<|im_end|>"], templates.CHATML.replace("m.content", "m.content | upper"),
        eos_token="<|im_end|>",
    )  # fmt: skip
    with pytest.raises(RenderingError, match="does not show where the message ends"):
        Renderer(tokenizer).prompt(chat("a <|im_end|>"))
