"""Conversation -> token ids and a mask of trained tokens, through the model's chat template.

One object renders for training (a whole conversation) and for generation (a prompt), so what is trained is
what is served. Which tokens are trained is decided on the rendered *text*: the places where the template
put each message are found, and a token is trained when it overlaps an assistant message, what the template
itself says at the start of it, or the end-of-turn token behind it. What stands before an answer is encoded
apart from it, as when serving.

How the places are found: the template is rendered a second time with an opaque word for each content. That
yields its fixed text between the contents, against which the real text is laid. A template that rewrites a
content so that this fails, or a turn that is a tool call, is placed by rendering the conversation up to and
including that turn.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.control_tokens import Border, ControlTokens, Encoded
from tunesmith.data.conversation import Conversation, Example, Message, PlainText

_SKELETONS_KEPT = 256  # one for each pattern of roles; rows with tools of their own would fill memory


class TrainOn(StrEnum):
    """What is learned from a row."""

    ASSISTANT_TURNS = "instruction_tuning"
    ALL_TOKENS = "causal_lm"


class RenderingError(ValueError):
    """A row that the chat template cannot render, or whose trained tokens cannot be placed."""


@dataclass(frozen=True)
class TokenizedExample:
    """One row as tokens.

    Attributes:
        ids: token ids, int32, shape (length,).
        trained: bool, shape (length,); True where the token is a target. Never True at index 0, for which
            nothing could predict it.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class _Answer:
    """Where an assistant turn stands in the rendered text."""

    prompt_end: int | None  # where the prompt for it ends; None where that prompt is no part of this text
    learned: int  # from here on it is trained: the template's own start of the answer included
    start: int
    end: int


@dataclass(frozen=True)
class _Lead:
    """What the template writes between the prompt for an answer and the answer's content."""

    text: str
    is_learned: bool


@dataclass(frozen=True)
class _Skeleton:
    # literals[i] stands before the i-th content, the last one behind all contents.
    literals: tuple[str, ...]
    message_of: tuple[int, ...]
    leads: Mapping[int, _Lead]  # by message; without those whose prompt is no part of the text


class Renderer:
    """Renders rows with one tokenizer and chat template.

    Args:
        tokenizer: a Hugging Face tokenizer; its ``chat_template`` is used for conversations.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self._skeletons: dict[str, _Skeleton] = {}

    def example(self, example: Example, train_on: TrainOn) -> TokenizedExample:
        """Tokens of a whole row.

        Raises:
            RenderingError: with the rule the row breaks for this template.
        """
        if isinstance(example, PlainText):
            ids = self._control.encode_text(example.text)
            return TokenizedExample(ids, _all_but_first(len(ids)))
        text = self._text(example, add_generation_prompt=False)
        if train_on is TrainOn.ALL_TOKENS:
            ids, _ = self._encode(example, text, (), generation_prompt=False)
            return TokenizedExample(ids, _all_but_first(len(ids)))
        answers = self._answers(example, text, generation_prompt=False)
        ids, offsets = self._encode(example, text, answers, generation_prompt=False)
        trained = np.zeros(len(ids), dtype=np.bool_)
        for answer in answers:
            end = self._behind_terminator(text, answer.end)
            trained |= (offsets[:, 1] > answer.learned) & (offsets[:, 0] < end)
        trained &= offsets[:, 1] > offsets[:, 0]
        trained[:1] = False
        return TokenizedExample(ids, trained)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of everything up to where the model has to answer.

        Raises:
            RenderingError: as ``example``.
        """
        text = self._text(conversation, add_generation_prompt=True)
        try:
            answers = self._answers(conversation, text, generation_prompt=True)
        except RenderingError:  # No obstacle to answering: such a turn is in no training row either.
            answers = []
        ids, _ = self._encode(conversation, text, answers, generation_prompt=True)
        return [int(i) for i in ids]

    @cached_property
    def identity(self) -> str:
        """Digest of all that decides what a row is rendered to."""
        return hashlib.sha256(f"{self._control.identity}{self.tokenizer.chat_template}".encode()).hexdigest()

    def question(self, conversation: Conversation) -> tuple[list[int], str]:
        """The prompt before the last assistant turn, and that turn's text without its end-of-turn token.

        Raises:
            RenderingError: there is no assistant turn, or it cannot be rendered.
        """
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if not turns:
            raise RenderingError("the row has no assistant turn to compare an answer with")
        last = turns[-1]
        cut = Conversation(conversation.messages[: last + 1], conversation.tools)
        text = self._text(cut, add_generation_prompt=False)
        answer = self._answers(cut, text, generation_prompt=False)[-1]
        return self.prompt(Conversation(cut.messages[:-1], cut.tools)), text[answer.start : answer.end]

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token with which the template ends an assistant turn; None where it has none."""
        if not self.tokenizer.chat_template:
            return None
        turns = Conversation((Message("user", "a"), Message("assistant", "b")))
        skeleton = self._skeleton(turns, generation_prompt=False)
        match = self._control.terminator.match(skeleton.literals[-1])
        return match.group().strip() if match else None

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the chat template shows tools and tool calls to the model."""
        return "tools" in self._template and "tool_calls" in self._template

    @cached_property
    def _template(self) -> str:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise RenderingError(
                "this model has no chat template; set generation_config.prompt_format, or use plain text rows"
            )
        return str(template)

    def _text(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        return self._render(conversation.messages, conversation.tools, add_generation_prompt)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any], generation_prompt: bool) -> str:
        template = self._template
        uses_tools = tools or any(m.tool_calls or m.role == "tool" for m in messages)
        if uses_tools and not self.supports_tools:
            raise RenderingError(
                "the row has tools, but this model's chat template does not show tools to the model; "
                "leave them out, or take a model with tool support"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [m.to_dict() for m in messages],
                    tools=list(tools) or None,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except Exception as error:  # Jinja runs a foreign template: whatever it raises is about this row.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RenderingError(f"the model's chat template refuses this row: {reason}") from error

    # Where each message stands in the text

    def _answers(self, conversation: Conversation, text: str, *, generation_prompt: bool) -> list[_Answer]:
        skeleton = self._skeleton_of(conversation, generation_prompt)
        spans = dict(_lay_against(skeleton, conversation.messages, text) or ())
        answers = []
        for index, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            if message.tool_calls or index not in spans:
                answers.append(self._answer_by_prefix(conversation, text, index))
                continue
            start, end = spans[index]
            lead = skeleton.leads.get(index)
            prompt_end = start - len(lead.text) if lead else None
            learned = prompt_end if lead and lead.is_learned and prompt_end is not None else start
            answers.append(_Answer(prompt_end, learned, start, end))
        return answers

    def _skeleton_of(self, conversation: Conversation, generation_prompt: bool) -> _Skeleton:
        messages = tuple(replace(m, content="x" if m.content else None) for m in conversation.messages)
        key = repr((messages, conversation.tools, generation_prompt))
        if key not in self._skeletons:
            if len(self._skeletons) >= _SKELETONS_KEPT:
                self._skeletons.clear()
            self._skeletons[key] = self._skeleton(conversation, generation_prompt=generation_prompt)
        return self._skeletons[key]

    def _skeleton(self, conversation: Conversation, *, generation_prompt: bool) -> _Skeleton:
        nonce = secrets.token_hex(8)
        words = [f"q{nonce}x{index}z" for index in range(len(conversation.messages))]
        opaque = [
            replace(m, content=word if m.content else m.content)
            for m, word in zip(conversation.messages, words, strict=True)
        ]
        rendered = self._render(opaque, conversation.tools, generation_prompt)
        pieces = re.split(rf"q{nonce}x(\d+)z", rendered)
        leads = {}
        for index, message in enumerate(opaque):
            if message.role == "assistant" and words[index] in rendered:
                prompt = self._render(opaque[:index], conversation.tools, True)
                place = rendered.index(words[index])
                if rendered.startswith(prompt) and len(prompt) <= place:
                    is_opened = prompt != self._render(opaque[:index], conversation.tools, False)
                    leads[index] = self._lead(rendered[len(prompt) : place], is_opened)
        return _Skeleton(tuple(pieces[0::2]), tuple(map(int, pieces[1::2])), leads)

    def _lead(self, text: str, is_opened: bool) -> _Lead:
        # What follows the template's own generation prompt, such as an empty <think> block, the model has
        # to say itself when serving. A header in a template without generation prompt is not its answer.
        is_header = bool(self._control.pattern.search(text)) or (bool(text.strip()) and not is_opened)
        return _Lead(text, not is_header)

    def _answer_by_prefix(self, conversation: Conversation, text: str, index: int) -> _Answer:
        upto = conversation.messages[: index + 1]
        before = self._render(upto[:-1], conversation.tools, True)
        through = self._render(upto, conversation.tools, False)
        if not (text.startswith(before) and text.startswith(through) and len(through) > len(before)):
            raise RenderingError(
                f"message {index + 1}: this model's chat template rewrites the turn, so that its trained "
                "tokens cannot be told apart; set generation_config.prompt_format"
            )
        # The control tokens that close the turn are added by _behind_terminator.
        closing = self._control.trailing.search(through, len(before))
        start, end = len(before), closing.start() if closing else len(through)
        return _Answer(start, start, start, end)

    def _behind_terminator(self, text: str, end: int) -> int:
        # Where the template does not close its last answer, a control token behind an earlier one is the
        # next turn's start.
        match = self._control.terminator.match(text, end) if self.end_of_turn else None
        return match.end() if match else end

    # Text -> ids

    def _encode(
        self, conversation: Conversation, text: str, answers: Sequence[_Answer], *, generation_prompt: bool
    ) -> Encoded:
        if self._control.beside_contents(conversation):
            raise RenderingError("a name, tool or tool call spells a control token; remove that text")
        messages: list[Border] = []
        if self._control.in_contents(conversation):
            skeleton = self._skeleton_of(conversation, generation_prompt)
            laid = _lay_against(skeleton, conversation.messages, text)
            if laid is None:
                raise RenderingError(
                    "a message spells a control token, and this chat template does not show where the "
                    "message ends; remove that text"
                )
            messages = [span for _, span in laid]
        prompt_ends = [answer.prompt_end for answer in answers if answer.prompt_end is not None]
        return self._control.encode_rendered(text, messages, prompt_ends)


def _lay_against(
    skeleton: _Skeleton, messages: Sequence[Message], text: str
) -> list[tuple[int, Border]] | None:
    """(message, its place) in the order of the text; None where the text is not this skeleton's."""
    if not text.startswith(skeleton.literals[0]):
        return None
    spans: list[tuple[int, Border]] = []
    position = len(skeleton.literals[0])
    for number, index in enumerate(skeleton.message_of):
        literal = skeleton.literals[number + 1]
        for form in _shown_forms(messages[index].content or ""):
            if text.startswith(form + literal, position):
                spans.append((index, (position, position + len(form))))
                position += len(form) + len(literal)
                break
        else:
            return None
    return spans if position == len(text) else None


def _shown_forms(content: str) -> tuple[str, ...]:
    # What templates are known to make of a content.
    stripped = [
        strip(content, blanks) for blanks in (None, "\n") for strip in (str.strip, str.lstrip, str.rstrip)
    ]
    return (content, *stripped)


def _all_but_first(length: int) -> NDArray[np.bool_]:
    trained = np.ones(length, dtype=np.bool_)
    trained[:1] = False
    return trained
