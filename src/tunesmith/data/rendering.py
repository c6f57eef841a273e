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
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from tunesmith.data.control_tokens import Border, ControlTokens
from tunesmith.data.conversation import Conversation, Example, Message, PlainText
from tunesmith.data.encoding import (
    EncodingBatch,
    RenderedChat,
    TokenizedExample,
    encode_chat,
    encode_document,
)
from tunesmith.data.placement import Answer, Lead, Skeleton
from tunesmith.data.templating import ChatTemplate, RenderingError

__all__ = ["Renderer", "RenderingError", "TokenizedExample", "TrainOn"]

_SKELETONS_KEPT = 256  # one for each pattern of roles; rows with tools of their own would fill memory


class TrainOn(StrEnum):
    """What is learned from a row."""

    ASSISTANT_TURNS = "instruction_tuning"
    ALL_TOKENS = "causal_lm"


class Renderer:
    """Renders rows with one tokenizer and chat template.

    Args:
        tokenizer: a Hugging Face tokenizer; its ``chat_template`` is used for conversations.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self._template = ChatTemplate(tokenizer)
        self._skeletons: dict[Any, Skeleton] = {}

    def example(self, example: Example, train_on: TrainOn) -> TokenizedExample:
        """Tokens of a whole row.

        Raises:
            RenderingError: with the rule the row breaks for this template.
        """
        if isinstance(example, PlainText):
            return encode_document(example.text, self._control)
        return encode_chat(
            self._chat(example, self._text(example, generation_prompt=False), train_on), self._control
        )

    def batch(self, rows: Sequence[Example], train_on: TrainOn) -> EncodingBatch:
        """Many rows, whose ``encode`` gives what ``example`` does for each, or the RenderingError it raises."""
        batch = EncodingBatch(self._control)
        for row, text in zip(rows, self._template.render_rows(rows), strict=True):
            if isinstance(row, PlainText) or isinstance(text, RenderingError):
                batch.add(text)
                continue
            try:
                batch.add(self._chat(row, text, train_on))
            except RenderingError as error:
                batch.add(error)
        return batch

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of everything up to where the model has to answer.

        Raises:
            RenderingError: as ``example``.
        """
        text = self._text(conversation, generation_prompt=True)
        try:
            answers = self._answers(conversation, text, generation_prompt=True)
        except RenderingError:  # No obstacle to answering: such a turn is in no training row either.
            answers = []
        spelling = self._spelling_messages(conversation, text, generation_prompt=True)
        ids, _ = self._control.encode_rendered(text, spelling, _prompt_ends(answers))
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
        text = self._text(cut, generation_prompt=False)
        answer = self._answers(cut, text, generation_prompt=False)[-1]
        return self.prompt(Conversation(cut.messages[:-1], cut.tools)), text[answer.start : answer.end]

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token with which the template ends an assistant turn; None where it has none."""
        if not self._template.is_there:
            return None
        turns = Conversation((Message("user", "a"), Message("assistant", "b")))
        skeleton = self._skeleton(turns, generation_prompt=False)
        match = self._control.terminator.match(skeleton.literals[-1])
        return match.group().strip() if match else None

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the chat template shows tools and tool calls to the model."""
        return self._template.supports_tools

    def _text(self, conversation: Conversation, *, generation_prompt: bool) -> str:
        return self._template.render(
            conversation.messages, conversation.tools, generation_prompt=generation_prompt
        )

    # Where each message stands in the text

    def _answers(self, conversation: Conversation, text: str, *, generation_prompt: bool) -> list[Answer]:
        skeleton = self._skeleton_of(conversation, generation_prompt)
        spans = dict(skeleton.places(conversation.messages, text) or ())
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
            answers.append(Answer(prompt_end, learned, start, end))
        return answers

    def _skeleton_of(self, conversation: Conversation, generation_prompt: bool) -> Skeleton:
        messages = [
            (m.role, bool(m.content), m.tool_calls, m.tool_call_id, m.name) for m in conversation.messages
        ]
        key = (tuple(messages), repr(conversation.tools), generation_prompt)
        if key not in self._skeletons:
            if len(self._skeletons) >= _SKELETONS_KEPT:
                self._skeletons.clear()
            self._skeletons[key] = self._skeleton(conversation, generation_prompt=generation_prompt)
        return self._skeletons[key]

    def _skeleton(self, conversation: Conversation, *, generation_prompt: bool) -> Skeleton:
        nonce = secrets.token_hex(8)
        words = [f"q{nonce}x{index}z" for index in range(len(conversation.messages))]
        opaque = [
            replace(m, content=word if m.content else m.content)
            for m, word in zip(conversation.messages, words, strict=True)
        ]
        rendered = self._template.render(opaque, conversation.tools, generation_prompt=generation_prompt)
        pieces = re.split(rf"q{nonce}x(\d+)z", rendered)
        leads = {}
        for index, message in enumerate(opaque):
            if message.role == "assistant" and words[index] in rendered:
                prompt = self._template.render(opaque[:index], conversation.tools, generation_prompt=True)
                place = rendered.index(words[index])
                if rendered.startswith(prompt) and len(prompt) <= place:
                    said = rendered[len(prompt) : place]
                    leads[index] = Lead(said, self._is_said(said, prompt, opaque[:index], conversation.tools))
        return Skeleton(tuple(pieces[0::2]), tuple(map(int, pieces[1::2])), leads)

    def _is_said(self, text: str, prompt: str, before: Sequence[Message], tools: Sequence[Any]) -> bool:
        # What follows the template's own generation prompt, such as an empty <think> block, the model has
        # to say itself when serving. A header in a template without generation prompt is not its answer.
        if self._control.pattern.search(text):
            return False
        return not text.strip() or prompt != self._template.render(before, tools, generation_prompt=False)

    def _answer_by_prefix(self, conversation: Conversation, text: str, index: int) -> Answer:
        upto = conversation.messages[: index + 1]
        before = self._template.render(upto[:-1], conversation.tools, generation_prompt=True)
        through = self._template.render(upto, conversation.tools, generation_prompt=False)
        if not (text.startswith(before) and text.startswith(through) and len(through) > len(before)):
            raise RenderingError(
                f"message {index + 1}: this model's chat template rewrites the turn, so that its trained "
                "tokens cannot be told apart; set generation_config.prompt_format"
            )
        # The control tokens that close the turn are added by _behind_terminator.
        closing = self._control.trailing.search(through, len(before))
        start, end = len(before), closing.start() if closing else len(through)
        return Answer(start, start, start, end)

    def _behind_terminator(self, text: str, end: int) -> int:
        # Where the template does not close its last answer, a control token behind an earlier one is the
        # next turn's start.
        match = self._control.terminator.match(text, end) if self.end_of_turn else None
        return match.end() if match else end

    # What has to be known to encode it

    def _chat(self, conversation: Conversation, text: str, train_on: TrainOn) -> RenderedChat:
        if not text:
            raise RenderingError("the model's chat template renders this row to nothing")
        if train_on is TrainOn.ALL_TOKENS:
            spelling = self._spelling_messages(conversation, text, generation_prompt=False)
            return RenderedChat(text, spelling, (), None)
        answers = self._answers(conversation, text, generation_prompt=False)
        spelling = self._spelling_messages(conversation, text, generation_prompt=False)
        trained = [(answer.learned, self._behind_terminator(text, answer.end)) for answer in answers]
        return RenderedChat(text, spelling, _prompt_ends(answers), trained)

    def _spelling_messages(
        self, conversation: Conversation, text: str, *, generation_prompt: bool
    ) -> list[Border]:
        """Where the messages stand, if any of them spells a control token."""
        if self._control.beside_contents(conversation):
            raise RenderingError("a name, tool or tool call spells a control token; remove that text")
        if not self._control.in_contents(conversation):
            return []
        places = self._skeleton_of(conversation, generation_prompt).places(conversation.messages, text)
        if places is None:
            raise RenderingError(
                "a message spells a control token, and this chat template does not show where the "
                "message ends; remove that text"
            )
        return [place for _, place in places]


def _prompt_ends(answers: Sequence[Answer]) -> list[int]:
    return [answer.prompt_end for answer in answers if answer.prompt_end is not None]
