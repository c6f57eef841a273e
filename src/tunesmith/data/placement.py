"""Where a chat template puts each message in the text that it renders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.control_tokens import Border
from tunesmith.data.conversation import Message


@dataclass(frozen=True)
class Answer:
    """Where an assistant turn stands in the rendered text."""

    prompt_end: int | None  # where the prompt for it ends; None where that prompt is no part of this text
    learned: int  # from here on it is trained: the template's own start of the answer included
    start: int
    end: int


@dataclass(frozen=True)
class Lead:
    """What the template writes between the prompt for an answer and the answer's content."""

    text: str
    is_learned: bool


@dataclass(frozen=True)
class Skeleton:
    """A template's fixed text for one pattern of roles.

    Attributes:
        literals: ``literals[i]`` stands before the i-th content, the last one behind all contents.
        message_of: which message's content it is, shape (contents,).
        leads: by message; without those whose prompt is no part of the text.
    """

    literals: tuple[str, ...]
    message_of: tuple[int, ...]
    leads: Mapping[int, Lead]

    def places(self, messages: Sequence[Message], text: str) -> list[tuple[int, Border]] | None:
        """(message, its place) in the order of ``text``; None where the text is not this skeleton's."""
        if not text.startswith(self.literals[0]):
            return None
        spans: list[tuple[int, Border]] = []
        position = len(self.literals[0])
        for number, index in enumerate(self.message_of):
            form = _shown_form(messages[index].content or "", self.literals[number + 1], text, position)
            if form is None:
                return None
            spans.append((index, (position, position + len(form))))
            position += len(form) + len(self.literals[number + 1])
        return spans if position == len(text) else None


def _shown_form(content: str, literal: str, text: str, position: int) -> str | None:
    """What the template made of ``content`` at ``position``, where ``literal`` follows it."""
    if text.startswith(content + literal, position):
        return content
    # What templates are known to make of a content.
    for blanks in (None, "\n"):
        for strip in (str.strip, str.lstrip, str.rstrip):
            form = strip(content, blanks)
            if text.startswith(form + literal, position):
                return form
    return None
