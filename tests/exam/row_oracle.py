"""Which lines of a file are good chats for training, said a second time and in another way than the program does.

Turns are judged by a regular expression, texts by the text of their JSON. It is meant to be read beside
``docs/data.md``, and shares no code with what it judges.
"""

import json
import math
import re
from collections import Counter
from typing import Any

# system, user, assistant with text, assistant that calls tools, tool
_TURNS = re.compile("s?(u(ct+)*a)*u(ct+)*[ac]")
_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id"}


def good_and_bad_lines(data: bytes) -> tuple[list[int], list[int]]:
    """Numbers, from 1, of the lines that hold a good row, and of those that hold a bad one."""
    verdicts = {number: _verdict(line, number == 1) for number, line in enumerate(data.split(b"\n"), 1)}
    return [n for n, good in verdicts.items() if good], [n for n, good in verdicts.items() if good is False]


def _verdict(line: bytes, is_first: bool) -> bool | None:
    """None where the line is blank."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    if is_first and text.startswith("\ufeff"):
        text = text[1:]
    if not text.strip():
        return None
    try:
        row = _loads(text)
    except (ValueError, RecursionError):
        return False
    return _is_chat(row)


def _loads(text: str) -> Any:
    value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_number)
    if _depth(value) > 100 or any(re.search("[\0\ud800-\udfff]", part) for part in _texts(value)):
        raise ValueError
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if any(count > 1 for count in Counter(key for key, _ in pairs).values()):
        raise ValueError
    return dict(pairs)


def _refuse(_name: str) -> None:
    raise ValueError


def _number(digits: str) -> float:
    if math.isinf(float(digits)):
        raise ValueError
    return float(digits)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def _is_chat(row: Any) -> bool:
    if not isinstance(row, dict) or "text" in row or not isinstance(row.get("messages"), list):
        return False
    messages = row["messages"]
    if not all(map(_is_message, messages)) or not _are_tools(row.get("tools")):
        return False
    lists = [key for key, value in row.items() if isinstance(value, list)]
    if "functions" in lists or ("tools" not in row and any(map(_is_nearly_tools, lists))):
        return False
    return _are_turns(messages)


def _are_turns(messages: list[Any]) -> bool:
    letters = "".join("c" if message.get("tool_calls") else message["role"][0] for message in messages)
    if not _TURNS.fullmatch(letters):
        return False
    for called in re.finditer("ct+", letters):
        caller, *tools = messages[called.start() : called.end()]
        asked = Counter(call.get("id") for call in caller["tool_calls"])
        if asked != Counter(message.get("tool_call_id") for message in tools):
            return False
    return True


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= _MESSAGE:
        return False
    role, calls = value.get("role"), value.get("tool_calls")
    if role not in ("system", "user", "assistant", "tool"):
        return False
    if calls is not None and role != "assistant":
        return False
    if value.get("tool_call_id") is not None and role != "tool":
        return False
    if not _are_calls(calls) or not _is_text(value.get("name"), value.get("tool_call_id")):
        return False
    content = value.get("content")
    if calls and content in (None, ""):
        return True
    if isinstance(content, list):
        if not all(map(_is_part, content)):
            return False
        content = "".join(part["text"] for part in content)
    return content is not None and _is_text(content)


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and set(part) == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _are_calls(calls: Any) -> bool:
    if calls is None:
        return True
    if not isinstance(calls, list) or not calls or not all(map(_is_call, calls)):
        return False
    return max(Counter(c["id"] for c in calls if c.get("id") is not None).values(), default=1) == 1


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not set(call) <= {"id", "type", "function"}:
        return False
    function = call.get("function")
    if not isinstance(function, dict) or not set(function) <= {"name", "arguments"}:
        return False
    if call.get("type", "function") != "function" or not _is_text(call.get("id")):
        return False
    if function.get("name") is None or not _is_text(function["name"]):
        return False
    try:
        return isinstance(_loads(function["arguments"]), dict)
    except (KeyError, TypeError, ValueError, RecursionError):
        return False


def _are_tools(tools: Any) -> bool:
    return tools is None or (isinstance(tools, list) and all(map(_is_tool, tools)))


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function" or function.get("name") is None:
        return False
    return _is_text(function["name"]) and isinstance(function.get("parameters"), dict | None)


def _is_text(*values: Any) -> bool:
    """Null, or a text that is more than white space."""
    return all(value is None or (isinstance(value, str) and value.strip() != "") for value in values)


def _is_nearly_tools(key: str) -> bool:
    """One letter more, less or other than "tools", or two neighbours exchanged, in any case."""
    name, key = "tools", key.lower()
    letters = "abcdefghijklmnopqrstuvwxyz_" + key
    places = range(len(name) + 1)
    less = {name[:i] + name[i + 1 :] for i in places}
    more = {name[:i] + letter + name[i:] for i in places for letter in letters}
    other = {name[:i] + letter + name[i + 1 :] for i in places for letter in letters}
    exchanged = {name[:i] + name[i + 1 : i + 2] + name[i : i + 1] + name[i + 2 :] for i in places}
    return key in less | more | other | exchanged
