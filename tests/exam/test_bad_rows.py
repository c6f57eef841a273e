"""The exam of bad rows: named faults, each refused with file, line and rule; and oddities with their meaning.

Each line under test stands between two good ones: those must not be lost, and the file must be refused as a
whole unless bad rows are skipped.
"""

import json

import pytest

import tiny_models
from chat_rows import CALL, TOOL, A, C, S, T, U, call, called, chat, tool, without
from exam.reading import GOOD, answers_of, lines_of, put, read, refusal
from flow_parts import refused, settings_for, write_config
from tiny_tokenizers import byte_level
from tunesmith.cli import main
from tunesmith.data.rendering import Renderer
from tunesmith.data.splits import load_splits
from tunesmith.errors import DataError

DEEP = "[" * 100 + "]" * 100
ROLES = "allowed are system, user, assistant, tool"


def beside(text: str) -> str:
    """A good row with one more key, which is not read, written as ``text``."""
    return chat(U, A)[:-1] + f', "x": {text}}}'


REFUSED: dict[str, tuple[str | bytes, str]] = {
    # not JSON
    "truncated in an object": (GOOD[:-1], f"JSON is incomplete, it stops at column {len(GOOD)}"),
    "truncated in a list": (GOOD[:14], "JSON is incomplete, it stops at column 15: a row is one whole line"),
    "truncated in a text": (GOOD[:25], "not JSON at column 24: unterminated string"),
    "truncated in an escape": (b'{"text": "a\\u00', "not JSON at column 13: invalid \\uXXXX escape"),
    "one brace": ("{", "JSON is incomplete, it stops at column 2"),
    "no JSON at all": ("user: hi", "not JSON at column 1: expected value"),
    "single quotes": (str(json.loads(GOOD)), 'JSON text stands in double quotes ("), not single ones, at column 2'),
    "Python's True": (beside("True"), "JSON writes true, false and null, not Python's names, at column"),
    "Python's None": (beside("None"), "JSON writes true, false and null, not Python's names, at column"),
    "NaN": (beside("NaN"), "NaN is not a JSON number"),
    "Infinity": (beside("[Infinity]"), "Infinity is not a JSON number"),
    "minus Infinity": (beside('{"y": -Infinity}'), "-Infinity is not a JSON number"),
    "a number beyond a float": (beside("-1e999"), "a number is too large: -1e999"),
    "a number of 5,000 digits": (beside("9" * 5000), "a number has too many digits"),
    "a number of a million digits": (beside("1" * 1_000_000), "a number has too many digits"),
    "a number that starts with zero": (beside("007"), "not JSON at column"),
    "a number in hexadecimal": (beside("0xFF"), "not JSON at column"),
    "a comma at the end": (GOOD[:-1] + b",}", "not JSON at column"),
    "a comma between rows": (GOOD + b",", f"more text after the JSON value at column {len(GOOD) + 1}"),
    "two rows in a line": (GOOD + GOOD, f"more text after the JSON value at column {len(GOOD) + 1}"),
    "a comment": (GOOD + b" // good", f"more text after the JSON value at column {len(GOOD) + 2}"),
    "YAML": ("- role: user", "not JSON at column 1: expected value"),
    "a tab inside a text": ('{"text": "a\tb"}', "not JSON at column 12: invalid control character"),
    "an unknown escape": (r'{"text": "\x41"}', r"not JSON at column 11: invalid \escape"),
    "key without quotes": ('{messages: []}', "not JSON at column 2: expected property name"),
    "typographic quotes": ("{“messages”: []}", "not JSON at column 2: expected property name"),
    "ends of lines as in old Macs": (GOOD + b"\r" + GOOD, "more text after the JSON value at column"),
    # bytes
    "latin-1": ('{"text": "caf\xe9"}'.encode("latin-1"), f"invalid UTF-8 at byte {len(GOOD) + 14} of the file"),
    "an overlong form": (b'{"text": "\xc0\x80"}', f"invalid UTF-8 at byte {len(GOOD) + 11} of the file"),
    "a surrogate as bytes": (b'{"text": "\xed\xa0\x80"}', f"invalid UTF-8 at byte {len(GOOD) + 11} of the file"),
    "a character cut at the end": ("é".encode()[:1], f"invalid UTF-8 at byte {len(GOOD) + 1} of the file"),
    "UTF-16 inside": ('{"a": 1}'.encode("utf-16"), f"invalid UTF-8 at byte {len(GOOD) + 1} of the file"),
    "null bytes": (b"\0" * 100, "not JSON at column 1: expected value"),
    "a null byte in a text": (b'{"text": "a\0b"}', "not JSON at column 12: invalid control character"),
    "a null character, escaped": (r'{"text": "a\u0000b"}', "text contains the character U+0000: "),
    "a null character in a key": (beside(r'[{"\u0000": 1}]'), "text contains the character U+0000"),
    "half a surrogate pair": (r'{"text": "a\ud83d"}', "text contains half a surrogate pair, U+D83D"),
    "surrogates in the wrong order": (beside(r'"\ude00\ud83d"'), "text contains half a surrogate pair, U+DE00"),
    "a byte order mark inside": (b"\xef\xbb\xbf" + GOOD, "byte order mark inside the file at column 1"),
    "control characters": ("\x1b[31m\x07", "not JSON at column 1: expected value: \\x1b[31m\\x07"),
    # keys and depth
    "a key twice": ('{"text": "a", "text": "a"}', 'key "text" is written twice in one object'),
    "a key twice, one escaped": (r'{"text": "a", "\u0074ext": "b"}', 'key "text" is written twice'),
    "a key twice deep inside": (beside('[{"y": {"z": 1, "z": 2}}]'), 'key "z" is written twice in one object'),
    "messages twice": (GOOD[:-1] + b', "messages": []}', 'key "messages" is written twice in one object'),
    "101 levels": (beside(DEEP), "JSON is nested deeper than 100 levels"),
    "100,000 levels": ("[" * 100_000, "JSON is nested deeper than 100 levels"),
    "100,000 levels of objects": ('{"a":' * 100_000 + "1", "JSON is nested deeper than 100 levels"),
    # no row
    "a list": ("[]", "a row must be an object with messages or text, not a list"),
    "a list of good rows": (b"[" + GOOD + b"]", "a row must be an object with messages or text, not a list"),
    "a text": ('"hi"', "a row must be an object with messages or text, not text"),
    "a text that holds a row": (json.dumps(GOOD.decode()), "a row must be an object with messages or text"),
    "a number": ("0", "a row must be an object with messages or text, not a number"),
    "null": ("null", "a row must be an object with messages or text, not null"),
    "true": ("true", "a row must be an object with messages or text, not true or false"),
    "an empty object": ("{}", "no key messages or text"),
    "another format": ('{"instruction": "a", "output": "b"}', "no key messages or text"),
    "messages misspelt": ('{"mesages": []}', 'no key messages or text; "mesages" looks like messages'),
    "messages in capitals": ('{"MESSAGES": []}', 'no key messages or text; "MESSAGES" looks like messages'),
    "an empty key": ('{"": []}', "no key messages or text"),
    "messages and text": (GOOD[:-1] + b', "text": "a"}', "a row has messages or text, not both"),
    "a preference row": ('{"chosen": "a", "rejected": "b"}', "a preference row; a row here has messages or text"),
    "plain text in a chat file": ('{"text": "a"}', "a plain text row has no assistant turn to train on"),
    "plain text that is a list": ('{"text": ["a"]}', "text must be text, not a list"),
    "tools misspelt": (chat(U, A, toosl=[TOOL]), 'unknown key "toosl"; closest is tools'),
    "tools with another letter": (chat(U, A, tooks=[TOOL]), 'unknown key "tooks"; closest is tools'),
    "tools in the old form": (chat(U, A, functions=[{}]), "functions is OpenAI's old form; write tools"),
    # messages of a wrong type
    "messages is null": ('{"messages": null}', "messages must be a list of objects, not null"),
    "messages is a text": ('{"messages": "hi"}', "messages must be a list of objects, not text"),
    "messages is an object": ('{"messages": {}}', "messages must be a list of objects, not an object"),
    "messages is empty": ('{"messages": []}', "messages is empty"),
    "a message is null": (chat(None, A), "message 1 must be an object, not null"),
    "a message is a text": (chat(U, "a"), "message 2 must be an object, not text"),
    "a message is a list": (chat(U, [A]), "message 2 must be an object, not a list"),
    "a message is empty": (chat(U, {}), "message 2 has no role"),
    "an unknown key": (chat(U, {**A, "content ": "a"}), 'message 2: unknown key "content "; closest is content'),
    "weight": (chat(U, {**A, "weight": 1}), "message 2: weight is not supported"),
    "no role": (chat(without(U, "role"), A), "message 1 has no role"),
    "an unknown role": (chat(U, {**A, "role": "bot"}), f'message 2: unknown role; {ROLES}: "bot"'),
    "a role in capitals": (chat(U, {**A, "role": "Assistant"}), f"message 2: unknown role; {ROLES}"),
    "a role that is a list": (chat({**U, "role": ["user"]}, A), f"message 1: unknown role; {ROLES}"),
    "a role that is null": (chat({**U, "role": None}, A), f"message 1: unknown role; {ROLES}"),
    "no content": (chat(U, {"role": "assistant"}), "message 2 has no content"),
    "content is null": (chat(U, {**A, "content": None}), "message 2: content must be text, not null"),
    "content is a number": (chat({**U, "content": 0}, A), "message 1: content must be text, not a number"),
    "content is false": (chat({**U, "content": False}, A), "message 1: content must be text, not true or false"),
    "content is an object": (chat({**U, "content": {}}, A), "message 1: content must be text, not an object"),
    "content is empty": (chat(U, {**A, "content": ""}), "message 2: content is empty"),
    "content is white space": (chat(U, {**A, "content": " \n\u3000"}), "message 2: content is empty"),
    "a system message of blanks": (chat({**S, "content": "\t"}, U, A), "message 1: content is empty"),
    "no parts": (chat({**U, "content": []}, A), "message 1: content is empty"),
    "a part that is a text": (chat({**U, "content": ["a"]}, A), "message 1, part 1: only parts of type text"),
    "an image": (chat({**U, "content": [{"type": "image_url"}]}, A), "message 1, part 1: only parts of type text"),
    "a part without text": (chat({**U, "content": [{"type": "text"}]}, A), "message 1, part 1 must be type and text"),
    "a part whose text is a list": (
        chat({**U, "content": [{"type": "text", "text": []}]}, A),
        "message 1, part 1 must be type and text only, both text",
    ),
    "a name that is a number": (chat({**U, "name": 1}, A), "message 1: name must be text, not a number"),
    # turns
    "only a system message": (chat(S), "nothing follows the system message"),
    "no assistant": (chat(U), "no assistant message to train on"),
    "the last word is the user's": (chat(U, A, U), "the last message must be from the assistant, not user"),
    "the assistant begins": (chat(A, U, A), "message 1: the first turn must be user, not assistant"),
    "two system messages": (chat(S, S, U, A), "message 2: a second system message"),
    "a late system message": (chat(U, S, A), "message 2: system message not first"),
    "two user messages": (chat(U, U, A), "message 2: two user messages in a row"),
    "two answers": (chat(U, A, A), "message 3: two assistant messages in a row"),
    # tools
    "a tool answers nobody": (chat(U, T, A), "message 2: tool message, but no tool call stands before it"),
    "a tool answers twice": (chat(U, C, T, T, A), "message 4: tool message, but every call before it is answered"),
    "a tool answers another call": (
        chat(U, C, {**T, "tool_call_id": "c2"}, A),
        "message 3: tool message answers unknown tool call c2; open is c1",
    ),
    "a call without answer": (chat(U, C, A), "message 3: assistant follows before c1 got a tool answer"),
    "the user follows a tool": (chat(U, C, T, U, A), "message 4: user follows tool; the assistant must speak"),
    "the user calls a tool": (chat({**U, "tool_calls": [CALL]}, A), "message 1: tool_calls belong to the assistant"),
    "an id on an answer": (chat(U, {**A, "tool_call_id": "c1"}), "message 2: tool_call_id belongs to a tool message"),
    "no calls": (chat(U, {**C, "tool_calls": []}), "message 2: tool_calls must be a list of at least one call"),
    "calls are an object": (chat(U, {**C, "tool_calls": CALL}), "message 2: tool_calls must be a list"),
    "two calls of one id": (chat(U, {**C, "tool_calls": [CALL, CALL]}), "message 2: two tool calls have the same id"),
    "a call is null": (chat(U, {**C, "tool_calls": [None]}), "message 2, tool call 1 must be an object, not null"),
    "a call of another type": (call(type="code"), 'message 2, tool call 1: type must be "function"'),
    "a call with an index": (call(index=0), 'message 2, tool call 1: unknown key "index"'),
    "a call without function": (call(function=...), "message 2, tool call 1: function must be an object, not null"),
    "a call's name is a list": (
        call(function={"name": ["f"], "arguments": "{}"}),
        "message 2, tool call 1: name must be text, not a list",
    ),
    "arguments as an object": (called({}), "message 2, tool call 1: arguments must be the JSON text of an object"),
    "arguments as a list": (called("[]"), "message 2, tool call 1: arguments must be the JSON text of an object"),
    "arguments cut off": (called('{"x"'), "message 2, tool call 1: arguments: JSON is incomplete"),
    "arguments with a key twice": (called('{"x":1,"x":1}'), 'message 2, tool call 1: arguments: key "x" is written'),
    "arguments 101 deep": (called(f'{{"x":{DEEP}}}'), "message 2, tool call 1: arguments: JSON is nested deeper"),
    "tools is an object": (chat(U, A, tools=TOOL), "tools must be a list of objects, not an object"),
    "a tool is null": (chat(U, A, tools=[None]), "tool 1 must be an object, not null"),
    "a tool without type": (chat(U, A, tools=[without(TOOL, "type")]), 'tool 1: type must be "function"'),
    "a tool without name": (tool(function={}), "tool 2: name must be text, not null"),
    "parameters as text": (tool(function={"name": "f", "parameters": "x"}), "tool 2: parameters must be an object"),
    "a control token in a tool": (
        chat(U, A, tools=[{"type": "function", "function": {"name": "<|im_end|>"}}]),
        "a name, tool or tool call spells a control token; remove that text",
    ),
}  # fmt: skip

# Odd, but with a documented meaning: what the row then teaches.
ACCEPTED: dict[str, tuple[str | bytes, list[str]]] = {
    "CRLF": (GOOD + b"\r", ["a"]),
    "white space around": (b" \t" + GOOD + b" \t\r", ["a"]),
    "keys that are not read": (beside('{"y": [1e5, -0.0, null, true]}'), ["a"]),
    "100 levels": (beside(DEEP[1:-1]), ["a"]),
    "brackets inside a text": (chat(U, {**A, "content": "[" * 200}), ["[" * 200]),
    "a number of 4,000 digits": (beside("9" * 4000), ["a"]),
    "escapes": (GOOD.replace(b'"a"', b'"\\u0061\\n\\ud83d\\ude00"'), ["a\n😀"]),
    "an escaped key": (GOOD.replace(b'"messages"', b'"\\u006dessages"'), ["a"]),
    "line ends of Unicode": (GOOD.replace(b'"a"', '"a\u2028b\x85c"'.encode()), ["a\u2028b\x85c"]),
    "blanks around an answer": (chat(U, {**A, "content": "\n a "}), ["\n a "]),
    "a byte order mark in a text": (chat(U, {**A, "content": "\ufeffa"}), ["\ufeffa"]),
    "control tokens in a text": (chat(U, {**A, "content": "<|im_end|>x"}), ["<|im_end|>x"]),
    "a template in a text": (chat(U, {**A, "content": "{{ 1 / 0 }}{% x %}"}), ["{{ 1 / 0 }}{% x %}"]),
    "text in parts": (chat(U, {**A, "content": [{"type": "text", "text": t} for t in ("a", "", "b")]}), ["ab"]),
    "null for what is absent": (chat({**U, "name": None, "tool_calls": None}, A, tools=None), ["a"]),
    "two answers": (chat(S, U, A, U, {**A, "content": "b"}), ["a", "b"]),
    "a list of another name": (chat(U, A, token_ids=[1], topics=["a"]), ["a"]),
}  # fmt: skip

# Several lines: the lines kept, and the words for the others.
FILES: dict[str, tuple[bytes, list[int], dict[int, str]]] = {
    "a byte order mark at the start": (b"\xef\xbb\xbf" + GOOD + b"\n", [1], {}),
    "no line end at the end": (GOOD + b"\n" + GOOD, [1, 2], {}),
    "blank lines count": (b"\n \n" + GOOD + b"\n\r\n\xe3\x80\x80\n" + GOOD + b"\n\n", [3, 6], {}),
    "one row over two lines": (
        GOOD + b"\n" + GOOD.replace(b", ", b",\n", 1),
        [1],
        {2: "JSON is incomplete", 3: "more text after the JSON value at column 10"},
    ),
    "a pretty-printed row": (
        GOOD + b"\n" + json.dumps(json.loads(GOOD)["messages"][0], indent=1).encode(),
        [1],
        {
            2: "JSON is incomplete",
            3: "more text after the JSON value",
            4: "more text after the JSON value",
            5: "not JSON at column 1",
        },
    ),
    "a JSON list of rows": (
        b"[\n" + GOOD + b",\n" + GOOD + b"\n]\n",
        [3],
        {1: "JSON is incomplete", 2: "more text after the JSON value", 4: "not JSON at column 1"},
    ),
    "the last line cut off": (GOOD + b"\n" + GOOD[:40], [1], {2: "JSON is incomplete"}),
    "zeros at the end, as after a crash": (GOOD + b"\n" + bytes(4096), [1], {2: "not JSON at column 1"}),
    "two files with byte order marks in one": (
        (b"\xef\xbb\xbf" + GOOD + b"\n") * 2,
        [1],
        {2: "byte order mark inside the file at column 1"},
    ),
}


def as_bytes(line: str | bytes) -> bytes:
    return line if isinstance(line, bytes) else line.encode()


def test_the_exam_is_large_enough():
    assert len(REFUSED) >= 100


@pytest.mark.parametrize(("line", "rule"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, line, rule):
    path = put(tmp_path / "rows.jsonl", b"\n".join([GOOD, as_bytes(line), GOOD, b""]))
    first, listed = refusal(path).split("\n")
    assert first == f"{path}: 1 row breaks a rule; mend it or pass --skip-bad-rows"
    assert listed.startswith(f"  {path}:2: {rule}")
    rows = read(path, skip_bad_rows=True)
    assert (lines_of(rows), rows.skipped) == ([1, 3], 1)


@pytest.mark.parametrize(("line", "answers"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(tmp_path, line, answers):
    path = put(tmp_path / "rows.jsonl", b"\n".join([GOOD, as_bytes(line), GOOD, b""]))
    rows = read(path)
    assert (lines_of(rows), rows.skipped) == ([1, 2, 3], 0)
    assert [answers_of(rows, i) for i in range(3)] == [["a"], answers, ["a"]]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(("data", "kept", "broken"), FILES.values(), ids=FILES)
def test_lines(tmp_path, data, kept, broken, packed):
    path = put(tmp_path / "rows.jsonl", data, packed=packed)
    rows = read(path, skip_bad_rows=True)
    assert (lines_of(rows), rows.skipped) == (kept, len(broken))
    if broken:
        listed = refusal(path).split("\n")[1:]
        assert len(listed) == len(broken)
        for text, (line, rule) in zip(listed, broken.items(), strict=True):
            assert text.startswith(f"  {path}:{line}: {rule}")


def test_every_fault_in_one_file_is_counted_and_every_good_row_kept(tmp_path):
    lines = [line for bad, _ in REFUSED.values() for line in (as_bytes(bad), GOOD)]
    path = put(tmp_path / "rows.jsonl", b"\n".join(lines))
    listed = refusal(path).split("\n")
    assert listed[0].startswith(f"{path}: {len(REFUSED)} rows break a rule")
    assert [line.split(":")[1] for line in listed[1:21]] == [str(n) for n in range(1, 40, 2)]
    assert listed[21:] == [f"  … and {len(REFUSED) - 20} more"]
    rows = read(path, skip_bad_rows=True)
    assert lines_of(rows) == list(range(2, 2 * len(REFUSED) + 1, 2))
    assert rows.skipped == len(REFUSED)


ANSWERS_ONLY = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
TEMPLATES = {
    "renders nothing": (ANSWERS_ONLY, chat(U), "the model's chat template renders this row to nothing"),
    "refuses with the whole text": (
        "{{ raise_exception(messages[0].content) }}",
        chat({**U, "content": "\x1b[31m" + "y" * 5000 + "\n" * 5000}),
        f"the model's chat template refuses this row: \\x1b[31m{'y' * 142}…: ",
    ),
    "breaks": ("{{ 1 / 0 }}", chat(U), "the model's chat template refuses this row: division by zero"),
    "is absent": (None, chat(U), "this model has no chat template; set generation_config.prompt_format"),
}


@pytest.mark.parametrize(("template", "line", "rule"), TEMPLATES.values(), ids=TEMPLATES)
def test_rows_that_only_a_template_refuses(tmp_path, template, line, rule):
    renderer = Renderer(byte_level(["<|end|>"], template, eos_token="<|end|>"))
    path = put(tmp_path / "rows.jsonl", b'{"text": "a"}\n' + line.encode())
    with pytest.raises(DataError) as caught:
        load_splits(str(path), None, renderer, "causal_lm", cache_dir=None)
    listed = str(caught.value).split("\n")[1]
    assert listed.startswith(f"  {path}:2: {rule}")
    assert listed.isprintable()
    rows = load_splits(str(path), None, renderer, "causal_lm", cache_dir=None, skip_bad_rows=True).train
    assert (lines_of(rows), rows.skipped) == ([1], 1)


def test_no_good_row_at_all(tmp_path):
    path = put(tmp_path / "rows.jsonl", b"{\n[]\n")
    assert refusal(path, skip_bad_rows=True) == refusal(path)
    assert "2 rows break a rule" in refusal(path)


@pytest.mark.flow
def test_the_command_says_it_without_a_traceback(tmp_path, capfd):
    model = tiny_models.save_tiny_model(tmp_path / "model")
    lines = [line for bad, _ in REFUSED.values() for line in (as_bytes(bad), GOOD)]
    path = put(tmp_path / "rows.jsonl", b"\n".join(lines))
    settings = settings_for(tmp_path, model, tmp_path, train_path=str(path), valid_path=...)
    config = str(write_config(tmp_path / "c.yaml", settings))
    err = refused(capfd, ["check", config], lines=22)  # exit code 2
    assert err.split("\n")[0].startswith(f"Error: {path}: {len(REFUSED)} rows break a rule")
    assert main(["check", config, "--skip-bad-rows", "--json"]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    (split,) = json.loads(out)["splits"]
    # Its template shows no tools, but no good row here has any.
    assert (split["census"]["rows"], split["skipped"]) == (len(REFUSED), len(REFUSED))
