"""Rows encoded together are, byte for byte, those that are encoded one at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

import tiny_templates as templates
from tiny_chats import chat, control_tokens, conversations, named, renderer_of, some, texts
from tiny_tokenizers import BARE, ENDS, FAMILIES, HEADERS_ONLY, S, byte_level, phi3, unigram
from tunesmith.data.control_tokens import ControlTokens
from tunesmith.data.conversation import Conversation, Message, PlainText, ToolCall
from tunesmith.data.encoding import _overlapping
from tunesmith.data.rendering import Renderer, RenderingError, TrainOn

CHATML = ("<|im_start|>", "<|im_end|>")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = Message("assistant", None, (ToolCall("c", "f", '{"x": 1}'),))
TOOL_CHAT = Conversation(
    (Message("user", "q"), CALL, Message("tool", "42", tool_call_id="c"), Message("assistant", "\nIt is.")),
    (TOOL,),
)


def chatml(**flags: bool) -> Renderer:
    """ChatML whose control tokens look at or swallow what stands around them."""
    special = [AddedToken(name, special=True, **{"normalized": False, **flags}) for name in CHATML]
    return Renderer(byte_level(special, templates.CHATML, eos_token="<|im_end|>"))


def overlapping() -> Renderer:
    """A word of the vocabulary that can start before a control token and reach into it."""
    words = (AddedToken("hi<|im", normalized=False), AddedToken("\n<|im_end|>x", normalized=False))
    return Renderer(byte_level(list(CHATML), templates.CHATML, words=words, eos_token="<|im_end|>"))


RENDERERS = {
    **{family.name: renderer_of(family) for family in (*FAMILIES, BARE, HEADERS_ONLY)},
    "phi3": Renderer(phi3()),
    "lstrip": chatml(lstrip=True),
    "normalized": chatml(normalized=True),
    "single word": chatml(single_word=True),
    "overlapping": overlapping(),
    "NFKC": Renderer(unigram(S, templates.MISTRAL_V1, scheme="first", normalizer=normalizers.NFKC(), **ENDS)),
    "no template": Renderer(byte_level(["<|end|>"], None, eos_token="<|end|>")),
}
every_renderer = pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS.keys())


def one_at_a_time(renderer, row, train_on):
    try:
        return renderer.example(row, train_on)
    except RenderingError as error:
        return error


def assert_same(renderer, rows, train_on):
    together = renderer.batch(rows, train_on).encode()
    assert len(together) == len(rows)
    for row, found in zip(rows, together, strict=True):
        alone = one_at_a_time(renderer, row, train_on)
        if isinstance(alone, RenderingError):
            assert isinstance(found, RenderingError)
            assert str(found) == str(alone)
            continue
        assert (found.ids.dtype, found.trained.dtype) == (np.int32, np.bool_)
        assert found.ids.tobytes() == alone.ids.tobytes()
        assert found.trained.tobytes() == alone.trained.tobytes()


def rows_of(renderer):
    """Conversations and plain texts, some of which spell control tokens or repeat each other."""
    spelled = st.sampled_from(["", "", "＜/s＞", *control_tokens(renderer.tokenizer)])
    spoilt = st.tuples(texts, spelled, texts).map("".join)
    chats = conversations() | conversations(has_system=False)
    ends_spoilt = st.tuples(chats, spoilt).map(
        lambda drawn: Conversation((*drawn[0].messages[:-1], Message("assistant", drawn[1])))
    )
    repeated = st.sampled_from([chat("hi", "hello"), chat("hi", "hello", "hi", "hello"), TOOL_CHAT])
    return st.lists(chats | ends_spoilt | spoilt.map(PlainText) | repeated, max_size=6)


@every_renderer
@some
@given(data=st.data(), train_on=st.sampled_from(TrainOn))
def test_together_as_one_at_a_time(renderer, data, train_on):
    assert_same(renderer, data.draw(rows_of(renderer)), train_on)


@every_renderer
@pytest.mark.parametrize("train_on", TrainOn)
def test_rows_whose_tokens_could_lie_across_borders(renderer, train_on):
    tricky = ["hi", "\n\nhi", "  hi", "(a)", "[1, 2]", "\n\n\n", "hi\n", "x", "\t", "é中🙂", "a hi<|im"]
    contents = [text for text in tricky if text.strip()]
    rows = [chat(user, answer, answer, user) for user in contents for answer in contents]
    assert_same(renderer, rows, train_on)


def test_most_tokenizers_are_cut_at_control_tokens_and_the_odd_ones_are_not():
    def is_cut(renderer: Renderer) -> bool:
        text = "a" + "".join(f"{token}b" for token in control_tokens(renderer.tokenizer))
        return len(ControlTokens(renderer.tokenizer).pieces(text, ())) > 1

    odd = {"lstrip", "normalized", "single word", "overlapping"}
    assert {name for name, renderer in RENDERERS.items() if not is_cut(renderer)} == odd


def test_cutting_where_a_word_reaches_into_a_control_token_would_change_ids():
    """The rule above is needed: the whole text has a token that no piece of it has."""
    tokenizer = RENDERERS["overlapping"].tokenizer
    whole, left, right = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("hi<|im_end|>", "hi", "<|im_end|>")
    )
    assert whole != left + right


def test_equal_pieces_are_encoded_once():
    renderer = renderer_of(named("chatml"))
    rows = [chat("q", f"answer {i}", system="A long system message.") for i in range(50)]
    batch = renderer.batch(rows, TrainOn.ASSISTANT_TURNS)
    # By row an answer of its own; in common five: system, user and assistant headers with what follows, two ends
    # of turns.
    assert len(batch._slots) <= 50 + 6


def test_a_refused_row_does_not_spoil_the_others():
    renderer = renderer_of(named("gemma"))
    rows = [chat("q", "a"), chat("q", "a", system="s"), PlainText("p"), TOOL_CHAT, chat("r", "b")]
    found = renderer.batch(rows, TrainOn.ASSISTANT_TURNS).encode()
    refused = "the model's chat template refuses this row: System role not supported"
    assert str(found[1]) == refused
    assert "does not show tools" in str(found[3])
    assert_same(renderer, rows, TrainOn.ASSISTANT_TURNS)


def test_tokens_that_stand_for_no_text_are_not_trained():
    offsets = np.array([[0, 0], [0, 2], [2, 2], [2, 3], [3, 5], [5, 5], [5, 6]])
    assert _overlapping(offsets, [(0, 1), (2, 5)]).tolist() == [False, True, False, True, True, False, False]
    assert _overlapping(offsets, [(1, 3)]).tolist() == [False, True, False, True, False, False, False]
    assert not _overlapping(offsets, []).any()


def test_no_rows():
    assert renderer_of(FAMILIES[0]).batch([], TrainOn.ASSISTANT_TURNS).encode() == []
