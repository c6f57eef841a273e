"""Calls of tools in answers: read as training writes them, in whatever pieces they come."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_parts import served
from tiny_chats import named
from tiny_models import save_tiny_model
from tunesmith.data.rendering import Renderer
from tunesmith.models.base import BaseFolder
from tunesmith.models.stops import Stops
from tunesmith.serving.answering import sampling_of
from tunesmith.serving.chat import Voice
from tunesmith.serving.engine import CpuEngine
from tunesmith.serving.faults import Refusal
from tunesmith.serving.protocol import ChatRequest
from tunesmith.serving.tool_answers import HERMES, LLAMA, Call, CallReader, call_form, style_of

ONE = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>é"}}\n</tool_call>'
TWO = f'{ONE}\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>'
F, G = Call("f", '{"x": "</tool_call>é"}'), Call("g", "{}")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"x": {"$ref": "#/$defs/n"}},
                "required": ["x"],
                "additionalProperties": False,
                "$defs": {"n": {"type": kind}},
            },
        },
    }
    for name, kind in (("f", "integer"), ("g", "boolean"))
]


def voice_of(name: str, template: str | None = None) -> Voice:
    tokenizer = named(name).build()
    tokenizer.chat_template = template or tokenizer.chat_template
    return Voice(tokenizer, Renderer(tokenizer), Stops((tokenizer.eos_token_id,), ()))


def read(pieces: list[str], style: Any = HERMES, most: int | None = None) -> tuple[str, tuple[Call, ...]]:
    reader = CallReader(style, most)
    text = "".join(reader.add(piece) for piece in pieces)
    rest, calls = reader.end()
    return text + rest, calls


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (ONE, "", (F,)),
        (f"Let me see.\n{ONE}", "Let me see.", (F,)),
        (TWO, "", (F, G)),
        (f"{TWO}\n and more", "\n and more", (F, G)),
        (ONE.removesuffix("</tool_call>"), "", (F,)),
        ("a < b and <tool", "a < b and <tool", ()),
        ("blanks \n", "blanks \n", ()),
        ("x\n<tool_call>\n{broken", "x\n<tool_call>\n{broken", ()),
        (
            '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
            '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
            (),
        ),
        ('<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', ()),
        ('<tool_call>["name"]', '<tool_call>["name"]', ()),
        (
            '<tool_call>{"name": "f", "arguments": {"a": NaN}}',
            '<tool_call>{"name": "f", "arguments": {"a": NaN}}',
            (),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}',
            '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}',
            (),
        ),
        # Python reads it as infinity, which JSON cannot say.
        (
            '<tool_call>{"name": "f", "arguments": {"a": 1e999}}',
            '<tool_call>{"name": "f", "arguments": {"a": 1e999}}',
            (),
        ),
        (
            '<tool_call>{"name": "\\ud800", "arguments": {}}',
            '<tool_call>{"name": "\\ud800", "arguments": {}}',
            (),
        ),
    ],
)
@given(data=st.data())
def test_marked_calls_in_any_pieces(
    answer: str, text: str, calls: tuple[Call, ...], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(pieces) == (text, calls)


def test_text_is_told_before_the_answer_ends() -> None:
    reader = CallReader(HERMES)
    assert [reader.add(piece) for piece in ("Hi ", "you <t", "wo> ", ONE)] == ["Hi", " you", " <two>", ""]
    assert reader.end() == ("", (F,))


def test_llama_calls() -> None:
    one = ' {"name": "f", "parameters": {"x": 1}}'
    assert read([one[:3], one[3:]], LLAMA) == ("", (Call("f", '{"x": 1}'),))
    assert read([f"{one}; {one}"], LLAMA)[1] == (Call("f", '{"x": 1}'),) * 2
    assert read([f"{one}; {one}"], LLAMA, 1)[1] == (Call("f", '{"x": 1}'),)
    for text in ('{"a": 1}', " no call", f"see {one}", f"{one} x", ""):
        assert read(list(text), LLAMA) == (text, ())


def test_styles_are_known_by_their_templates() -> None:
    called = '{{ \'{"name": "\' + m.tool_calls[0].name }}{{ \'"parameters": \' }}'
    llama = f"{{% for m in messages %}}{{% if m.tool_calls %}}{called}{{% endif %}}{{% endfor %}}"
    assert style_of(voice_of("qwen2.5")) is HERMES
    assert style_of(voice_of("llama3", llama)) is LLAMA
    assert style_of(voice_of("chatml")) is None
    assert (
        style_of(voice_of("qwen2.5", '{% if tool_calls %}<tool_call><function=f>"arguments": {% endif %}'))
        is None
    )


def test_what_training_renders_is_read_back() -> None:
    voice = voice_of("qwen2.5")
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": "é <b>", "y": [1, None]}}}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well", "tool_calls": calls}]
    text = voice.tokenizer.apply_chat_template(turns, tokenize=False).partition("<|im_start|>assistant\n")[2]
    said, found = read([text.removesuffix("<|im_end|>\n")])
    assert said == "Well"
    assert [(call.name, json.loads(call.arguments)) for call in found] == [
        ("f", {"x": "é <b>", "y": [1, None]})
    ]


def request(**more: Any) -> ChatRequest:
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": TOOLS, **more}
    return ChatRequest.model_validate(fields)


@pytest.mark.parametrize(
    ("choice", "good", "bad"),
    [
        ("required", '{"name": "g", "arguments": {"x": true}}', '{"name": "h"'),
        (
            {"type": "function", "function": {"name": "f"}},
            '{"name": "f", "arguments": {"x": 12}}',
            '{"name": "g"',
        ),
    ],
)
def test_a_call_that_has_to_be_made_is_held_to_the_tools(choice: Any, good: str, bad: str) -> None:
    voice = voice_of("qwen2.5")
    sampling, reading = sampling_of(request(tool_choice=choice), voice, 50, 600)
    assert sampling.constraint is not None
    answer = f"<tool_call>\n{good}\n</tool_call>"
    held = sampling.constraint()
    for token in voice.tokenizer(answer, add_special_tokens=False)["input_ids"]:
        mask = held.mask()
        assert mask[token]
        assert not mask[voice.tokenizer.eos_token_id]
        held.accept(token)
    assert held.mask()[voice.tokenizer.eos_token_id]
    reader = reading.call_reader()
    assert reader is not None
    assert reader.add(answer) == ""
    assert len(reader.end()[1]) == 1
    other = sampling.constraint()
    is_allowed = []
    for token in voice.tokenizer(f"<tool_call>\n{bad}", add_special_tokens=False)["input_ids"]:
        is_allowed.append(bool(other.mask()[token]))
        if not is_allowed[-1]:
            break
        other.accept(token)
    assert not all(is_allowed)


@pytest.mark.parametrize(
    ("voice", "choice", "said"),
    [
        ("chatml", "required", "tool_choice: how this model's chat template writes calls is not known here"),
        ("qwen2.5", {"type": "function", "function": {"name": "h"}}, "tool_choice: no tool has the name h"),
    ],
)
def test_choices_that_cannot_be_made(voice: str, choice: Any, said: str) -> None:
    with pytest.raises(Refusal, match="^" + said):
        sampling_of(request(tool_choice=choice), voice_of(voice), 50, 600)


def test_parameters_are_a_schema_of_an_object() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
    with pytest.raises(Refusal, match=r"^tools\.0\.function\.parameters: must be"):
        call_form(HERMES, voice_of("qwen2.5"), [tool], None, None)


# By HTTP


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = save_tiny_model(tmp_path_factory.mktemp("bases") / "tiny", tied=False)
    tokenizer = named("qwen2.5").build()
    assert len(tokenizer) <= 400
    tokenizer.save_pretrained(folder)
    engine = CpuEngine(BaseFolder("tiny", folder, None))
    with (
        served(folder, tmp_path_factory.mktemp("root"), engine) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as found,
    ):
        yield found


MUST_CALL: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": [TOOLS[1]], "max_tokens": 60,
    "tool_choice": {"type": "function", "function": {"name": "g"}}, "temperature": 0,
}  # fmt: skip


# A model without sense would fill the call with white space.
NO_BLANKS = {
    str(named("qwen2.5").tokenizer.convert_tokens_to_ids(blank)): -100 for blank in ("Ġ", "Ċ", "ĉ", "č")
}


def test_a_call_by_http_and_in_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**MUST_CALL, logit_bias=NO_BLANKS).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name) == ("function", "g")
    assert json.loads(call.function.arguments)["x"] in (True, False)
    chunks = [
        chunk.choices[0]
        for chunk in client.chat.completions.create(**MUST_CALL, logit_bias=NO_BLANKS, stream=True)
    ]
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    (told,) = [called for chunk in chunks for called in chunk.delta.tool_calls or ()]
    assert (told.index, told.function.name) == (0, "g")
    assert told.function.arguments == call.function.arguments


def test_a_free_answer_with_tools_stays_text(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**{**MUST_CALL, "tool_choice": "auto", "max_tokens": 5}).choices[
        0
    ]
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")
