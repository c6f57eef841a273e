"""What callers and an engine's thread share: requests that wait or run, and adapters with their users.

Engines on one set of weights may share their places at work: requests get them in the order in which they came,
whichever engine each is for.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

from tunesmith.serving.sampling import Chooser, choose_all, logprobs
from tunesmith.serving.seam import (
    AdapterKey,
    BadRequest,
    Deliver,
    EngineError,
    EngineFacts,
    EngineFull,
    EngineLimits,
    Sampling,
    Ticket,
    Token,
    UnknownAdapter,
)

_LOG = logging.getLogger(__name__)


class Adapter(Protocol):
    """As much of an adapter as is needed here."""

    @property
    def key(self) -> AdapterKey: ...

    @property
    def nbytes(self) -> int: ...


A = TypeVar("A", bound=Adapter)


@dataclass(eq=False)
class Request(Generic[A]):
    """One answer on its way; ``tokens`` are prompt and answer, ``cached`` how many of them have been read."""

    ticket: Ticket
    adapter: A | None
    chooser: Chooser
    deliver: Deliver
    prompt_length: int
    tokens: list[int]
    cached: int = 0
    is_cancelled: bool = False
    is_over: bool = False
    is_sound: bool = False  # its last logits were finite, so its keys and values are

    @property
    def key(self) -> str:
        """Of its adapter; "" for the base."""
        return str(self.adapter.key) if self.adapter is not None else ""

    @property
    def is_read(self) -> bool:
        """Whether it has made a token, and so has one to read."""
        return len(self.tokens) > self.prompt_length


@dataclass
class _Loaded(Generic[A]):
    adapter: A
    loads: int = 1
    users: int = 0  # requests that wait or run


@dataclass(eq=False)
class Places:
    """Of requests at work, for one desk or several; everything under ``wake``."""

    most: int
    wake: threading.Condition = field(default_factory=threading.Condition)
    queue: "deque[Request[Any]]" = field(default_factory=deque)  # all that wait, in the order they came
    used: int = 0


class Desk(Generic[A]):
    """Everything of ``seam.Engine`` that does not compute. ``running`` is the engine's thread's alone.

    Args:
        limits: of the engine.
        places: that it shares with other desks; None: its own, ``limits.running`` of them.
        leave: told of a request that was running, before its place is free.
        forget: told of an adapter that nobody uses any more. Both are called in the engine's thread.
    """

    def __init__(
        self,
        limits: EngineLimits,
        places: Places | None = None,
        leave: Callable[[Request[A]], None] = lambda _: None,
        forget: Callable[[AdapterKey], None] = lambda _: None,
    ) -> None:
        self.limits = limits
        self.running: list[Request[A]] = []
        self.places = places or Places(limits.running)
        self._wake = self.places.wake
        self._leave, self._forget = leave, forget
        self._waiting: deque[Request[A]] = deque()
        self._requests: dict[int, Request[A]] = {}
        self._loaded: dict[AdapterKey, _Loaded[A]] = {}
        self._unused: list[AdapterKey] = []
        self._is_closed = False
        self._numbers = count()
        self._prompt_tokens = self._output_tokens = 0

    # For callers, from any thread.

    def submit(
        self, prompt: Sequence[int], adapter: AdapterKey | None, sampling: Sampling, deliver: Deliver
    ) -> Ticket:
        """See ``Engine``."""
        check_request(prompt, sampling, self.limits)
        chooser = Chooser(sampling)
        with self._wake:
            if self._is_closed:
                raise EngineError("the engine is closed")
            found = self._loaded.get(adapter) if adapter is not None else None
            if adapter is not None and (found is None or not found.loads):
                raise UnknownAdapter(f"no adapter with the key {adapter[:64]} is loaded")
            places = self.places
            if len(places.queue) >= self.limits.waiting + places.most - places.used:
                raise EngineFull(f"{len(places.queue)} requests wait already")
            ticket = Ticket(next(self._numbers))
            held = found.adapter if found else None
            request = Request(ticket, held, chooser, deliver, len(prompt), list(prompt))
            if found:
                found.users += 1
            self._waiting.append(request)
            places.queue.append(request)
            self._requests[ticket.number] = request
            self._wake.notify_all()
            return ticket

    def cancel(self, ticket: Ticket) -> None:
        """See ``Engine``; a token that is being delivered at this very moment may still arrive."""
        with self._wake:
            request = self._requests.get(ticket.number)
            if request is None:
                return
            request.is_cancelled = True
            if request in self._waiting:
                self._let_go(request)
            self._wake.notify_all()

    def add(self, adapter: A) -> AdapterKey:
        """Count one load of an adapter that has been read."""
        with self._wake:
            found = self._loaded.setdefault(adapter.key, _Loaded(adapter, 0))
            found.loads += 1
        return adapter.key

    def unload(self, key: AdapterKey) -> None:
        """See ``Engine``."""
        with self._wake:
            found = self._loaded.get(key)
            if found is None or not found.loads:
                raise UnknownAdapter(f"no adapter with the key {key[:64]} is loaded")
            found.loads -= 1
            self._drop_unused(key)
            self._wake.notify_all()

    def facts(self, cache_capacity: int, prefix_tokens: int = 0, reused_tokens: int = 0) -> EngineFacts:
        """See ``Engine``; of the caches only the engine knows."""
        with self._wake:
            return EngineFacts(
                running=len(self._requests) - len(self._waiting),
                waiting=len(self._waiting),
                loaded=tuple(key for key, found in self._loaded.items() if found.loads),
                adapter_bytes=sum(found.adapter.nbytes for found in self._loaded.values()),
                cache_tokens=sum(request.cached for request in self.running),
                cache_capacity=cache_capacity,
                prefix_tokens=prefix_tokens,
                prompt_tokens=self._prompt_tokens,
                reused_tokens=reused_tokens,
                output_tokens=self._output_tokens,
            )

    def close(self) -> None:
        """Let ``wait`` return None."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()

    # For the engine's thread.

    def wait(self) -> list[Request[A]] | None:
        """Wait for work and admit what fits; the requests that are new among those running. None: closed.

        Returns without waiting where some were cancelled, so that the engine gives their memory back.
        """
        if self.drop_cancelled():
            return []
        with self._wake:
            while not (self._is_next() or self.running or self._unused or self._is_closed):
                self._wake.wait()
            for key in self._unused:
                self._forget(key)
            self._unused.clear()
            if self._is_closed:
                return None
            begun = []
            while self._is_next():
                request = self._waiting.popleft()
                self.places.queue.popleft()
                self.places.used += 1
                self.running.append(request)
                begun.append(request)
                self._prompt_tokens += request.prompt_length
            if begun:
                self._wake.notify_all()  # it may be another desk's turn
            return begun

    def _is_next(self) -> bool:
        """Whether a place is free, and a request of this desk has waited longest for it."""
        places = self.places
        return places.used < places.most and bool(self._waiting) and places.queue[0] is self._waiting[0]

    def drop_cancelled(self) -> bool:
        """Free the slots of running requests that were cancelled; whether there were any."""
        cancelled = [request for request in self.running if request.is_cancelled]
        for request in cancelled:
            self._free(request)
        return bool(cancelled)

    def emit(self, requests: Sequence[Request[A]], logits: torch.Tensor) -> None:
        """Choose and deliver the next token of each request from its row of ``logits``; some end by it."""
        chosen = choose_all(logits, [request.chooser for request in requests])
        for request, token, row in zip(requests, chosen, logits, strict=True):
            request.is_sound = token != -1
            if not request.is_sound:
                token = EngineError("the model's output is not finite")
            if isinstance(token, EngineError):
                self.end(request, token)
                continue
            request.tokens.append(token)
            self._output_tokens += 1
            top = request.chooser.sampling.top_logprobs
            logprob, likeliest = logprobs(row, token, top) if top is not None else (None, ())
            finish = self._finish(request)
            found = Token(token, logprob, likeliest, finish)
            if finish is None:
                request.chooser.accept(token)
                self._deliver(request, found)
            else:
                self.end(request, found)

    def end(self, request: Request[A], last: Token | EngineError) -> None:
        """The slot is free before the last delivery, so that who waits for that finds it so."""
        self._free(request)
        self._deliver(request, last)

    def end_all(self) -> None:
        """After ``close``."""
        for request in [*self.running, *self._waiting]:
            self.end(request, EngineError("the engine was closed"))

    def _finish(self, request: Request[A]) -> Literal["stop", "length"] | None:
        sampling, made = request.chooser.sampling, len(request.tokens) - request.prompt_length
        if request.tokens[-1] in sampling.stop_token_ids:
            return "stop"
        is_full = made >= sampling.max_tokens or len(request.tokens) >= self.limits.context_length
        return "length" if is_full else None

    def _deliver(self, request: Request[A], what: Token | EngineError) -> None:
        if request.is_cancelled:
            return
        try:
            request.deliver(what)
        except Exception:
            _LOG.exception("a delivery failed; its request is cancelled")
            request.is_cancelled = True

    def _free(self, request: Request[A]) -> None:
        if request in self.running:
            self._leave(request)
        with self._wake:
            self._let_go(request)

    def _let_go(self, request: Request[A]) -> None:
        """Free what a request holds; under ``wake``."""
        request.is_over = True
        if self._requests.pop(request.ticket.number, None) is None:
            return
        if request in self.running:
            self.running.remove(request)
            self.places.used -= 1
            self._wake.notify_all()
        elif request in self._waiting:
            self._waiting.remove(request)
            self.places.queue.remove(request)
        if request.adapter is not None:
            key = request.adapter.key
            self._loaded[key].users -= 1
            self._drop_unused(key)
            request.adapter = None

    def _drop_unused(self, key: AdapterKey) -> None:
        found = self._loaded[key]
        if not (found.loads or found.users):
            del self._loaded[key]
            self._unused.append(key)


def check_request(prompt: Sequence[int], sampling: Sampling, limits: EngineLimits) -> None:
    """Raise BadRequest unless every number is within bounds."""
    if not prompt:
        raise BadRequest("the prompt is empty")
    if len(prompt) >= limits.context_length:
        raise BadRequest(f"the prompt has {len(prompt)} tokens, {limits.context_length - 1} are the most")
    bias = sampling.logit_bias
    if not all(0 <= token < limits.vocabulary for part in (prompt, bias) for token in part):
        raise BadRequest(f"a token is not in the vocabulary of {limits.vocabulary}")
    if sampling.max_tokens < 1:
        raise BadRequest("max_tokens is less than 1")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0 and 0 < sampling.top_p <= 1):
        raise BadRequest("temperature or top_p is out of bounds")
    if not all(math.isfinite(value) for value in bias.values()):
        raise BadRequest("a logit_bias is not finite")
    if not 0 <= (sampling.top_logprobs or 0) <= limits.vocabulary:
        raise BadRequest("top_logprobs is out of bounds")
