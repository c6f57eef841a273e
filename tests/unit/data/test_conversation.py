"""Rows -> examples: what is valid, what is kept as written, and what trains on what."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_rows import CALL, TOOL, A, C, S, T, U, chat, without
from tunesmith.data.conversation import (
    Conversation,
    Message,
    PlainText,
    Problem,
    ToolCall,
    conversation_from_row,
    detect_task,
    iter_examples,
    parse_example,
    training_problem,
)
from tunesmith.data.problems import BrokenRule
from tunesmith.data.sources import RawRecord
from tunesmith.errors import DataError


def parse(text: str) -> Any:
    return parse_example(RawRecord(text, "rows.jsonl", 7))


def parsed(text: str) -> Any:
    example = parse(text)
    assert not isinstance(example, Problem), example
    return example


# --- what is accepted


@pytest.mark.parametrize(
    "messages",
    [
        [U],
        [U, A],
        [S, U],
        [S, U, A],
        [U, A, U, A],
        [U, A, U],
        [U, C],
        [U, C, T],
        [U, C, T, A],
        [U, C, T, C, T, A, U, A],
    ],
)
def test_orders_of_turns_that_are_valid(messages):
    example = parsed(chat(*messages))
    assert [message.role for message in example.messages] == [message["role"] for message in messages]


def test_every_field_arrives():
    user, caller, answer = {**U, "name": "Ann"}, {**C, "content": "Let me see."}, {**T, "name": "f"}
    assert parsed(chat(S, user, caller, answer, A, tools=[TOOL])) == Conversation(
        (
            Message("system", "s"),
            Message("user", "u", name="Ann"),
            Message("assistant", "Let me see.", (ToolCall("c1", "f", '{"x": 1}'),)),
            Message("tool", "42", tool_call_id="c1", name="f"),
            Message("assistant", "a"),
        ),
        (TOOL,),
    )


def test_other_top_level_keys_are_not_read():
    row = json.dumps(
        {"id": 3, "messages": [U, A], "choices": ["a"], "gold": 0, "tool": "wrench", "Text": "x"}
    )
    assert parsed(row) == Conversation((Message("user", "u"), Message("assistant", "a")))
    assert parsed('{"text": "t", "id": 1, "message": "a commit message"}') == PlainText("t")


def test_null_stands_for_an_absent_optional_key():
    message = {**U, "tool_calls": None, "tool_call_id": None, "name": None}
    assert parsed(chat(message, A, tools=None)) == parsed(chat(U, A)) == parsed(chat(U, A, tools=[]))


@pytest.mark.parametrize("caller", [C, {**C, "content": ""}, without(C, "content")])
def test_a_turn_of_nothing_but_calls_has_no_content(caller):
    assert parsed(chat(U, caller)).messages[1].content is None


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert parsed(chat({**U, "content": parts}, A)).messages[0].content == "one two"


def test_several_calls_are_answered_in_any_order_and_calls_without_id_in_turn():
    two = {**C, "tool_calls": [CALL, {**CALL, "id": "c2"}]}
    assert len(parsed(chat(U, two, {**T, "tool_call_id": "c2"}, T, A)).messages) == 5
    bare = {**C, "tool_calls": [without(CALL, "id"), without(CALL, "id")]}
    answer = without(T, "tool_call_id")
    assert len(parsed(chat(U, bare, answer, answer, A)).messages) == 5
    assert parsed(chat(U, bare)).messages[1].tool_calls[0] == ToolCall(None, "f", '{"x": 1}')


def test_dicts_for_templates():
    bare = {"role": "assistant", "tool_calls": [without(CALL, "id")]}
    function = {"name": "f", "arguments": {"x": 1}}
    assert parsed(chat({**U, "name": "Ann"}, C, T)).to_dicts() == [
        {"role": "user", "content": "u", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    assert parsed(chat(U, bare)).to_dicts()[1]["tool_calls"] == [{"type": "function", "function": function}]


def test_a_decoded_row_gives_the_same_conversation():
    assert conversation_from_row(json.loads(chat(U, C, T, tools=[TOOL]))) == parsed(
        chat(U, C, T, tools=[TOOL])
    )
    with pytest.raises(BrokenRule, match="messages is empty"):
        conversation_from_row({"messages": []})


# --- texts are kept exactly

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
EDGES = [
    "a\u2028b",
    "a\x85b",
    "\ta\n",
    "\ufeffa",
    "a\r\nb",
    "<|im_end|>",
    "\x1b[0m",
    "e\u0301",
    "🧑‍🚀",
    "\x7f",
    "a\x0b\x0c",
]


@pytest.mark.parametrize("text", EDGES)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_odd_texts_survive_file_and_json(tmp_path, text, ascii_only):
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [{**U, "content": text}, {**A, "content": text}]}, {"text": text}]
    path.write_bytes("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode())
    first, second = (example for _, example in iter_examples(str(path)))
    assert [message.content for message in first.messages] == [text, text]
    assert second == PlainText(text)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXT), name=draw(st.none() | TEXT)))
        if draw(st.booleans()):
            ids = [f"{turn}-{n}" for n in range(draw(st.integers(1, 2)))]
            arguments = json.dumps(draw(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=2)))
            calls = tuple(ToolCall(i, draw(TEXT), arguments) for i in ids)
            messages.append(Message("assistant", draw(st.none() | TEXT), calls))
            messages += [Message("tool", draw(TEXT), tool_call_id=i) for i in draw(st.permutations(ids))]
        messages.append(Message("assistant", draw(TEXT)))
    return Conversation(tuple(messages), ({"type": "function", "function": {"name": draw(TEXT)}},))


def as_row(conversation: Conversation) -> dict[str, Any]:
    messages = []
    for m in conversation.messages:
        calls = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in m.tool_calls
        ]
        message = {"role": m.role, "content": m.content, "name": m.name, "tool_call_id": m.tool_call_id}
        messages.append(message | ({"tool_calls": calls} if calls else {}))
    return {"messages": messages, "tools": list(conversation.tools)}


@given(conversations(), st.booleans())
def test_any_conversation_survives(conversation, ascii_only):
    assert parse(json.dumps(as_row(conversation), ensure_ascii=ascii_only)) == conversation


@given(TEXT)
def test_any_plain_text_survives(text):
    assert parse(json.dumps({"text": text}, ensure_ascii=False)) == PlainText(text)


# --- streaming and tasks


def test_stream_gives_examples_and_problems_in_place(tmp_path):
    path = tmp_path / "a.jsonl"
    first = chat(U, A).encode()
    path.write_bytes(b"\n".join([first, b"", b'{"text": "\xff"}', b"{}", b'{"text": "t"}']))
    rows = list(iter_examples(str(path)))
    assert [(record.line, type(example)) for record, example in rows] == [
        (1, Conversation),
        (3, Problem),
        (4, Problem),
        (5, PlainText),
    ]
    assert rows[1][1].rule == f"invalid UTF-8 at byte {len(first) + 2 + 10} of the file"
    assert all((r.file, r.line) == (e.file, e.line) for r, e in rows[1:3])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (chat(U, A), None),
        (chat(U, C), None),
        (chat(S, U, C, T, A), None),
        (chat(S, U), "no assistant message to train on"),
        (chat(U, A, U), "the last message must be from the assistant, not user"),
        (chat(U, C, T), "the last message must be from the assistant, not tool"),
        ('{"text": "t"}', "a plain text row has no assistant turn to train on; use task causal_lm"),
    ],
)
def test_what_each_task_can_train_on(tmp_path, text, rule):
    assert training_problem(parsed(text), "instruction_tuning") == rule
    assert training_problem(parsed(text), "causal_lm") is None
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert [e.rule for _, e in iter_examples(str(path), "instruction_tuning") if isinstance(e, Problem)] == [
        *([rule] if rule else [])
    ]


def test_an_unresolved_task_is_a_fault_of_the_caller():
    with pytest.raises(ValueError, match="no rules for task 'auto'"):
        training_problem(PlainText("t"), "auto")


@pytest.mark.parametrize(
    ("rows", "task"),
    [
        ([chat(U, A)], "instruction_tuning"),
        ([chat(U, A, U), '{"text": "t"}'], "instruction_tuning"),
        ([chat(U), chat(U, A)], "causal_lm"),
        (['{"text": "t"}'], "causal_lm"),
        (["{}", chat(A), chat(U, C)], "instruction_tuning"),
    ],
)
def test_task_is_told_by_the_first_valid_row(tmp_path, rows, task):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    assert detect_task(str(path)) == task


def test_no_valid_row_lists_what_is_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n[]\n")
    with pytest.raises(DataError) as caught:
        detect_task(str(path))
    assert str(caught.value).split("\n") == [
        f"{path}: 2 rows break a rule; mend them or pass --skip-bad-rows",
        f"  {path}:1: no key messages or text: {{}}",
        f"  {path}:2: a row must be an object with messages or text, not a list: []",
    ]
