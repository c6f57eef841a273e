"""One request's answers as they come: tickets at the engine, tokens to text, an end in every case.

Tokens arrive in the engine's thread and are handed to the event loop; whoever leaves the ``with`` block, by
whatever way, gives back the tickets of the answers that are not done.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Self, cast

from tunesmith.serving.chat import Speaker, Voice
from tunesmith.serving.faults import Refusal, bad_request, is_stopping, queue_is_full, too_late
from tunesmith.serving.handover import handover
from tunesmith.serving.metrics import Histogram, Metrics
from tunesmith.serving.protocol import ChatRequest, CompletionRequest, Finish, NamedTool
from tunesmith.serving.registry import Version
from tunesmith.serving.request_log import current_record
from tunesmith.serving.seam import (
    BadRequest,
    Deliver,
    Engine,
    EngineError,
    EngineFull,
    Sampling,
    Ticket,
    Token,
    UnknownAdapter,
)
from tunesmith.serving.structured import Form, constraint_for, json_form
from tunesmith.serving.tool_answers import Call, CallReader, CallStyle, call_form, hides_markers, style_of


@dataclass(frozen=True)
class Reading:
    """How an answer's tokens become its text and its calls.

    Attributes:
        stops: texts that end the answer.
        style: how its calls are written; None: it has none.
        most_calls: that may be in it; None: any number.
        shows_control: whether control tokens are part of the text, as the marks of calls may be.
    """

    stops: tuple[str, ...]
    style: CallStyle | None = None
    most_calls: int | None = None
    shows_control: bool = False

    def call_reader(self) -> CallReader | None:
        """Of a new answer."""
        return CallReader(self.style, self.most_calls) if self.style else None


@dataclass(frozen=True)
class Job:
    """A request's prompts, each answered ``n`` times; answer ``i`` of prompt ``p`` has the number ``p * n + i``."""

    prompts: Sequence[Sequence[int]]
    n: int
    sampling: Sampling
    reading: Reading
    deadline_seconds: float

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class Piece:
    """What one answer newly says; ``starts`` is the place of each token's text in the whole answer."""

    number: int
    text: str
    tokens: tuple[Token, ...]
    starts: tuple[int, ...]
    finish: Finish | None
    calls: tuple[Call, ...] = ()  # all of the answer's, with its ``finish``


@dataclass
class _Answer:
    ticket: Ticket
    speaker: Speaker
    call_reader: CallReader | None
    tokens: list[Token] = field(default_factory=list)  # of which the text has not been told yet
    starts: list[int] = field(default_factory=list)
    length: int = 0
    is_done: bool = False
    last_at: float | None = None


class Answering:
    """The answers to one request, submitted when it is made.

    Args:
        engine: makes the tokens.
        version: the model that answers.
        job: what is asked.
        metrics: told what happens.

    Raises:
        Refusal: 429: the queue is full; 400: the engine refuses the request. Nothing runs then.
        UnknownAdapter: the version is no longer loaded.
    """

    def __init__(self, engine: Engine, version: Version, job: Job, metrics: Metrics) -> None:
        self._engine, self._job, self._metrics = engine, job, metrics
        self._label = metrics.label(version.name)
        self._handover = handover()
        self._arrived: asyncio.Queue[tuple[int, Token | EngineError | TimeoutError]] = asyncio.Queue()
        self._answers: list[_Answer] = []
        self._began = time.monotonic()
        self._is_closed = False
        self.output_tokens = 0
        self._name = version.name
        self._record = current_record()
        self._record.model, self._record.version = version.name, version.key and version.key[:16]
        self._record.prompt_tokens, self._record.output_tokens = job.prompt_tokens, 0
        self._record.finish = ["abort"] * (len(job.prompts) * job.n)
        if self._record.prompts is not None:
            self._record.prompts = [
                str(version.voice.tokenizer.decode(list(prompt))) for prompt in job.prompts
            ]
            self._record.answers = [""] * len(self._record.finish)
        self._metrics.active[self._name] += 1
        # One timer for all that comes, not one for each token.
        late = (0, TimeoutError())
        self._deadline = asyncio.get_running_loop().call_later(
            job.deadline_seconds, self._arrived.put_nowait, late
        )
        try:
            self._submit(version)
        except BaseException:
            self.close(counted=False)
            raise

    def _submit(self, version: Version) -> None:
        job = self._job
        for prompt in job.prompts:
            for choice in range(job.n):
                sampling = _for_choice(job.sampling, choice)
                number = len(self._answers)
                try:
                    ticket = self._engine.submit(prompt, version.key, sampling, self._mailbox(number))
                except EngineFull:
                    raise queue_is_full() from None
                except BadRequest as error:
                    raise bad_request(str(error)) from None
                except UnknownAdapter:
                    raise
                except EngineError:  # it is closed
                    raise is_stopping() from None
                reading = job.reading
                speaker = Speaker(version.voice.tokenizer, reading.stops, shows_control=reading.shows_control)
                self._answers.append(_Answer(ticket, speaker, reading.call_reader()))
        self._metrics.prompt_tokens[self._label] += job.prompt_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the answers say, as it comes; each answer's last piece has its ``finish``.

        Raises:
            Refusal: 504: the deadline has passed; 500: the engine failed.
        """
        left = len(self._answers)
        while left:
            number, item = await self._arrived.get()
            if isinstance(item, TimeoutError):
                raise too_late(self._job.deadline_seconds)
            answer = self._answers[number]
            if answer.is_done:  # delivered before the cancellation reached the engine
                continue
            if isinstance(item, EngineError):
                raise Refusal(500, f"The answer could not be finished: {item}", "engine_error") from item
            piece = self._take(number, answer, item)
            if piece is None:
                continue
            if piece.finish is not None:
                answer.is_done = True
                left -= 1
                self._record.finish[number] = piece.finish
                self._metrics.finished[self._label, "length" if piece.finish == "length" else "stop"] += 1
            if self._record.answers is not None:
                self._record.answers[number] += piece.text + "".join(f"\n{call}" for call in piece.calls)
            yield piece

    def close(self, *, counted: bool = True) -> None:
        """Give back what is not done; once is enough."""
        if self._is_closed:
            return
        self._is_closed = True
        self._deadline.cancel()
        self._metrics.active[self._name] -= 1
        if not self._metrics.active[self._name]:
            del self._metrics.active[self._name]
        for answer in self._answers:
            if not answer.is_done:
                self._engine.cancel(answer.ticket)
                if counted:
                    self._metrics.finished[self._label, "abort"] += 1
        if counted:
            whole = self._metrics.whole.setdefault(self._label, Histogram())
            whole.add(time.monotonic() - self._began)

    def _mailbox(self, number: int) -> Deliver:
        put, handed = self._arrived.put_nowait, self._handover
        return lambda item: handed.call(put, (number, item))

    def _take(self, number: int, answer: _Answer, token: Token) -> Piece | None:
        self.output_tokens += 1
        self._record.output_tokens = self.output_tokens
        self._metrics.output_tokens[self._label] += 1
        self._clock(answer)
        text, finish = "", cast("Finish | None", token.finish)
        calls: tuple[Call, ...] = ()
        if token.finish != "stop":  # a stop token is not part of the answer
            answer.tokens.append(token)
            answer.starts.append(answer.length)
            text = answer.speaker.add(token.id)
        if token.finish is not None:
            text += answer.speaker.end()
        if answer.speaker.is_stopped:
            finish = "stop"
            if token.finish is None:
                self._engine.cancel(answer.ticket)
        if answer.call_reader is not None:
            text = answer.call_reader.add(text)
            if finish is not None:
                rest, calls = answer.call_reader.end()
                text += rest
            if calls and finish == "stop":
                finish = "tool_calls"
        if not text and finish is None:
            return None
        piece = Piece(number, text, tuple(answer.tokens), tuple(answer.starts), finish, calls)
        answer.tokens.clear()
        answer.starts.clear()
        answer.length += len(text)
        return piece

    def _clock(self, answer: _Answer) -> None:
        now = time.monotonic()
        if answer.last_at is None:
            self._metrics.first_token.setdefault(self._label, Histogram()).add(now - self._began)
            self._record.first_token_at = self._record.first_token_at or now
        else:
            self._metrics.between_tokens.setdefault(self._label, Histogram()).add(now - answer.last_at)
        answer.last_at = now


def _for_choice(sampling: Sampling, choice: int) -> Sampling:
    """The sampling of one of several answers: each has a seed of its own, which the request's seed decides."""
    if sampling.seed is None or choice == 0:
        return sampling
    digest = hashlib.sha256(f"{sampling.seed}:{choice}".encode()).digest()
    values = {**vars(sampling), "seed": int.from_bytes(digest[:8], "big") >> 1}
    return Sampling(**values)


def room_for(prompt: Sequence[int], most: int | None, context_length: int, param: str) -> int:
    """How many tokens the answer may have.

    Args:
        prompt: its tokens.
        most: as the request says; None: as many as there is room for.
        context_length: of prompt and answer together.
        param: the field that holds the prompt.

    Raises:
        Refusal: 400: they do not fit, or the prompt is empty.
    """
    if not prompt:
        raise bad_request(f"{param}: is empty", param)
    room = context_length - len(prompt)
    if room < 1 or (most or 0) > room:
        asked = f" and the answer may have {most:,}" if most else ""
        message = (
            f"{param}: the prompt has {len(prompt):,} tokens{asked}; the context holds {context_length:,}"
        )
        raise bad_request(message, param, "context_length_exceeded")
    return most or room


def sampling_of(
    request: ChatRequest | CompletionRequest, voice: Voice, max_tokens: int, vocabulary: int
) -> tuple[Sampling, Reading]:
    """A request's sampling, and how its answers are read.

    Raises:
        Refusal: 400: a biased token is none of the vocabulary, or answers cannot be held to the form asked for.
    """
    biases = request.biases()
    if biases and max(biases) >= vocabulary:
        raise bad_request(f"logit_bias: the vocabulary has {vocabulary:,} tokens", "logit_bias")
    form, style = _form_of(request, voice), _style_of(request, voice)
    stops = voice.stops_with(request.stops, request.ignore_eos)
    stop_ids = frozenset(stops.token_ids)
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=None if request.seed is None else request.seed % 2**63,
        stop_token_ids=stop_ids,
        logit_bias=biases,
        top_logprobs=request.likeliest,
        constraint=constraint_for(form, voice, vocabulary, stop_ids) if form else None,
    )
    # The model's own stop texts could cut a held answer in the middle of a JSON string; its end is a token.
    strings = tuple(text for text in stops.strings if form is None or text in request.stops)
    return sampling, Reading(strings, style, _most_calls(request), style is not None and hides_markers(voice))


def _form_of(request: ChatRequest | CompletionRequest, voice: Voice) -> Form | None:
    if isinstance(request, ChatRequest) and request.must_call:
        style = style_of(voice)
        if style is None:
            message = (
                "tool_choice: how this model's chat template writes calls is not known here; set it to auto"
            )
            raise bad_request(message, "tool_choice")
        choice = request.tool_choice
        name = choice.function.name if isinstance(choice, NamedTool) else None
        return call_form(style, voice, request.tools or (), name, _most_calls(request))
    given = request.response_format
    if given is None or given.type == "text":
        return None
    if given.json_schema is None:
        return json_form({"type": "object"}, "response_format")
    return json_form(given.json_schema.schema_, "response_format.json_schema.schema")


def _style_of(request: ChatRequest | CompletionRequest, voice: Voice) -> CallStyle | None:
    return style_of(voice) if isinstance(request, ChatRequest) and request.may_call else None


def _most_calls(request: ChatRequest | CompletionRequest) -> int | None:
    if not isinstance(request, ChatRequest):
        return None
    return 1 if request.parallel_tool_calls is False or isinstance(request.tool_choice, NamedTool) else None
