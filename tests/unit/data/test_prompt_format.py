"""prompt_format against LLMForge's documented semantics, written once more in plain Python."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tiny_tokenizers import FAMILIES
from tunesmith.config.schema import PromptFormat
from tunesmith.data.conversation import Conversation, Message
from tunesmith.data.preview import trained_text
from tunesmith.data.prompt_format import chat_template
from tunesmith.data.rendering import Renderer, RenderingError, TrainOn

TOKENIZER = FAMILIES[0].build()


def rendered(fmt: PromptFormat, messages: list[Message], prompt: bool = False) -> str:
    return TOKENIZER.apply_chat_template(
        [message.to_dict() for message in messages],
        chat_template=chat_template(fmt),
        tokenize=False,
        add_generation_prompt=prompt,
    )


def as_llmforge(fmt: PromptFormat, messages: list[Message], prompt: bool = False) -> str:
    """BOS, then each message in its role's template, then what opens an answer.

    str.replace fills the slots where LLMForge has str.format, for which braces in a template are syntax.
    """

    def content(text: str) -> str:
        return text.strip() if fmt.strip_whitespace else text

    given_system = messages[0].content if messages[0].role == "system" else None
    system = fmt.default_system_message if given_system is None else given_system
    turn = fmt.system.replace("{instruction}", content(system))
    if not system and not fmt.add_system_tags_even_if_message_is_empty:
        turn = ""
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    carrier = users[-1 if fmt.system_in_last_user else 0]
    parts = [fmt.bos] if fmt.system_in_user else [fmt.bos, turn]
    for i, message in enumerate(messages):
        if message.role == "user":
            # The slots are found in the template, not in what was put into it before.
            before, after = fmt.user.split("{instruction}")
            carried = turn if i == carrier else ""
            if fmt.system_in_user:
                before, after = before.replace("{system}", carried), after.replace("{system}", carried)
            parts.append(before + content(message.content or "") + after)
        elif message.role == "assistant":
            parts.append(fmt.assistant.replace("{instruction}", content(message.content or "")))
    return "".join(parts) + (fmt.trailing_assistant if prompt else "")


# What Jinja, str.format, JSON and YAML each hold special, among plain text.
odd = st.sampled_from(
    ["{", "}", "{{", "}}", "{%", "%}", "{#", "#}", "{{ messages }}", "{0}", "%s", "'", '"', "\\", "\\n", "\n",
     "\r\n", "\t", " ", "{% raw %}", "m.content", "🙂", "é", "\u2028", "\x85", "[INST]", "<|im_end|>", "-"]
)  # fmt: skip
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
strings = st.lists(odd | letters, max_size=5).map("".join)
literals = strings.filter(lambda text: "{instruction}" not in text and "{system}" not in text)
contents = strings.filter(str.strip)
one_slot = st.tuples(literals, literals).map("{instruction}".join)


@st.composite
def formats(draw) -> PromptFormat:
    system_in_user = draw(st.booleans())
    user = draw(one_slot)
    if system_in_user:
        marked = draw(
            st.sampled_from(["{system}{instruction}", "{instruction} {system}", "{system} : {instruction}"])
        )
        user = user.replace("{instruction}", marked)
    return PromptFormat(
        system=draw(one_slot),
        user=user,
        assistant=draw(one_slot),
        trailing_assistant=draw(literals),
        bos=draw(literals),
        default_system_message=draw(literals),
        system_in_user=system_in_user,
        system_in_last_user=system_in_user and draw(st.booleans()),
        add_system_tags_even_if_message_is_empty=draw(st.booleans()),
        strip_whitespace=draw(st.booleans()),
    )


@st.composite
def conversations(draw) -> list[Message]:
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(contents)), Message("assistant", draw(contents))]
    return messages[:-1] if draw(st.booleans()) else messages


@settings(max_examples=100, deadline=None, database=None)
@given(fmt=formats(), messages=conversations(), prompt=st.booleans())
def test_any_format_renders_as_documented(fmt, messages, prompt):
    assert rendered(fmt, messages, prompt) == as_llmforge(fmt, messages, prompt)


LLAMA2 = PromptFormat(
    system="<<SYS>>\n{instruction}\n<</SYS>>\n\n",
    user="[INST] {system}{instruction} [/INST]",
    assistant=" {instruction} </s><s>",
    bos="<s>",
    system_in_user=True,
)
U, A, V, S = Message("user", "u"), Message("assistant", "a"), Message("user", "v"), Message("system", "s")


@pytest.mark.parametrize(
    ("changed", "messages", "expected"),
    [
        ({}, [U], "<s>[INST] u [/INST]"),
        ({}, [S, U, A, V], "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST] a </s><s>[INST] v [/INST]"),
        (
            {"system_in_last_user": True},
            [S, U, A, V],
            "<s>[INST] u [/INST] a </s><s>[INST] <<SYS>>\ns\n<</SYS>>\n\nv [/INST]",
        ),
        ({"default_system_message": "d"}, [U], "<s>[INST] <<SYS>>\nd\n<</SYS>>\n\nu [/INST]"),
        ({"default_system_message": "d"}, [S, U], "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST]"),
        (
            {"add_system_tags_even_if_message_is_empty": True},
            [U],
            "<s>[INST] <<SYS>>\n\n<</SYS>>\n\nu [/INST]",
        ),
        (
            {"system_in_user": False, "user": "[INST] {instruction} [/INST]", "system": "({instruction})"},
            [S, U],
            "<s>(s)[INST] u [/INST]",
        ),
        ({"strip_whitespace": False}, [Message("user", " u\n")], "<s>[INST]  u\n [/INST]"),
        ({}, [Message("user", " u\n")], "<s>[INST] u [/INST]"),
    ],
)
def test_known_renderings(changed, messages, expected):
    assert rendered(LLAMA2.model_copy(update=changed), messages) == expected


def test_the_trailing_assistant_stands_in_prompts_only():
    fmt = PromptFormat(user="U:{instruction};", assistant="A:{instruction};", trailing_assistant="A:")
    assert rendered(fmt, [U, A]) == "U:u;A:a;"
    assert rendered(fmt, [U], prompt=True) == "U:u;A:"


def test_passing_the_text_through_is_the_default():
    assert rendered(PromptFormat(strip_whitespace=False), [Message("user", " once\n")]) == " once\n"


def test_tool_messages_are_refused():
    TOKENIZER.chat_template = chat_template(LLAMA2)
    messages = (U, A, Message("tool", "42"), A)
    with pytest.raises(RenderingError):
        Renderer(TOKENIZER).prompt(Conversation(messages))


def test_training_and_serving_agree():
    tokenizer = FAMILIES[0].build()
    tokenizer.chat_template = chat_template(
        PromptFormat(
            system="<|im_start|>sys {instruction}<|im_end|>",
            user="<|im_start|>U {instruction}<|im_end|>",
            assistant="<|im_start|>A\n{instruction}<|im_end|>",
            trailing_assistant="<|im_start|>A\n",
        )
    )
    renderer = Renderer(tokenizer)
    row = renderer.example(Conversation((S, U, A, V, Message("assistant", "\n\nb"))), TrainOn.ASSISTANT_TURNS)
    assert trained_text(row, tokenizer) == ["a<|im_end|>", "b<|im_end|>"]
    prompt = renderer.prompt(Conversation((S, U, A, V)))
    assert row.ids[: len(prompt)].tolist() == prompt
    assert row.trained[len(prompt)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"user": "no slot"}, "must contain {instruction} exactly once"),
        ({"system": "{instruction}{instruction}"}, "must contain {instruction} exactly once"),
        ({"assistant": ""}, "must contain {instruction} exactly once"),
        ({"system_in_user": True}, "must contain {system} exactly once in user"),
        ({"user": "{system}{instruction}"}, "must not contain {system} in user"),
        ({"system_in_last_user": True}, "must not set system_in_last_user without system_in_user"),
    ],
)
def test_formats_that_contradict_themselves(settings, message):
    with pytest.raises(ValidationError) as caught:
        PromptFormat(**settings)
    assert message in str(caught.value)
