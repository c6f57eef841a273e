"""Good chats spoilt at every depth and files spoilt at every byte, judged by ``row_oracle``.

The property: what the oracle calls good is kept, what it calls bad is named with its line, and nothing else
happens, whatever is written in the file.
"""

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_rows import CALL, TOOL, A, C, S, T, U
from exam.reading import GOOD, lines_of, put, read, refusal
from exam.row_oracle import good_and_bad_lines
from tunesmith.errors import DataError

thorough = settings(max_examples=150, deadline=None, database=None)
PUT_IN = [b"\n", b"\r", b" ", b"'", b'"', b"\\", b",", b"}", b"\0", b"\xff", b"0"]
Place = tuple[str | int, ...]

SECOND = {**CALL, "id": "c2"}
ROWS: list[dict[str, Any]] = [
    {"messages": [U, A]},
    {"messages": [S, U, A, U, A], "id": 7, "scores": [1.5]},
    {"messages": [{**U, "content": [{"type": "text", "text": "u"}]}, {**A, "name": "n"}]},
    {
        "messages": [U, {**C, "tool_calls": [CALL, SECOND]}, {**T, "tool_call_id": "c2"}, T, C, T, A],
        "tools": [TOOL],
    },
]
NAMES = [
    "messages", "text", "tools", "tool", "toosl", "Tools", "functions", "role", "content", "name", "weight",
    "tool_calls", "tool_call_id", "type", "function", "arguments", "parameters", "id", "x", "",
]  # fmt: skip
values = st.sampled_from(
    [
        None, True, False, 0, 1, -1.5, 10**30, "", " ", "\u3000", "x", "user", "assistant", "tool", "function", "c1",
        "{}", "[]", "{", '{"x": NaN}', "\0", "\ud800", "\ufeff", "🙂\u2028", [], {}, [[]], ["x"], [None], {"x": 1},
        {"role": "user", "content": "x"}, {"type": "text", "text": "x"}, {"type": "function"},
    ]
).map(copy.deepcopy)  # fmt: skip


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Where every value inside ``value`` stands."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*here, key)
        yield from places(value[key], (*here, key))


def written(value: Any, twice: Place | None, here: Place = ()) -> str:
    """``value`` as JSON, in which the key at ``twice`` is written twice."""
    if isinstance(value, list):
        return f"[{', '.join(written(item, twice, (*here, i)) for i, item in enumerate(value))}]"
    if not isinstance(value, dict):
        return json.dumps(value)
    pairs = []
    for key, inner in value.items():
        pair = f"{json.dumps(key)}: {written(inner, twice, (*here, key))}"
        pairs += [pair, pair] if (*here, key) == twice else [pair]
    return f"{{{', '.join(pairs)}}}"


def changed(draw: st.DrawFn, row: dict[str, Any]) -> None:
    """Do one thing to one place in ``row``."""
    *to, key = draw(st.sampled_from(list(places(row))))
    inside = row
    for step in to:
        inside = inside[step]
    deed = draw(st.sampled_from(["replace", "replace", "delete", "rename", "repeat", "add"]))
    if deed == "replace":
        inside[key] = draw(values)
    elif deed == "delete":
        del inside[key]
    elif deed == "add" and isinstance(inside, dict):
        inside[draw(st.sampled_from(NAMES))] = draw(values)
    elif isinstance(inside, list):
        inside.insert(draw(st.integers(0, len(inside))), copy.deepcopy(inside[key]))
    else:
        new = draw(st.sampled_from(NAMES))
        pairs = [(new if name == key else name, value) for name, value in inside.items()]
        inside.clear()
        inside.update(pairs)


@st.composite
def spoilt_lines(draw: st.DrawFn) -> bytes:
    """A good row with up to three changes to its values, and perhaps one to its bytes."""
    row = json.loads(json.dumps(draw(st.sampled_from(ROWS))))  # of which no two parts are one object
    for _ in range(draw(st.integers(0, 3))):
        if row:
            changed(draw, row)
    every = list(places(row))
    twice = draw(st.sampled_from(every)) if every and draw(st.integers(0, 9)) == 0 else None
    line = bytearray(written(row, twice).encode())
    deed = draw(st.sampled_from(["none", "none", "cut", "flip", "put in", "take out"]))
    at = draw(st.integers(0, len(line) - 1))
    if deed == "cut":
        del line[at:]
    elif deed == "flip":
        line[at] ^= 1 << draw(st.integers(0, 7))
    elif deed == "put in":
        line[at:at] = draw(st.sampled_from(PUT_IN))
    elif deed == "take out":
        del line[at]
    return bytes(line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generated")


def assert_as_the_oracle_says(path: Path, data: bytes) -> None:
    good, bad = good_and_bad_lines(data)
    if good:
        rows = read(path, skip_bad_rows=True)
        assert (lines_of(rows), rows.skipped) == (good, len(bad))
    if not bad and good:
        assert lines_of(read(path)) == good
        return
    message = refusal(path)
    if not bad:
        assert message == f"{path}: has no rows; write one JSON object a line"
        return
    count = "1 row breaks a rule; mend it" if len(bad) == 1 else f"{len(bad)} rows break a rule; mend them"
    first, *listed = message.split("\n")
    assert first == f"{path}: {count} or pass --skip-bad-rows"
    assert [line.split(": ")[0] for line in listed[:20]] == [f"  {path}:{number}" for number in bad[:20]]
    assert all(line.split(": ")[1] for line in listed[:20])
    assert good or refusal(path, skip_bad_rows=True) == message


@thorough
@given(lines=st.lists(spoilt_lines(), min_size=1, max_size=5), packed=st.booleans(), ends=st.booleans())
def test_spoilt_rows(folder, lines, packed, ends):
    data = b"\n".join([GOOD, *lines]) + b"\n" * ends
    assert_as_the_oracle_says(put(folder / "rows.jsonl", data, packed=packed), data)


def test_unspoilt_rows_are_good(folder):
    """The generator starts from rows that are."""
    data = "\n".join(map(json.dumps, ROWS)).encode()
    assert good_and_bad_lines(data) == ([1, 2, 3, 4], [])
    assert_as_the_oracle_says(put(folder / "rows.jsonl", data), data)


@thorough
@given(data=st.data())
def test_a_file_cut_at_any_byte(folder, data):
    whole = b"\n".join(json.dumps(row).encode() for row in ROWS[:3])
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    assert_as_the_oracle_says(put(folder / "rows.jsonl", cut), cut)


@thorough
@given(
    data=st.lists(
        st.binary(max_size=20) | st.sampled_from([GOOD, b"\n", b"\r\n", b"{", b"\xff", b"\0"]), max_size=12
    ).map(b"".join)
)
def test_a_file_of_anything(folder, data):
    """Behind a good row, so that it is no other format."""
    data = GOOD + b"\n" + data
    assert_as_the_oracle_says(put(folder / "rows.jsonl", data), data)


@thorough
@given(data=st.binary(max_size=60) | st.sampled_from([b"\x1f\x8b", b"PK\x03\x04", b"\xff\xfe"]))
def test_a_file_of_anything_from_its_first_byte(folder, data):
    path = put(folder / "rows.jsonl", data)
    for skip_bad_rows in (False, True):
        assert refusal(path, skip_bad_rows=skip_bad_rows).startswith(f"{path}")


@thorough
@given(data=st.data())
def test_gzip_cut_or_changed_at_any_byte(folder, data):
    whole = gzip.compress((GOOD + b"\n") * 5, mtime=0)
    at = data.draw(st.integers(0, len(whole) - 1))
    path = put(folder / "rows.jsonl.gz", whole[:at])
    assert refusal(path, skip_bad_rows=True).startswith(f"{path}: ")
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    put(path, bytes(flipped))
    found: object
    try:
        found = lines_of(read(path, skip_bad_rows=True))
    except DataError as error:
        found = str(error).startswith(f"{path}: ")
    assert found in ([1, 2, 3, 4, 5], True)  # good where, for one, the time of packing stands
