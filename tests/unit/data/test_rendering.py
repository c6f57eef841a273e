"""What is trained, and that it is what is served, on real tokenizers and the templates of many families."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_chats import (
    answers_of,
    chat,
    chats,
    control_ids,
    every_family,
    hugging_face_ids,
    named,
    renderer_of,
    said,
    some,
    trained,
    until,
)
from tiny_tokenizers import BARE, FAMILIES, HEADERS_ONLY, byte_level, phi3
from tunesmith.data.conversation import Conversation, Message, PlainText
from tunesmith.data.preview import CONTEXT_STYLE, TRAINED_STYLE, preview, trained_text
from tunesmith.data.rendering import Renderer, RenderingError, TrainOn

# --- which tokens are trained


@every_family
@some
@given(data=st.data())
def test_trained_is_each_answer_and_its_end_and_nothing_else(family, data):
    conversation = data.draw(chats(family))
    assert trained(family, conversation) == said(family, conversation)


@every_family
def test_an_answer_that_its_template_strips_or_keeps(family):
    conversation = chat(
        "q\n", "\n\n  yes \n", "  r", "no\n", system="Be brief." if family.has_system else None
    )
    assert trained(family, conversation) == said(family, conversation)


@pytest.mark.parametrize("answer", ["a", "a.\n", "\n\n(a)", " a "])
def test_an_answer_without_a_closing_token_is_trained_without_one(answer):
    first, second = trained(BARE, chat("q", answer, "r", answer))
    for text in (first, second):  # the last token may reach into the blanks that the template puts behind
        assert text.startswith(answer)
        assert not text.removeprefix(answer).strip()


def test_the_next_turns_opening_token_does_not_close_an_answer():
    assert trained(HEADERS_ONLY, chat("q", "yes", "r", "no")) == ["yes", "no"]


def test_the_header_of_a_template_without_generation_prompt_is_not_trained():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    tokenizer = byte_level(["<|end|>"], template, eos_token="<|end|>")
    row = Renderer(tokenizer).example(chat("q", "yes"), TrainOn.ASSISTANT_TURNS)
    assert [text.strip() for text in trained_text(row, tokenizer)] == ["yes<|end|>"]


def test_control_tokens_that_swallow_the_blanks_behind_them():
    tokenizer = phi3()
    renderer = Renderer(tokenizer)
    row = renderer.example(chat("q", "\n\n a \n", "r", "b"), TrainOn.ASSISTANT_TURNS)
    assert trained_text(row, tokenizer) == ["\n\n a \n<|end|>", "b<|end|>"]
    prompt = renderer.prompt(chat("q"))
    assert row.ids[: len(prompt)].tolist() == prompt
    assert row.trained[len(prompt)]
    assert not row.trained[: len(prompt)].any()


def test_the_stop_token_is_trained_where_it_is_the_padding_token_too():
    family = FAMILIES[0]
    assert family.tokenizer.pad_token_id == family.tokenizer.eos_token_id
    row = renderer_of(family).example(chat("q", "a"), TrainOn.ASSISTANT_TURNS)
    ends = np.flatnonzero(row.ids == family.tokenizer.eos_token_id)
    assert row.trained[ends].tolist() == [False, False, True]  # default system line, user, assistant


def test_a_token_without_one_before_it_is_never_trained():
    template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|end|>{% endfor %}"
    tokenizer = byte_level(["<|end|>"], template, eos_token="<|end|>")
    row = Renderer(tokenizer).example(chat("q", "hello"), TrainOn.ASSISTANT_TURNS)
    assert row.trained.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_arrays_have_the_documented_types():
    row = renderer_of(FAMILIES[0]).example(chat("q", "a"), TrainOn.ASSISTANT_TURNS)
    assert (row.ids.dtype, row.trained.dtype, row.ids.shape) == (np.int32, np.bool_, row.trained.shape)


# --- which ids


@every_family
@some
@given(data=st.data())
def test_ids_are_those_of_the_tokenizer_itself(family, data):
    conversation = data.draw(chats(family))
    ids = renderer_of(family).example(conversation, TrainOn.ASSISTANT_TURNS).ids.tolist()
    whole = hugging_face_ids(family.tokenizer, conversation)
    prompts = [
        hugging_face_ids(family.tokenizer, until(conversation, i), True) for i in answers_of(conversation)
    ]
    if all(whole[: len(prompt)] == prompt for prompt in prompts):
        assert ids == whole
    else:  # some token lies across the border between a prompt and its answer
        assert family.tokenizer.decode(ids) == family.tokenizer.decode(whole)
    everything = renderer_of(family).example(conversation, TrainOn.ALL_TOKENS)
    assert everything.ids.tolist() == whole
    assert everything.trained.tolist() == [False] + [True] * (len(whole) - 1)


@every_family
@some
@given(data=st.data())
def test_the_prompt_of_each_turn_is_what_training_shows_before_the_answer(family, data):
    conversation = data.draw(chats(family))
    renderer = renderer_of(family)
    row = renderer.example(conversation, TrainOn.ASSISTANT_TURNS)
    runs = np.flatnonzero(np.diff(row.trained.astype(int)) == 1) + 1
    for index, start in zip(answers_of(conversation), runs, strict=True):
        prompt = renderer.prompt(until(conversation, index))
        assert row.ids[:start].tolist() == prompt


@pytest.mark.parametrize("answer", ["\n\nhello", "\nhello", "  hello", "(a)", "[1, 2]", "\n\n\n\n"])
@pytest.mark.parametrize("family", [f for f in (*FAMILIES, BARE) if f.name != "llama3"], ids=repr)
def test_no_token_lies_across_the_border_of_prompt_and_answer(family, answer):
    """In the first of two turns, so that the second prompt has to remember the border as well."""
    conversation = chat("hello", answer + "x", "q", answer + "y")
    renderer = renderer_of(family)
    row = renderer.example(conversation, TrainOn.ASSISTANT_TURNS)
    starts = np.flatnonzero(np.diff(row.trained.astype(int)) == 1) + 1
    assert [row.ids[:start].tolist() for start in starts] == [
        renderer.prompt(until(conversation, 1)),
        renderer.prompt(until(conversation, 3)),
    ]


def test_there_are_tokens_that_would_lie_across_the_border():
    """The tests above look at something: joined encoding does differ from the prompt's own."""
    found = set()
    for family in FAMILIES:
        for answer in ("\n\n\nhello", "(a)", "[1, 2]", "hello", "\n\n\n\nhello"):
            conversation = chat("hello", answer)
            whole = hugging_face_ids(family.tokenizer, conversation)
            prompt = hugging_face_ids(family.tokenizer, until(conversation, 1), True)
            if whole[: len(prompt)] != prompt:
                found.add(family.name)
    assert {"chatml", "llama3", "mistral v1", "mistral v1, BPE"} <= found


# --- the rest of the renderer


@pytest.mark.parametrize("family", [*FAMILIES, BARE, HEADERS_ONLY], ids=repr)
def test_end_of_turn(family):
    assert renderer_of(family).end_of_turn == family.end_of_turn


def test_end_of_turn_without_a_template():
    assert Renderer(byte_level(["<|end|>"], None, eos_token="<|end|>")).end_of_turn is None


@every_family
def test_question_is_the_last_turns_prompt_and_text(family):
    conversation = chat("q", "yes", "r", "no, never")
    prompt, expected = renderer_of(family).question(
        Conversation((*conversation.messages, Message("user", "s")))
    )
    assert prompt == renderer_of(family).prompt(until(conversation, 3))
    assert expected == "no, never"


def test_a_row_without_an_answer_is_no_question():
    with pytest.raises(RenderingError, match="no assistant turn"):
        renderer_of(FAMILIES[0]).question(chat("q"))


def test_a_template_that_refuses_a_row_gives_its_reason():
    gemma = named("gemma")
    with pytest.raises(RenderingError, match="refuses this row: System role not supported"):
        renderer_of(gemma).prompt(chat("q", system="s"))


def test_a_model_without_chat_template():
    renderer = Renderer(byte_level(["<|end|>"], None, eos_token="<|end|>"))
    with pytest.raises(RenderingError, match=r"no chat template; set generation_config\.prompt_format"):
        renderer.example(chat("q", "a"), TrainOn.ASSISTANT_TURNS)
    text = PlainText("hello")  # needs none
    assert (
        renderer.tokenizer.decode(renderer.example(text, TrainOn.ALL_TOKENS).ids.tolist()) == "hello<|end|>"
    )


@pytest.mark.parametrize("text", ["hello world", "\n\n x \n", "a<|eot_id|>b", "<|begin_of_text|>", "é中🙂"])
def test_plain_text_stands_between_bos_and_eos(text):
    tokenizer, renderer = named("llama3").tokenizer, renderer_of(named("llama3"))
    row = renderer.example(PlainText(text), TrainOn.ALL_TOKENS)
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.ids[1:-1].tolist()) == text
    assert control_ids(tokenizer, row.ids[1:-1]) == []
    assert row.trained.tolist() == [False] + [True] * (len(row.ids) - 1)


def test_plain_text_has_no_bos_where_the_model_uses_none():
    tokenizer, renderer = named("mistral").tokenizer, renderer_of(named("mistral"))
    assert tokenizer.bos_token_id is not None
    row = renderer.example(PlainText("hello"), TrainOn.ALL_TOKENS)
    assert tokenizer.decode(row.ids.tolist()) == "hello</s>"


def test_preview_shows_the_text_and_marks_what_is_trained():
    family = named("llama3")
    row = renderer_of(family).example(chat("q", "yes\nsir", "r", "no"), TrainOn.ASSISTANT_TURNS)
    shown = preview(row, family.tokenizer)
    assert shown.plain.replace("↵\n", "\n") == family.tokenizer.decode(row.ids.tolist())
    marked = [shown.plain[s.start : s.end] for s in shown.spans if s.style == TRAINED_STYLE]
    assert marked == ["yes↵\nsir<|eot_id|>", "no<|eot_id|>"]
    assert {s.style for s in shown.spans} == {TRAINED_STYLE, CONTEXT_STYLE}


def test_identity_tells_apart_what_renders_differently():
    first, again = (Renderer(FAMILIES[0].build()) for _ in range(2))
    assert first.identity == again.identity
    others = [renderer_of(family).identity for family in (*FAMILIES, BARE, HEADERS_ONLY)]
    assert len(set(others)) == len(others)
    longer = FAMILIES[0].build()
    longer.chat_template += "."
    assert Renderer(longer).identity != first.identity
