"""Conversation -> text, by a tokenizer's chat template."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tunesmith.data.conversation import Conversation, Example, Message, PlainText
from tunesmith.data.problems import shorten

_MOST_OF_REASON = 150  # a template may put the whole message into it


class RenderingError(ValueError):
    """A row that the chat template cannot render, or whose trained tokens cannot be placed."""


class ChatTemplate:
    """The chat template of one tokenizer; ``is_there`` is False where the model has none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def is_there(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @cached_property
    def supports_tools(self) -> bool:
        """Whether it shows tools and tool calls to the model."""
        return "tools" in self._source and "tool_calls" in self._source

    def render(self, messages: Sequence[Message], tools: Sequence[Any], *, generation_prompt: bool) -> str:
        """The text of one conversation; RenderingError where the template is absent or refuses it."""
        source = self._source
        if _uses_tools(messages, tools) and not self.supports_tools:
            raise RenderingError(
                "the row has tools, but this model's chat template does not show tools to the model; "
                "leave them out, or take a model with tool support"
            )
        try:
            return str(
                self._apply(source, [m.to_dict() for m in messages], list(tools) or None, generation_prompt)
            )
        except Exception as error:  # Jinja runs a foreign template: whatever it raises is about this row.
            reason = shorten(str(error).strip().partition("\n")[0], most=_MOST_OF_REASON)
            reason = reason or type(error).__name__
            raise RenderingError(f"the model's chat template refuses this row: {reason}") from error

    def render_rows(self, rows: Sequence[Example]) -> list[str | RenderingError]:
        """Each whole row's text, or why there is none; a plain text as it is. Faster than one by one."""
        usual = [
            i
            for i, row in enumerate(rows)
            if isinstance(row, Conversation) and row.messages and not _uses_tools(row.messages, row.tools)
        ]
        found: dict[int, str] = {}
        try:
            if usual:
                found = dict(zip(usual, self._apply_to_all([rows[i] for i in usual]), strict=True))
        except Exception:  # it refuses one of them; which one, and why, turns out one by one
            found = {}
        return [found[i] if i in found else self._row(row) for i, row in enumerate(rows)]

    def _row(self, row: Example) -> str | RenderingError:
        if isinstance(row, PlainText):
            return row.text
        try:
            return self.render(row.messages, row.tools, generation_prompt=False)
        except RenderingError as error:
            return error

    def _apply_to_all(self, rows: Sequence[Any]) -> list[str]:
        return list(self._apply(self._source, [row.to_dicts() for row in rows], None, False))

    def _apply(self, source: str, chat: list[Any], tools: list[Any] | None, generation_prompt: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            chat,
            tools=tools,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )

    @cached_property
    def _source(self) -> str:
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise RenderingError(
                "this model has no chat template; set generation_config.prompt_format, or use plain text rows"
            )
        return str(template)


def _uses_tools(messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    return bool(tools) or any(m.tool_calls or m.role == "tool" for m in messages)
