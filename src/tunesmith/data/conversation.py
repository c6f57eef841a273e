"""Conversation and Message: what a valid example is, and every rule a row can break.

A row is ``{"messages": [...], "tools": [...]}`` in the OpenAI chat form, or ``{"text": "..."}``. Texts are
kept exactly as written; nothing is stripped or normalised.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tunesmith.data.problems import BrokenRule, Problem, ProblemList, closest, shorten
from tunesmith.data.sources import RawRecord, read_records
from tunesmith.data.strict_json import excerpt, json_type, optional_text, parse_json, require_text
from tunesmith.data.tool_calls import ToolCall, parse_tool_calls, parse_tools

__all__ = [
    "Conversation",
    "Example",
    "Message",
    "PlainText",
    "Problem",
    "ProblemList",
    "ToolCall",
    "conversation_from_row",
    "detect_task",
    "iter_examples",
    "parse_example",
    "training_problem",
]

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 2_000  # placing the answers in a rendered chat takes time with the square of it: here, seconds
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_NEAR_MISS = 0.8  # "tool", "toosl" and "Tools" for "tools", but not "token_ids"

# Calls that wait for their answer, in order, and how many have this id: only calls without one repeat.
_OpenCalls = dict[str | None, int]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; ``content`` is None only for an assistant turn that is nothing but tool calls."""

    role: str
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form chat templates expect; no content becomes "", because templates break on null."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat whose turns keep the order that chat templates rely on; ``tools`` as in OpenAI."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        """The messages as ``apply_chat_template`` takes them."""
        return [message.to_dict() for message in self.messages]


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text that is trained on as it stands, without a chat template."""

    text: str


Example = Conversation | PlainText


def parse_example(record: RawRecord) -> Example | Problem:
    """The example in one line, or the first rule it breaks. Never raises, whatever the text."""
    try:
        return _example(parse_json(record.text), record.text)
    except BrokenRule as broken:
        return Problem(record.file, record.line, broken.rule, broken.text)


def conversation_from_row(row: dict[str, Any]) -> Conversation:
    """The conversation in a decoded row's ``messages`` and ``tools``; BrokenRule where it is not one."""
    messages = row["messages"]
    if not isinstance(messages, list):
        raise BrokenRule(f"messages must be a list of objects, not {json_type(messages)}", excerpt(messages))
    if not messages:
        raise BrokenRule("messages is empty")
    if len(messages) > MAX_MESSAGES:
        raise BrokenRule(f"messages are {len(messages):,}; a chat has at most {MAX_MESSAGES:,}")
    parsed = tuple(_message(f"message {number}", item) for number, item in enumerate(messages, start=1))
    _check_turns(parsed)
    return Conversation(parsed, parse_tools(row.get("tools")))


def training_problem(example: Example, task: str) -> str | None:
    """The rule that keeps a valid example from being trained on for ``task``, or None.

    Args:
        task: "instruction_tuning" or "causal_lm"; "auto" is resolved by ``detect_task`` first.
    """
    if task == "causal_lm":
        return None
    if task != "instruction_tuning":
        raise ValueError(f"no rules for task {task!r}")
    if isinstance(example, PlainText):
        return "a plain text row has no assistant turn to train on; use task causal_lm"
    if not _has_assistant(example):
        return "no assistant message to train on"
    last = example.messages[-1].role
    return None if last == "assistant" else f"the last message must be from the assistant, not {last}"


def iter_examples(
    path: str, task: str | None = None, sha256: str | None = None
) -> Iterator[tuple[RawRecord, Example | Problem]]:
    """Stream the rows of ``path`` with what each of them is.

    Args:
        path: see ``read_records``.
        task: where given, rows that ``training_problem`` objects to are problems too.
        sha256: as in ``read_records``.

    Yields:
        For a line that could not even be decoded the record's text is the problem's excerpt.

    Raises:
        DataError: as ``read_records``.
    """
    for row in read_records(path, sha256):
        if isinstance(row, Problem):
            yield RawRecord(row.text, row.file, row.line), row
            continue
        example = parse_example(row)
        if task is not None and not isinstance(example, Problem):
            rule = training_problem(example, task)
            if rule is not None:
                example = Problem(row.file, row.line, rule, shorten(row.text))
        yield row, example


def detect_task(path: str) -> str:
    """What ``task: auto`` means for ``path``, by its first valid row.

    Returns:
        "instruction_tuning" if that row has an assistant turn, else "causal_lm".

    Raises:
        DataError: as ``read_records``, and where no row is valid.
    """
    problems = ProblemList()
    for _, example in iter_examples(path):
        if not isinstance(example, Problem):
            return "instruction_tuning" if _has_assistant(example) else "causal_lm"
        problems.add(example)
    problems.raise_if_any(path)
    raise AssertionError("read_records yields at least one row or raises")


def _has_assistant(example: Example) -> bool:
    return isinstance(example, Conversation) and any(m.role == "assistant" for m in example.messages)


def _example(row: object, text: str) -> Example:
    if not isinstance(row, dict):
        raise BrokenRule(
            f"a row must be an object with messages or text, not {json_type(row)}", shorten(text)
        )
    if "messages" in row and "text" in row:
        raise BrokenRule("a row has messages or text, not both", shorten(text))
    if "messages" in row:
        _refuse_lookalikes(row, ("tools",))
        return conversation_from_row(row)
    if "text" in row:
        if "tools" in row:
            raise BrokenRule("tools belong to a row with messages, not text", shorten(text))
        _refuse_lookalikes(row, ("messages", "tools"))
        return PlainText(require_text("text", row["text"]))
    if "chosen" in row or "rejected" in row:
        raise BrokenRule("a preference row; a row here has messages or text", shorten(text))
    for key in row:
        nearest = closest(key, ("messages", "text"))
        if nearest:
            raise BrokenRule(f'no key messages or text; "{shorten(key)}" looks like {nearest}', shorten(text))
    raise BrokenRule("no key messages or text", shorten(text))


def _refuse_lookalikes(row: dict[str, Any], names: tuple[str, ...]) -> None:
    """A list under a misspelt name must not be lost in silence; other keys (ids, scores) are not read."""
    read = ("messages", "text", *names)
    for key in (key for key, value in row.items() if isinstance(value, list) and key not in read):
        if key == "functions":
            raise BrokenRule("functions is OpenAI's old form; write tools", excerpt(row[key]))
        nearest = closest(key, names, _NEAR_MISS)
        if nearest and nearest not in row:
            raise BrokenRule(f'unknown key "{shorten(key)}"; closest is {nearest}', excerpt(row[key]))


def _message(where: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise BrokenRule(f"{where} must be an object, not {json_type(value)}", excerpt(value))
    for key in value:
        if key == "weight":
            raise BrokenRule(f"{where}: weight is not supported; every assistant turn is trained")
        if key not in _MESSAGE_KEYS:
            nearest = closest(key, _MESSAGE_KEYS)
            hint = f"closest is {nearest}" if nearest else f"known are {', '.join(_MESSAGE_KEYS)}"
            raise BrokenRule(f'{where}: unknown key "{shorten(key)}"; {hint}', excerpt(value[key]))
    if "role" not in value:
        raise BrokenRule(f"{where} has no role", excerpt(value))
    role = value["role"]
    if role not in ROLES:
        raise BrokenRule(f"{where}: unknown role; allowed are {', '.join(ROLES)}", excerpt(role))
    if role != "assistant" and value.get("tool_calls") is not None:
        raise BrokenRule(f"{where}: tool_calls belong to the assistant, not {role}")
    if role != "tool" and value.get("tool_call_id") is not None:
        raise BrokenRule(f"{where}: tool_call_id belongs to a tool message, not {role}")
    calls = parse_tool_calls(where, value.get("tool_calls"))
    return Message(
        role,
        _content(where, value, calls),
        calls,
        optional_text(f"{where}: tool_call_id", value.get("tool_call_id")),
        optional_text(f"{where}: name", value.get("name")),
    )


def _content(where: str, message: dict[str, Any], calls: tuple[ToolCall, ...]) -> str | None:
    content = message.get("content")
    if calls and (content is None or content == ""):  # exporters write either for "only tool calls"
        return None
    if "content" not in message:
        raise BrokenRule(f"{where} has no content", excerpt(message))
    if isinstance(content, list):
        content = "".join(_part(f"{where}, part {n}", part) for n, part in enumerate(content, start=1))
    return require_text(f"{where}: content", content)


def _part(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind != "text":
        raise BrokenRule(f"{where}: only parts of type text can be trained on", excerpt(part))
    if set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise BrokenRule(f"{where} must be type and text only, both text", excerpt(part))
    return part["text"]


def _check_turns(messages: tuple[Message, ...]) -> None:
    """The order of turns: system?, then user and assistant in turn, tool answers after tool calls."""
    previous = ""
    open_calls: _OpenCalls = {}
    for number, message in enumerate(messages, start=1):
        if message.role == "tool":
            _answer(f"message {number}", message, open_calls, previous)
        elif fault := _turn_fault(message.role, number, messages[0].role, previous, open_calls):
            raise BrokenRule(f"message {number}: {fault}", shorten(message.content or ""))
        if message.role == "assistant":
            open_calls = dict(Counter(call.id for call in message.tool_calls))
        previous = message.role
    if previous == "system":
        raise BrokenRule("nothing follows the system message", shorten(messages[0].content or ""))


def _turn_fault(role: str, number: int, first: str, previous: str, open_calls: _OpenCalls) -> str | None:
    """Why a turn that is no tool answer cannot stand where it does, or None."""
    if role == "system":
        fault = "a second system message" if first == "system" else "system message not first"
        return f"{fault}; at most one is allowed, and only first" if number > 1 else None
    if open_calls:
        return f"{role} follows before {_names(open_calls)} got a tool answer"
    if previous in ("", "system") and role != "user":
        return f"the first turn must be user, not {role}"
    if previous == role:
        return f"two {role} messages in a row"
    if previous == "tool" and role == "user":
        return "user follows tool; the assistant must speak after a tool answer"
    return None


def _answer(where: str, message: Message, open_calls: _OpenCalls, previous: str) -> None:
    """Take the call that a tool message answers off ``open_calls``."""
    text = shorten(message.content or "")
    if not open_calls:
        after = "every call before it is answered" if previous == "tool" else "no tool call stands before it"
        raise BrokenRule(f"{where}: tool message, but {after}", text)
    if message.tool_call_id not in open_calls:
        given = message.tool_call_id
        fault = "has no tool_call_id" if given is None else f"answers unknown tool call {shorten(given)}"
        raise BrokenRule(f"{where}: tool message {fault}; open is {_names(open_calls)}", text)
    open_calls[message.tool_call_id] -= 1
    if not open_calls[message.tool_call_id]:
        del open_calls[message.tool_call_id]


def _names(calls: _OpenCalls) -> str:
    return ", ".join("a call without id" if call is None else shorten(call) for call in islice(calls, 3))
