"""What the routes do: a request becomes tokens at the engine, the tokens become a reply."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive

from tunesmith.serving import protocol as wire
from tunesmith.serving.answering import Answering, Job, room_for, sampling_of
from tunesmith.serving.faults import bad_request, is_stopping, too_late, unknown_model
from tunesmith.serving.metrics import Metrics
from tunesmith.serving.registry import Registry, Version
from tunesmith.serving.replies import ChatWriter, CompletionWriter, Heading, Reply, Writer, joined
from tunesmith.serving.seam import Engine, UnknownAdapter
from tunesmith.serving.security import Keys
from tunesmith.serving.streaming import EventStream, until_hang_up

DEADLINE_SECONDS = 600.0
_ATTEMPTS = 3  # an adapter may be replaced between look-up and submission


@dataclass
class Service:
    """One server's parts. ``is_stopping``: what runs is finished and nothing more is taken."""

    engine: Engine
    registry: Registry
    keys: Keys
    metrics: Metrics
    deadline_seconds: float = DEADLINE_SECONDS
    is_stopping: bool = False

    async def answer(self, request: wire.ChatRequest | wire.CompletionRequest, receive: Receive) -> Response:
        """The reply to a completion request: whole, or a stream of events.

        Raises:
            Refusal: with the status that fits.
            HungUp: the client is gone.
        """
        if self.is_stopping:
            raise is_stopping()
        answering, version, job = await self._begin(request, receive)
        writer, heading = _writer(request, version)
        headers = {"X-Request-Id": heading.id}
        if request.stream:
            return EventStream(_events(request, answering, job, writer), answering.close, headers)
        with answering:
            reply = await until_hang_up(receive, _whole(answering, job, writer))
        return Response(reply.model_dump_json(), media_type="application/json", headers=headers)

    def models(self) -> wire.ModelList:
        """The base and every adapter."""
        length = self.engine.limits.context_length
        data = [
            wire.Model(id=m.name, created=m.created, root=m.name, parent=m.parent, max_model_len=length)
            for m in self.registry.listed()
        ]
        return wire.ModelList(data=data)

    def metrics_text(self) -> str:
        """The answer of ``GET /metrics``."""
        base = self.registry.base.name
        adapters = [name for name in self.metrics.active if name != base]
        return self.metrics.text(self.engine.facts(), self.engine.limits, base, adapters)

    async def _begin(
        self, request: wire.ChatRequest | wire.CompletionRequest, receive: Receive
    ) -> tuple[Answering, Version, Job]:
        lost: Version | None = None
        for _ in range(_ATTEMPTS):
            try:
                async with asyncio.timeout(self.deadline_seconds):
                    # Reading files, templates and tokenizers must not hold up the other streams.
                    work = asyncio.to_thread(self._prepare, request, lost)
                    version, job = await until_hang_up(receive, work)
            except TimeoutError:
                raise too_late(self.deadline_seconds) from None
            try:
                return Answering(self.engine, version, job, self.metrics), version, job
            except UnknownAdapter:
                lost = version
        raise unknown_model(request.model)

    def _prepare(
        self, request: wire.ChatRequest | wire.CompletionRequest, lost: Version | None
    ) -> tuple[Version, Job]:
        version = self.registry.resolve(request.model, lost=lost)
        limits = self.engine.limits
        prompts, param = _prompts(request, version)
        if len(prompts) * request.n > limits.running + limits.waiting:
            message = f"n: {len(prompts) * request.n} answers are more than run and wait at once here"
            raise bad_request(message, "n")
        if any(token >= limits.vocabulary for prompt in prompts for token in prompt):
            raise bad_request(f"{param}: the vocabulary has {limits.vocabulary:,} tokens", param)
        # One length for all: what the longest prompt leaves.
        rooms = [room_for(prompt, request.most_tokens, limits.context_length, param) for prompt in prompts]
        sampling, reading = sampling_of(request, version.voice, min(rooms), limits.vocabulary)
        return version, Job(prompts, request.n, sampling, reading, self.deadline_seconds)


def _prompts(
    request: wire.ChatRequest | wire.CompletionRequest, version: Version
) -> tuple[list[list[int]], str]:
    voice = version.voice
    if isinstance(request, wire.ChatRequest):
        tools = None if request.tool_choice == "none" else request.tools
        return [voice.chat_prompt(request.messages, tools)], "messages"
    given = request.prompts
    return [voice.text_prompt(item) if isinstance(item, str) else item for item in given], "prompt"


def _writer(request: wire.ChatRequest | wire.CompletionRequest, version: Version) -> tuple[Writer, Heading]:
    kind = "chatcmpl" if isinstance(request, wire.ChatRequest) else "cmpl"
    fingerprint = version.key[:16] if version.key else None
    heading = Heading(f"{kind}-{secrets.token_hex(12)}", int(time.time()), request.model, fingerprint)
    if isinstance(request, wire.ChatRequest):
        return ChatWriter(heading, version.voice, request.logprobs), heading
    return CompletionWriter(heading, version.voice, request.logprobs), heading


async def _events(
    request: wire.ChatRequest | wire.CompletionRequest, answering: Answering, job: Job, writer: Writer
) -> AsyncIterator[Reply]:
    for reply in writer.opening(len(job.prompts) * job.n):
        yield reply
    async for piece in answering.pieces():
        yield writer.event(piece)
    if request.wants_usage:
        yield writer.usage(_usage(answering, job))


async def _whole(answering: Answering, job: Job, writer: Writer) -> Reply:
    pieces = [piece async for piece in answering.pieces()]
    return writer.whole(joined(pieces, len(job.prompts) * job.n), _usage(answering, job))


def _usage(answering: Answering, job: Job) -> wire.Usage:
    prompt, made = job.prompt_tokens, answering.output_tokens
    return wire.Usage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)
