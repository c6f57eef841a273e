"""Chats for tests of rendering: random ones, and what the families of ``tiny_tokenizers`` make of them."""

import unicodedata

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from tiny_tokenizers import FAMILIES, Family
from tunesmith.data.conversation import Conversation, Message
from tunesmith.data.preview import trained_text
from tunesmith.data.rendering import Renderer, TrainOn

RENDERERS: dict[str, Renderer] = {}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=repr)
some = settings(max_examples=15, deadline=None, database=None)

pieces = st.sampled_from(
    ["\n", "\n\n", " ", "  ", "\t", "hello", "hi", "(a)", "[1, 2]", ".", "é", "中", "🙂"]
)
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.lists(pieces | letters, min_size=1, max_size=8).map("".join).filter(str.strip)


@st.composite
def conversations(draw, has_system=True):
    messages = [Message("system", draw(texts))] if has_system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(texts)), Message("assistant", draw(texts))]
    return Conversation(tuple(messages))


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def chats(family: Family):
    return conversations(has_system=family.has_system)


def renderer_of(family: Family) -> Renderer:
    return RENDERERS.setdefault(family.name, Renderer(family.tokenizer))


def chat(*contents: str, system: str | None = None) -> Conversation:
    roles = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(contents)]
    return Conversation((*([Message("system", system)] if system else []), *roles))


def answers_of(conversation: Conversation) -> list[int]:
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]


def until(conversation: Conversation, index: int) -> Conversation:
    return Conversation(conversation.messages[:index], conversation.tools)


def trained(family: Family, conversation: Conversation) -> list[str]:
    row = renderer_of(family).example(conversation, TrainOn.ASSISTANT_TURNS)
    return trained_text(row, family.tokenizer)


def said(family: Family, conversation: Conversation) -> list[str]:
    last = len(conversation.messages) - 1
    expected = []
    for index in answers_of(conversation):
        text = family.said(conversation.messages[index].content or "", index == last)
        text = unicodedata.normalize("NFC", text) if family.name == "qwen2.5" else text
        expected.append(text.removeprefix(" ") if family.drops_first_blank else text)
    return expected


def hugging_face_ids(tokenizer, conversation: Conversation, prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(
        conversation.to_dicts(), tokenize=True, add_generation_prompt=prompt, return_dict=False
    )


def control_ids(tokenizer, ids) -> list[int]:
    return [int(i) for i in ids if int(i) in tokenizer.all_special_ids or is_control(tokenizer, int(i))]


def is_control(tokenizer, token_id: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return added is not None and added.special


def control_tokens(tokenizer) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
