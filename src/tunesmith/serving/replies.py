"""Pieces of answers -> replies in the forms of the two completion routes, whole or as events."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.serving import protocol as wire
from tunesmith.serving.answering import Piece
from tunesmith.serving.chat import Voice
from tunesmith.serving.seam import Token
from tunesmith.serving.tool_answers import Call

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Heading:
    """What every reply to one request says."""

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str | None  # of the adapter's content

    def fields(self) -> dict[str, str | int | None]:
        """As the reply models take them."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


Reply = wire.ChatCompletion | wire.Completion


class Writer(Protocol):
    """One of the two forms of replies."""

    def opening(self, answers: int) -> Iterator[Reply]:
        """Events before the first token."""
        ...

    def event(self, piece: Piece) -> Reply:
        """The event that tells a piece."""
        ...

    def usage(self, usage: wire.Usage) -> Reply:
        """The event that counts tokens; it has no choices."""
        ...

    def whole(self, answers: Sequence[Piece], usage: wire.Usage) -> Reply:
        """Everything at once; each answer is one piece, in the order of their numbers."""
        ...


def joined(pieces: Sequence[Piece], answers: int) -> list[Piece]:
    """The pieces of each of ``answers`` answers as one, in the order of their numbers."""
    by_number: list[list[Piece]] = [[] for _ in range(answers)]
    for piece in pieces:
        by_number[piece.number].append(piece)
    found = []
    for number, own in enumerate(by_number):
        tokens = tuple(token for piece in own for token in piece.tokens)
        starts = tuple(start for piece in own for start in piece.starts)
        calls = tuple(call for piece in own for call in piece.calls)
        text = "".join(piece.text for piece in own)
        found.append(Piece(number, text, tokens, starts, own[-1].finish, calls))
    return found


class ChatWriter:
    """Replies of ``/v1/chat/completions``.

    Args:
        heading: of each reply.
        voice: of the model, for the text of single tokens.
        has_logprobs: whether they were asked for.
    """

    def __init__(self, heading: Heading, voice: Voice, has_logprobs: bool) -> None:
        self._heading, self._voice, self._has_logprobs = heading, voice, has_logprobs

    def opening(self, answers: int) -> Iterator[Reply]:
        for number in range(answers):
            choice = wire.ChatDelta(
                index=number, delta={"role": "assistant", "content": ""}, logprobs=None, finish_reason=None
            )
            yield self._chunk([choice])

    def event(self, piece: Piece) -> Reply:
        delta: dict[Any, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [
                wire.ToolCallDelta(index=index, **_called(call)) for index, call in enumerate(piece.calls)
            ]
        choice = wire.ChatDelta(
            index=piece.number,
            delta=delta,
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish,
        )
        return self._chunk([choice])

    def usage(self, usage: wire.Usage) -> Reply:
        return self._chunk([], usage)

    def whole(self, answers: Sequence[Piece], usage: wire.Usage) -> Reply:
        choices = [
            wire.ChatChoice(
                index=piece.number,
                message=wire.ChatMessage(
                    content=piece.text or (None if piece.calls else ""),
                    tool_calls=[wire.ToolCall(**_called(call)) for call in piece.calls] or None,
                ),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish or "stop",
            )
            for piece in answers
        ]
        fields = {**self._heading.fields(), "object": "chat.completion", "choices": choices, "usage": usage}
        return wire.ChatCompletion.model_validate(fields)

    def _chunk(self, choices: list[wire.ChatDelta], usage: wire.Usage | None = None) -> Reply:
        fields = {
            **self._heading.fields(),
            "object": "chat.completion.chunk",
            "choices": choices,
            "usage": usage,
        }
        return wire.ChatCompletion.model_validate(fields)

    def _logprobs(self, piece: Piece) -> wire.ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return wire.ChatLogprobs(content=[self._token(token) for token in piece.tokens])

    def _token(self, token: Token) -> wire.TokenLogprob:
        top = [self._likely(number, logprob) for number, logprob in token.top]
        chosen = self._likely(token.id, 0.0 if token.logprob is None else token.logprob)
        return wire.TokenLogprob(
            token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top
        )

    def _likely(self, number: int, logprob: float) -> wire.TopLogprob:
        text = self._voice.token_text(number)
        return wire.TopLogprob(token=text, logprob=_finite(logprob), bytes=_bytes(text))


class CompletionWriter:
    """Replies of ``/v1/completions``; arguments as of ``ChatWriter``."""

    def __init__(self, heading: Heading, voice: Voice, likeliest: int | None) -> None:
        self._heading, self._voice, self._likeliest = heading, voice, likeliest

    def opening(self, answers: int) -> Iterator[Reply]:
        return iter(())

    def event(self, piece: Piece) -> Reply:
        return self._reply([self._choice(piece)], None)

    def usage(self, usage: wire.Usage) -> Reply:
        return self._reply([], usage)

    def whole(self, answers: Sequence[Piece], usage: wire.Usage) -> Reply:
        return self._reply([self._choice(piece) for piece in answers], usage)

    def _reply(self, choices: list[wire.CompletionChoice], usage: wire.Usage | None) -> Reply:
        return wire.Completion.model_validate({**self._heading.fields(), "choices": choices, "usage": usage})

    def _choice(self, piece: Piece) -> wire.CompletionChoice:
        return wire.CompletionChoice(
            index=piece.number,
            text=piece.text,
            logprobs=self._logprobs(piece),
            finish_reason="length" if piece.finish == "length" else piece.finish and "stop",
        )

    def _logprobs(self, piece: Piece) -> wire.CompletionLogprobs | None:
        if self._likeliest is None:
            return None
        text = self._voice.token_text
        likeliest = [
            {text(number): _finite(logprob) for number, logprob in token.top} for token in piece.tokens
        ]
        return wire.CompletionLogprobs(
            text_offset=list(piece.starts),
            token_logprobs=[None if t.logprob is None else _finite(t.logprob) for t in piece.tokens],
            tokens=[text(token.id) for token in piece.tokens],
            top_logprobs=likeliest if self._likeliest else None,
        )


def _called(call: Call) -> dict[str, Any]:
    function = wire.CalledFunction(name=call.name, arguments=call.arguments)
    return {"id": f"call_{secrets.token_hex(12)}", "function": function}


def _finite(logprob: float) -> float:
    # JSON has no infinity; OpenAI writes this number for "never".
    return max(logprob, -9999.0)


def _bytes(text: str) -> list[int] | None:
    return None if _UNFINISHED in text else list(text.encode())
