"""What the routes do: a request becomes tokens at the engine, the tokens become a reply."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Receive

from tunesmith.serving import protocol as wire
from tunesmith.serving.answering import Answering, Job, room_for, sampling_of
from tunesmith.serving.faults import bad_request, is_stopping, queue_is_full, too_late, unknown_model
from tunesmith.serving.hosts import Hosts
from tunesmith.serving.memory import Claim, Memory, MemoryFacts
from tunesmith.serving.metrics import Metrics
from tunesmith.serving.registry import Listed, Registry, Version, refused
from tunesmith.serving.replies import ChatWriter, CompletionWriter, Heading, Reply, Writer, joined
from tunesmith.serving.seam import UnknownAdapter
from tunesmith.serving.security import Keys
from tunesmith.serving.streaming import EventStream, until_hang_up
from tunesmith.serving.threads import Kind, Threads

DEADLINE_SECONDS = 600.0
_LAST_WORDS_SECONDS = 10.0  # that a stream has past its deadline, to say so
_SOON_WRITTEN = 2_000  # tokens told; writing more of them would hold up the streams
_ATTEMPTS = 3  # an adapter may be replaced between look-up and submission


@dataclass
class Service:
    """One server's parts.

    Attributes:
        memory, registry: the models.
        most_running: answers made at once on each base.
        most_requests: answers that may run and wait at once, on all bases together.
        most_preparing: requests that may wait for a load or a template at once; ``preparing`` do at this moment.
        is_stopping: what runs is finished and nothing more is taken.
        hosts: names by which the server may be asked.
        is_crowded: whether more connections are open than are answered.
        threads: for what takes long.
    """

    memory: Memory
    registry: Registry
    keys: Keys
    metrics: Metrics
    most_running: int
    most_requests: int
    deadline_seconds: float = DEADLINE_SECONDS
    is_stopping: bool = False
    most_preparing: int = 256
    preparing: int = 0
    hosts: Hosts = field(default_factory=Hosts)
    is_crowded: Callable[[], bool] = field(default=lambda: False)
    threads: Threads = field(default_factory=Threads)

    async def answer(self, request: wire.ChatRequest | wire.CompletionRequest, receive: Receive) -> Response:
        """The reply to a completion request: whole, or a stream of events.

        Raises:
            Refusal: with the status that fits.
            HungUp: the client is gone.
        """
        if self.is_stopping:
            raise is_stopping()
        with ExitStack() as held:
            claim = held.enter_context(self.memory.claim())
            answering, version, job = await self._begin(request, receive, claim)
            held.enter_context(answering)
            writer, heading = _writer(request, version)
            headers = {"X-Request-Id": heading.id}
            if request.stream:
                # From here on all is held until the stream ends.
                seconds = self.deadline_seconds + _LAST_WORDS_SECONDS
                events = _events(request, answering, job, writer)
                return EventStream(events, held.pop_all().close, headers, seconds)
            reply = await until_hang_up(receive, _whole(self.threads, answering, job, writer))
        return Response(reply, media_type="application/json", headers=headers)

    def models(self) -> wire.ModelList:
        """The bases and all else that can be asked for."""
        return wire.ModelList(data=[shown(listed) for listed in self.registry.listed()])

    def metrics_text(self, facts: MemoryFacts) -> str:
        """The answer of ``GET /metrics``; ``facts`` are the memory's."""
        bases = {base.name for base in facts.bases}
        adapters = [name for name in self.metrics.active if name not in bases]
        return self.metrics.text(facts, self.most_running, adapters)

    async def _begin(
        self, request: wire.ChatRequest | wire.CompletionRequest, receive: Receive, claim: Claim
    ) -> tuple[Answering, Version, Job]:
        lost: Version | None = None
        if self.preparing >= self.most_preparing:
            raise queue_is_full()
        for _ in range(_ATTEMPTS):
            self.preparing += 1
            try:
                async with asyncio.timeout(self.deadline_seconds):
                    version, job = await until_hang_up(receive, self._prepare(request, claim, lost))
            except TimeoutError:
                raise too_late(self.deadline_seconds) from None
            finally:
                self.preparing -= 1
            try:
                return Answering(version.engine, version, job, self.metrics), version, job
            except UnknownAdapter:
                lost = version
        raise unknown_model(request.model)

    async def _prepare(
        self, request: wire.ChatRequest | wire.CompletionRequest, claim: Claim, lost: Version | None
    ) -> tuple[Version, Job]:
        """Files and templates are read in other threads, so that streams go on; a load is waited for in none."""
        kind = _kind(request)
        loading, job = await self.threads.run(kind, self._look_up, request, claim, lost)
        try:
            version = await asyncio.wrap_future(loading)
        except Exception as error:
            refusal = refused(error, request.model)
            if refusal is None:
                raise
            raise refusal from error
        if job is None:
            job = await self.threads.run(kind, self._job, request, version)
        return version, job

    def _look_up(
        self, request: wire.ChatRequest | wire.CompletionRequest, claim: Claim, lost: Version | None
    ) -> "tuple[Future[Version], Job | None]":
        loading = self.registry.hold(request.model, claim, lost)
        is_there = loading.done() and not loading.exception()
        return loading, self._job(request, loading.result()) if is_there else None

    def _job(self, request: wire.ChatRequest | wire.CompletionRequest, version: Version) -> Job:
        limits = version.engine.limits
        prompts, param = _prompts(request, version)
        if len(prompts) * request.n > limits.running + limits.waiting:
            message = f"n: {len(prompts) * request.n} answers are more than run and wait at once here"
            raise bad_request(message, "n")
        if any(token >= limits.vocabulary for prompt in prompts for token in prompt):
            raise bad_request(f"{param}: the vocabulary has {limits.vocabulary:,} tokens", param)
        # One length for all: what the longest prompt leaves.
        rooms = [room_for(prompt, request.most_tokens, limits.context_length, param) for prompt in prompts]
        sampling, reading = sampling_of(request, version.voice, min(rooms), limits.vocabulary)
        return Job(prompts, request.n, sampling, reading, self.deadline_seconds)


def shown(model: Listed) -> wire.Model:
    """A model as the interface has it."""
    return wire.Model(
        id=model.name, created=model.created, root=model.name, parent=model.parent,
        max_model_len=model.context_length, loaded=model.is_loaded,
    )  # fmt: skip


def _kind(request: wire.ChatRequest | wire.CompletionRequest) -> Kind:
    if request.wants_json or (isinstance(request, wire.ChatRequest) and request.must_call):
        return "form"
    return "chat" if isinstance(request, wire.ChatRequest) else "plain"


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


async def _whole(threads: Threads, answering: Answering, job: Job, writer: Writer) -> str:
    """The reply as JSON."""
    pieces = [piece async for piece in answering.pieces()]
    usage = _usage(answering, job)

    def written() -> str:
        return writer.whole(joined(pieces, len(job.prompts) * job.n), usage).model_dump_json()

    told = usage.completion_tokens * (1 + (job.sampling.top_logprobs or 0))
    return written() if told <= _SOON_WRITTEN else await threads.run("text", written)


def _usage(answering: Answering, job: Job) -> wire.Usage:
    prompt, made = job.prompt_tokens, answering.output_tokens
    return wire.Usage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)
