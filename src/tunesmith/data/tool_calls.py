"""Tools and tool calls in the OpenAI form: what is valid in a row."""

import json
from dataclasses import dataclass
from typing import Any

from tunesmith.data.problems import BrokenRule, shorten
from tunesmith.data.strict_json import excerpt, json_type, optional_text, parse_json, require_text

_CALL_KEYS = frozenset({"id", "type", "function"})
_CALLED_KEYS = frozenset({"name", "arguments"})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the assistant calls; ``arguments`` is the JSON text of an object, as in OpenAI."""

    id: str | None
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """The form chat templates expect: arguments as an object."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        call: dict[str, Any] = {"type": "function", "function": function}
        return call if self.id is None else {"id": self.id, **call}


def parse_tool_calls(where: str, value: object) -> tuple[ToolCall, ...]:
    """The calls in a message's decoded ``tool_calls``; null is none. BrokenRule where they are not valid."""
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise BrokenRule(f"{where}: tool_calls must be a list of at least one call", excerpt(value))
    calls = tuple(_tool_call(f"{where}, tool call {n}", item) for n, item in enumerate(value, start=1))
    ids = [call.id for call in calls if call.id is not None]
    if len(set(ids)) != len(ids):
        raise BrokenRule(f"{where}: two tool calls have the same id", excerpt(ids))
    return calls


def parse_tools(value: object) -> tuple[dict[str, Any], ...]:
    """The definitions in a row's decoded ``tools``; null is none. BrokenRule where they are not valid."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BrokenRule(f"tools must be a list of objects, not {json_type(value)}", excerpt(value))
    return tuple(_tool(f"tool {number}", item) for number, item in enumerate(value, start=1))


def _tool(where: str, value: object) -> dict[str, Any]:
    tool = _object(where, value)
    if tool.get("type") != "function":
        raise BrokenRule(f'{where}: type must be "function"', excerpt(tool))
    function = _object(f"{where}: function", tool.get("function"))
    require_text(f"{where}: name", function.get("name"))
    if function.get("parameters") is not None:
        _object(f"{where}: parameters", function["parameters"])
    return tool


def _tool_call(where: str, value: object) -> ToolCall:
    call = _object(where, value)
    _only(where, call, _CALL_KEYS)
    if call.get("type", "function") != "function":
        raise BrokenRule(f'{where}: type must be "function"', excerpt(call["type"]))
    function = _object(f"{where}: function", call.get("function"))
    _only(f"{where}: function", function, _CALLED_KEYS)
    return ToolCall(
        optional_text(f"{where}: id", call.get("id")),
        require_text(f"{where}: name", function.get("name")),
        _arguments(f"{where}: arguments", function.get("arguments")),
    )


def _arguments(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise BrokenRule(
            f"{where} must be the JSON text of an object, not {json_type(value)}", excerpt(value)
        )
    try:
        parsed = parse_json(value)
    except BrokenRule as broken:
        raise BrokenRule(f"{where}: {broken.rule}", broken.text or shorten(value)) from None
    if not isinstance(parsed, dict):
        rule = f"{where} must be the JSON text of an object, not of {json_type(parsed)}"
        raise BrokenRule(rule, shorten(value))
    return value


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BrokenRule(f"{where} must be an object, not {json_type(value)}", excerpt(value))
    return value


def _only(where: str, value: dict[str, Any], known: frozenset[str]) -> None:
    for key in value:
        if key not in known:
            raise BrokenRule(f'{where}: unknown key "{shorten(key)}"', excerpt(value[key]))
