"""Rows of chat data for tests: one message of each role, and lines built from them."""

import json
from typing import Any

S = {"role": "system", "content": "s"}
U = {"role": "user", "content": "u"}
A = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
C = {"role": "assistant", "content": None, "tool_calls": [CALL]}
T = {"role": "tool", "tool_call_id": "c1", "content": "42"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": list(messages), **more})


def call(**changed: Any) -> str:
    """A row whose tool call has keys changed; a value of ... removes the key."""
    new = {key: value for key, value in {**CALL, **changed}.items() if value is not ...}
    return chat(U, {**C, "tool_calls": [new]})


def called(arguments: Any) -> str:
    return call(function={"name": "f", "arguments": arguments})


def tool(**changed: Any) -> str:
    return chat(U, A, tools=[TOOL, {**TOOL, **changed}])


def without(message: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k != key}
