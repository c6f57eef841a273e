"""Every rule a row can break, with its wording; and that no text whatever raises."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_rows import CALL, TOOL, A, C, S, T, U, call, called, chat, tool, without
from tunesmith.data.conversation import Conversation, PlainText, Problem, parse_example
from tunesmith.data.sources import RawRecord


def parse(text: str) -> Any:
    return parse_example(RawRecord(text, "rows.jsonl", 7))


NOT_JSON = [
    ("{'text': 'a'}", 'JSON text stands in double quotes ("), not single ones, at column 2'),
    ("{\"text\": 'a'}", "not single ones, at column 10"),
    ('{"text": "a"', "JSON is incomplete, it stops at column 13: a row is one whole line"),
    ("{", "JSON is incomplete, it stops at column 2"),
    ("[", "JSON is incomplete, it stops at column 2"),
    ("hello", "not JSON at column 1: expected value"),
    ('{"text": "a}', "not JSON at column 10: unterminated string"),
    ('{"text" "a"}', "not JSON at column 9: expected ':' delimiter"),
    ('{"text": "a" "id": 1}', "not JSON at column 14: expected ',' delimiter"),
    ('{"text": "a\tb"}', "not JSON at column 12: invalid control character"),
    ('{"text": "a\0b"}', "not JSON at column 12: invalid control character"),
    (r'{"text": "\x41"}', "not JSON at column 11: invalid \\escape"),
    (r'{"text": "\u12"}', "not JSON at column 12: invalid \\uXXXX escape"),
    ('{"text": "a"} {"text": "b"}', "more text after the JSON value at column 15: a line holds one row"),
    ('{"text": "a"},', "more text after the JSON value at column 14"),
    ('\ufeff{"text": "a"}', "byte order mark inside the file at column 1"),
    ('{"text": True}', "JSON writes true, false and null, not Python's names, at column 10"),
    ('{"text": None}', "not Python's names"),
    ('{"text": "a", "x": NaN}', "NaN is not a JSON number"),
    ('{"text": "a", "x": -Infinity}', "-Infinity is not a JSON number"),
    ('{"text": "a", "x": 1e999}', "a number is too large"),
    ('{"text": "a", "x": ' + "9" * 5000 + "}", "a number has too many digits"),
    ('{"text": "a", "text": "b"}', 'key "text" is written twice in one object'),
    (chat(U, A).replace('"u"', '"u", "role": "user"'), 'key "role" is written twice'),
    ("[" * 100_000, "JSON is nested deeper than 100 levels"),
    ('{"text": "a", "x": ' + "[" * 100 + "]" * 100 + "}", "JSON is nested deeper than 100 levels"),
    (r'{"text": "a\u0000b"}', "text contains the character U+0000"),
    (r'{"text": "a", "x": [{"a\u0000": 1}]}', "text contains the character U+0000"),
    (r'{"text": "a\ud83d"}', "text contains half a surrogate pair, U+D83D"),
    ('{"text": "a\udc00"}', "text contains half a surrogate pair, U+DC00"),
]
NOT_A_ROW = [
    ("[]", "a row must be an object with messages or text, not a list"),
    ('"text"', "a row must be an object with messages or text, not text"),
    ("null", "not null"),
    ("3", "not a number"),
    ("true", "not true or false"),
    ("{}", "no key messages or text"),
    ('{"prompt": "a", "completion": "b"}', "no key messages or text"),
    ('{"message": []}', 'no key messages or text; "message" looks like messages'),
    ('{"id": 1, "mesages": []}', '"mesages" looks like messages'),
    ('{"Text": "a"}', '"Text" looks like text'),
    ('{"prompt": [], "chosen": [], "rejected": []}', "a preference row"),
    ('{"messages": [], "text": "a"}', "a row has messages or text, not both"),
    ('{"text": "a", "tools": []}', "tools belong to a row with messages, not text"),
    ('{"text": "a", "mesages": []}', 'unknown key "mesages"; closest is messages'),
    (chat(U, A, tool=[TOOL]), 'unknown key "tool"; closest is tools'),
    (chat(U, A, Tools=[TOOL]), 'unknown key "Tools"; closest is tools'),
    (chat(U, A, functions=[{"name": "f"}]), "functions is OpenAI's old form; write tools"),
    ('{"text": 3}', "text must be text, not a number"),
    ('{"text": null}', "text must be text, not null"),
    ('{"text": " \\n\u2003"}', "text is empty"),
]
NOT_A_MESSAGE = [
    ('{"messages": {}}', "messages must be a list of objects, not an object"),
    ('{"messages": null}', "messages must be a list of objects, not null"),
    ('{"messages": []}', "messages is empty"),
    (chat(U, "a"), "message 2 must be an object, not text"),
    (chat(U, {"content": "a"}), "message 2 has no role"),
    (
        chat(U, {"role": "model", "content": "a"}),
        "message 2: unknown role; allowed are system, user, assistant, tool",
    ),
    (chat({"role": ["user"], "content": "a"}), "message 1: unknown role"),
    (chat({"role": "User", "content": "a"}), "message 1: unknown role"),
    (chat(U, {**A, "weight": 0}), "message 2: weight is not supported"),
    (chat(U, {**A, "contents": "x"}), 'message 2: unknown key "contents"; closest is content'),
    (chat(U, {**A, "zzz": "x"}), 'message 2: unknown key "zzz"; known are role, content, name'),
    (chat({"role": "user"}), "message 1 has no content"),
    (chat(U, {"role": "assistant"}), "message 2 has no content"),
    (chat({**U, "content": ""}), "message 1: content is empty"),
    (chat(U, {**A, "content": "\n "}), "message 2: content is empty"),
    (chat(U, {**C, "content": " "}), "message 2: content is empty"),
    (chat({**U, "content": None}), "message 1: content must be text, not null"),
    (chat({**U, "content": 5}), "message 1: content must be text, not a number"),
    (chat({**U, "content": {"text": "a"}}), "message 1: content must be text, not an object"),
    (chat({**U, "content": []}), "message 1: content is empty"),
    (chat({**U, "content": ["a"]}), "message 1, part 1: only parts of type text can be trained on"),
    (
        chat({**U, "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}),
        "message 1, part 2: only parts of type text",
    ),
    (chat({**U, "content": [{"type": "text"}]}), "message 1, part 1 must be type and text only, both text"),
    (chat({**U, "content": [{"type": "text", "text": 1}]}), "message 1, part 1 must be type and text only"),
    (chat({**U, "name": 3}), "message 1: name must be text, not a number"),
    (chat({**U, "name": ""}), "message 1: name is empty"),
]
WRONG_ORDER = [
    (chat(S), "nothing follows the system message"),
    (chat(A), "message 1: the first turn must be user, not assistant"),
    (chat(S, A), "message 2: the first turn must be user, not assistant"),
    (chat(S, S, U), "message 2: a second system message; at most one is allowed, and only first"),
    (chat(U, S, A), "message 2: system message not first; at most one is allowed"),
    (chat(U, U, A), "message 2: two user messages in a row"),
    (chat(U, A, A), "message 3: two assistant messages in a row"),
    (chat(T), "message 1: tool message, but no tool call stands before it"),
    (chat(U, T), "message 2: tool message, but no tool call stands before it"),
    (chat(U, A, T), "message 3: tool message, but no tool call stands before it"),
    (chat(U, C, T, T), "message 4: tool message, but every call before it is answered"),
    (
        chat(U, C, {**T, "tool_call_id": "zz"}),
        "message 3: tool message answers unknown tool call zz; open is c1",
    ),
    (chat(U, C, without(T, "tool_call_id")), "message 3: tool message has no tool_call_id; open is c1"),
    (chat(U, C, U), "message 3: user follows before c1 got a tool answer"),
    (chat(U, C, A), "message 3: assistant follows before c1 got a tool answer"),
    (chat(U, C, T, U), "message 4: user follows tool; the assistant must speak after a tool answer"),
]
WRONG_TOOLS = [
    (chat({**U, "tool_calls": [CALL]}), "message 1: tool_calls belong to the assistant, not user"),
    (chat({**U, "tool_call_id": "c1"}), "message 1: tool_call_id belongs to a tool message, not user"),
    (chat(U, C, {**T, "tool_call_id": 1}), "message 3: tool_call_id must be text, not a number"),
    (chat(U, {**C, "tool_calls": []}), "message 2: tool_calls must be a list of at least one call"),
    (chat(U, {**C, "tool_calls": CALL}), "message 2: tool_calls must be a list of at least one call"),
    (chat(U, {**C, "tool_calls": ["f"]}), "message 2, tool call 1 must be an object, not text"),
    (chat(U, {**C, "tool_calls": [CALL, CALL]}), "message 2: two tool calls have the same id"),
    (call(id=5), "message 2, tool call 1: id must be text, not a number"),
    (call(type="code"), 'message 2, tool call 1: type must be "function"'),
    (call(index=0), 'message 2, tool call 1: unknown key "index"'),
    (call(function=...), "message 2, tool call 1: function must be an object, not null"),
    (call(function={"arguments": "{}"}), "message 2, tool call 1: name must be text, not null"),
    (called({"x": 1}), "message 2, tool call 1: arguments must be the JSON text of an object, not an object"),
    (called("[1]"), "arguments must be the JSON text of an object, not of a list"),
    (called(""), "tool call 1: arguments: JSON is incomplete"),
    (called("{'x': 1}"), "tool call 1: arguments: JSON text stands in double quotes"),
    (called('{"x": 1, "x": 2}'), 'tool call 1: arguments: key "x" is written twice'),
    (called('{"x": "\\u0000"}'), "tool call 1: arguments: text contains the character U+0000"),
    (chat(U, A, tools={}), "tools must be a list of objects, not an object"),
    (chat(U, A, tools=["f"]), "tool 1 must be an object, not text"),
    (chat(U, A, tools=[{"name": "f"}]), 'tool 1: type must be "function"'),
    (tool(function=None), "tool 2: function must be an object, not null"),
    (tool(function={}), "tool 2: name must be text, not null"),
    (
        tool(function={"name": "f", "parameters": "x"}),
        "tool 2: parameters must be an object, not text",
    ),
]
REFUSED = NOT_JSON + NOT_A_ROW + NOT_A_MESSAGE + WRONG_ORDER + WRONG_TOOLS


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(text, says):
    problem = parse(text)
    assert isinstance(problem, Problem), problem
    assert says in problem.rule
    assert str(problem).startswith(f"rows.jsonl:7: {problem.rule}")
    assert str(problem).isprintable()
    assert len(problem.text) <= 62
    assert len(problem.rule) < 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.sampled_from(["user", "tool", "function"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*T, *C, *TOOL, *CALL, "messages", "tools", "text"]), inner, max_size=4
        )
    ),
)


@given(JSON | st.fixed_dictionaries({"messages": st.lists(JSON)}, optional={"tools": JSON}))
def test_no_json_value_raises(value):
    assert isinstance(parse(json.dumps(value)), Problem | Conversation | PlainText)


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_raises(text):
    problem = parse(text)
    assert isinstance(problem, Problem)
    assert str(problem).isprintable()


@given(st.integers(0, 10_000), st.sampled_from(["", "'", "\\", "]", "null", "\ud800"]))
def test_a_damaged_row_never_raises(at, put):
    row = chat(S, U, C, T, A, tools=[TOOL])
    at %= len(row)
    assert isinstance(parse(row[:at] + put + row[at + 1 :]), Problem | Conversation)
