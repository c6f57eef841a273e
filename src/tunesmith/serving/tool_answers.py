"""Tool calls in answers: which form a model's chat template teaches, the calls in a text, the grammar of a call.

Two families are known. Hermes (also Qwen 2.5, SmolLM2 here): ``<tool_call>`` JSON ``</tool_call>`` after any text.
Llama 3: the whole answer is JSON. What another template teaches stays text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tunesmith.serving.chat import Voice
from tunesmith.serving.faults import bad_request
from tunesmith.serving.structured import JSON_OPTIONS, Form, check_schema

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class CallStyle:
    """How a family writes calls; without ``is_marked`` a call is the whole answer."""

    arguments: str  # the key of a call's arguments
    is_marked: bool


HERMES, LLAMA = CallStyle("arguments", True), CallStyle("parameters", False)


@dataclass(frozen=True)
class Call:
    """A function that an answer calls; ``arguments`` is the JSON text of an object."""

    name: str
    arguments: str


def style_of(voice: Voice) -> CallStyle | None:
    """How this model's chat template writes tool calls; None: in no form that is known here."""
    source = voice.tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source or "tool_calls" not in source or "<function=" in source:
        return None
    if OPEN in source:
        return HERMES if '"arguments": ' in source else None
    return LLAMA if '"parameters": ' in source else None


@dataclass
class CallReader:
    """Takes the calls out of an answer that comes in pieces; text before them passes through at once.

    Blanks right before a call belong to the template's form of it, not to the text.
    """

    style: CallStyle
    most: int | None = None  # calls that may be made at once; None: any number
    _held: str = field(default="", init=False)
    _is_call: bool = field(default=False, init=False)
    _is_text: bool = field(default=False, init=False)

    def add(self, text: str) -> str:
        """What of the answer so far is certainly text, and has not been told."""
        self._held += text
        if self._is_call:
            return ""
        return self._past_marker() if self.style.is_marked else self._whole()

    def end(self) -> tuple[str, tuple[Call, ...]]:
        """The text that is left, and the calls. What looks like a call but is none is text."""
        held, self._held = self._held, ""
        found = None
        if self._is_call:
            found = _marked_calls(held) if self.style.is_marked else _bare_calls(held, self.style)
        if found is None:
            return held, ()
        text, calls = found
        return text, tuple(calls[: self.most])

    def _past_marker(self) -> str:
        place = self._held.find(OPEN)
        self._is_call = place >= 0
        if not self._is_call:
            place = len(self._held) - next(
                (
                    n
                    for n in range(min(len(OPEN) - 1, len(self._held)), 0, -1)
                    if OPEN.startswith(self._held[-n:])
                ),
                0,
            )
        cut = len(self._held[:place].rstrip())
        told, self._held = self._held[:cut], self._held[cut:]
        return told

    def _whole(self) -> str:
        begin = self._held.lstrip()
        if self._is_text or (begin and not begin.startswith("{")):
            self._is_text = True
            told, self._held = self._held, ""
            return told
        self._is_call = bool(begin)
        return ""


def _marked_calls(text: str) -> tuple[str, list[Call]] | None:
    calls, beside, at = [], "", 0
    while (place := text.find(OPEN, at)) >= 0:
        beside += text[at:place] if text[at:place].strip() else ""
        found = _call(text, place + len(OPEN), HERMES)
        if found is None:
            return None
        call, at = found
        calls.append(call)
        at = _past_blanks(text, at)
        if text.startswith(CLOSE, at):
            at += len(CLOSE)
        elif at < len(text):
            return None
    beside += text[at:]
    return (beside if beside.strip() else ""), calls


def _bare_calls(text: str, style: CallStyle) -> tuple[str, list[Call]] | None:
    calls, at = [], 0
    while True:
        found = _call(text, at, style)
        if found is None:
            return None
        call, at = found
        calls.append(call)
        at = _past_blanks(text, at)
        if at == len(text):
            return "", calls
        if text[at] != ";":
            return None
        at += 1


def _call(text: str, at: int, style: CallStyle) -> tuple[Call, int] | None:
    """The call written at ``at``, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, _past_blanks(text, at))
        arguments = value[style.arguments]
        name = value["name"]
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # Python reads 1e999 as infinity
        f"{name}{written}".encode()  # half a surrogate pair cannot be sent
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not (
        isinstance(value, dict) and isinstance(name, str) and name.strip() and isinstance(arguments, dict)
    ):
        return None
    return Call(name, written), end


def _past_blanks(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip()) if at < len(text) else at


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def call_form(
    style: CallStyle, voice: Voice, tools: Sequence[dict[str, Any]], name: str | None, most: int | None
) -> Form:
    """The form of answers that are calls of these tools, written as the template writes them.

    Args:
        style: of the model.
        voice: whose own tokens the markers are, where it has such tokens.
        tools: as in the request, already checked.
        name: the one tool that may be called; None: any.
        most: calls that may be made; None: any number.

    Raises:
        Refusal: 400: no tool has this name, or a tool's parameters are no schema of an object.
    """
    chosen = [
        (n, tool["function"]) for n, tool in enumerate(tools) if name in (None, tool["function"]["name"])
    ]
    if not chosen:
        raise bad_request(f"tool_choice: no tool has the name {(name or '')[:256]}", "tool_choice")
    rules = []
    for n, function in chosen:
        place = f"tools.{n}.function.parameters"
        schema = {"type": "object", **(function.get("parameters") or {})}
        if schema["type"] != "object":
            raise bad_request(f"{place}: must be the schema of an object", "tools")
        check_schema(schema, place)
        head = f'{{"name": {json.dumps(function["name"])}, "{style.arguments}": '
        rules.append(f"call_{n}: {json.dumps(head)} arguments_{n} {json.dumps('}')}")
        rules.append(f"arguments_{n}: %json {json.dumps({'x-guidance': JSON_OPTIONS, **schema})}")
    any_call = " | ".join(f"call_{n}" for n, _ in chosen)
    if not style.is_marked:
        return Form("\n".join([f"start: {any_call}", *rules]), "tools")
    known = voice.tokenizer.get_added_vocab()
    begin, end = (mark if mark in known else json.dumps(mark) for mark in (OPEN, CLOSE))
    more = "" if most == 1 else ' ("\\n" call)*'
    rules += [f"any: {any_call}", f'call: {begin} "\\n" any "\\n" {end}']
    return Form("\n".join([f"start: call{more}", *rules]), "tools")


def hides_markers(voice: Voice) -> bool:
    """Whether decoding leaves the markers out because they are control tokens of this tokenizer."""
    known = voice.tokenizer.get_added_vocab()
    return OPEN in known and bool(voice.tokenizer.added_tokens_decoder[known[OPEN]].special)
