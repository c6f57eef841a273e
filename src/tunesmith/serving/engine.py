"""The CPU engine: one thread that batches the tokens of all requests, whatever adapter each is for.

Each step admits requests while slots are free, runs at most one pass over stretches of prompts, bounded in tokens so
that answers under way never wait long, and one pass that makes the next token of every running request (continuous
batching: Yu et al. 2022, Orca, OSDI). Passes of the two kinds stay apart: a prompt that comes in changes nothing that
another request computes.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

import torch

from tunesmith.models.base import BaseFolder
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.serving.adapter_weights import read_adapter
from tunesmith.serving.base_weights import load_base
from tunesmith.serving.forward import NextTokens, Stretches, forward, logits
from tunesmith.serving.kv_cache import KvCache, PrefixCache
from tunesmith.serving.mixed_lora import Adapter, Plan, Planner, segments
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


@dataclass(frozen=True)
class EngineSettings:
    """Bounds; their memory is running * context_length tokens of KV cache at most, and prefix_tokens beside it."""

    running: int = 16
    waiting: int = 64
    context_length: int = 2048  # or what the model has, if that is less
    prefix_tokens: int = 4096
    prompt_pass: int = 512  # most prompt tokens of one pass


@dataclass(eq=False)
class _Request:
    ticket: Ticket
    adapter: Adapter | None
    chooser: Chooser
    deliver: Deliver
    prompt_length: int
    tokens: list[int]  # prompt and answer
    slot: int = -1
    cached: int | None = None  # tokens whose keys and values are in the slot; None before its first pass
    stretch: int = 0  # tokens of the prompt to read in this pass
    is_cancelled: bool = False
    is_sound: bool = False  # its last logits were finite, so its keys and values are

    @property
    def key(self) -> str:
        return self.adapter.key if self.adapter else ""


@dataclass
class _Loaded:
    adapter: Adapter
    loads: int = 1
    users: int = 0  # requests that wait or run


@dataclass
class _Counts:
    prompt_tokens: int = 0
    reused_tokens: int = 0
    output_tokens: int = 0


@dataclass
class _Queue:
    """What callers and the engine's thread share, under ``wake``."""

    wake: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Request] = field(default_factory=deque)
    requests: dict[int, _Request] = field(default_factory=dict)
    loaded: dict[AdapterKey, _Loaded] = field(default_factory=dict)
    forget: list[AdapterKey] = field(default_factory=list)
    is_closed: bool = False


class CpuEngine:
    """``Engine`` of seam.py for Llama, Mistral and Qwen2 in float32, with LoRA adapters on any of their layers."""

    def __init__(self, base: BaseFolder, settings: EngineSettings | None = None) -> None:
        """Load the base and start the thread.

        Raises:
            ModelError: the base cannot be loaded, or is of another kind.
        """
        self._settings = settings or EngineSettings()
        self._folder = base
        self._base = load_base(base, self._settings.context_length)
        shapes = [layer.shape for layer in self._base.layers]
        self._windows = {shape.window for shape in shapes}
        self._cache = KvCache(shapes, self._settings.running, len(self._base.cos))
        self._prefixes = PrefixCache(self._cache, self._settings.prefix_tokens)
        self._planner = Planner(self._base)
        self._scratch = Scratch()
        self._numbers = count()
        self._counts = _Counts()
        self._running: list[_Request] = []
        self._queue = _Queue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # What callers use, from any thread.

    def submit(
        self, prompt: Sequence[int], adapter: AdapterKey | None, sampling: Sampling, deliver: Deliver
    ) -> Ticket:
        """See ``Engine``."""
        self._check(prompt, sampling)
        chooser = Chooser(sampling)
        queue = self._queue
        with queue.wake:
            if queue.is_closed:
                raise EngineError("the engine is closed")
            found = queue.loaded.get(adapter) if adapter is not None else None
            if adapter is not None and (found is None or not found.loads):
                raise UnknownAdapter(f"no adapter with the key {adapter[:64]} is loaded")
            idle = self._settings.running - (len(queue.requests) - len(queue.waiting))
            if len(queue.waiting) >= self._settings.waiting + max(idle, 0):
                raise EngineFull(f"{len(queue.waiting)} requests wait already")
            request = _Request(
                Ticket(next(self._numbers)), found.adapter if found else None, chooser, deliver,
                len(prompt), list(prompt),
            )  # fmt: skip
            if found:
                found.users += 1
            queue.waiting.append(request)
            queue.requests[request.ticket.number] = request
            queue.wake.notify()
            return request.ticket

    def _check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        limits = self.limits
        if not prompt:
            raise BadRequest("the prompt is empty")
        if len(prompt) >= limits.context_length:
            raise BadRequest(f"the prompt has {len(prompt)} tokens, {limits.context_length - 1} are the most")
        bias = sampling.logit_bias
        if not all(0 <= token < limits.vocabulary for part in (prompt, bias) for token in part):
            raise BadRequest(f"a token is not in the vocabulary of {limits.vocabulary}")
        if sampling.max_tokens < 1:
            raise BadRequest("max_tokens is less than 1")
        if not (
            math.isfinite(sampling.temperature) and sampling.temperature >= 0 and 0 < sampling.top_p <= 1
        ):
            raise BadRequest("temperature or top_p is out of bounds")
        if not all(math.isfinite(value) for value in bias.values()):
            raise BadRequest("a logit_bias is not finite")
        if not 0 <= (sampling.top_logprobs or 0) <= limits.vocabulary:
            raise BadRequest("top_logprobs is out of bounds")

    def cancel(self, ticket: Ticket) -> None:
        """See ``Engine``; a token that is being delivered at this very moment may still arrive."""
        queue = self._queue
        with queue.wake:
            request = queue.requests.get(ticket.number)
            if request is None:
                return
            request.is_cancelled = True
            if request in queue.waiting:
                queue.waiting.remove(request)
                self._let_go(request)
            queue.wake.notify()

    def load(self, folder: Path) -> AdapterKey:
        """See ``Engine``. Files are read in the caller's thread; answers go on meanwhile."""
        adapter = read_adapter(folder, self._base, self._folder)
        with self._queue.wake:
            found = self._queue.loaded.setdefault(adapter.key, _Loaded(adapter, 0))
            found.loads += 1
        return adapter.key

    def unload(self, key: AdapterKey) -> None:
        """See ``Engine``."""
        queue = self._queue
        with queue.wake:
            found = queue.loaded.get(key)
            if found is None or not found.loads:
                raise UnknownAdapter(f"no adapter with the key {key[:64]} is loaded")
            found.loads -= 1
            self._drop_unused(key)
            queue.wake.notify()

    @property
    def limits(self) -> EngineLimits:
        """See ``Engine``."""
        settings = self._settings
        return EngineLimits(
            len(self._base.cos), len(self._base.embeddings), settings.running, settings.waiting
        )

    def facts(self) -> EngineFacts:
        """See ``Engine``."""
        queue = self._queue
        with queue.wake:
            running = list(self._running)
            return EngineFacts(
                running=len(queue.requests) - len(queue.waiting),
                waiting=len(queue.waiting),
                loaded=tuple(key for key, found in queue.loaded.items() if found.loads),
                adapter_bytes=sum(found.adapter.nbytes for found in queue.loaded.values()),
                cache_tokens=sum(request.cached or 0 for request in running),
                cache_capacity=self._cache.slots * self._cache.capacity,
                prefix_tokens=self._prefixes.tokens,
                prompt_tokens=self._counts.prompt_tokens,
                reused_tokens=self._counts.reused_tokens,
                output_tokens=self._counts.output_tokens,
            )

    def close(self) -> None:
        """See ``Engine``."""
        with self._queue.wake:
            self._queue.is_closed = True
            self._queue.wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # What the engine's thread does.

    def _work(self) -> None:
        with torch.inference_mode():
            while self._wait():
                self._guarded(self._prompts(), self._read_prompts)
                self._guarded(self._ready(), self._make_tokens)
        for request in [*self._running, *self._queue.waiting]:
            self._end(request, EngineError("the engine was closed"))

    def _wait(self) -> bool:
        """Until there is work; admits what fits. False: closed."""
        queue = self._queue
        for request in [request for request in self._running if request.is_cancelled]:
            self._free(request)
        with queue.wake:
            while not (queue.waiting or self._running or queue.forget or queue.is_closed):
                queue.wake.wait()
            for key in queue.forget:
                self._planner.forget(key)
            queue.forget.clear()
            if queue.is_closed:
                return False
            while queue.waiting and (slot := self._cache.take()) is not None:
                request = queue.waiting.popleft()
                request.slot = slot
                self._running.append(request)
            return True

    def _guarded(self, requests: list[_Request], work: Callable[[list[_Request]], None]) -> None:
        """A pass that fails ends its own requests, not the engine."""
        try:
            if requests:
                work(requests)
        except Exception as error:
            _LOG.exception("a forward pass failed")
            for request in requests:
                if request.ticket.number in self._queue.requests:
                    self._end(request, EngineError(f"the forward pass failed ({type(error).__name__})"))

    def _prompts(self) -> list[_Request]:
        """Requests with more than one token to read, as many as one pass takes, neighbours of one adapter."""
        chosen, room = [], self._settings.prompt_pass
        for request in self._running:
            if room <= 0:
                break
            if request.is_cancelled:
                continue
            if request.cached is None:
                self._begin(request)
            left = len(request.tokens) - (request.cached or 0)
            if left > 1:
                request.stretch = min(left, room)
                room -= request.stretch
                chosen.append(request)
        return sorted(chosen, key=lambda request: request.key)

    def _begin(self, request: _Request) -> None:
        """As late as this, so that requests that came together share what the first of them has read."""
        request.cached = self._prefixes.restore(request.key, request.tokens, request.slot)
        self._counts.prompt_tokens += request.prompt_length
        self._counts.reused_tokens += request.cached

    def _read_prompts(self, requests: list[_Request]) -> None:
        stretches: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        positions: list[int] = []
        for request in requests:
            start, length = request.cached or 0, request.stretch
            stretches.append((request.slot, start, length))
            tokens += request.tokens[start : start + length]
            positions += range(start, start + length)
        plan = segments(
            [(length, request.adapter) for (_, _, length), request in zip(stretches, requests, strict=True)]
        )
        hidden = forward(
            self._base,
            tokens,
            torch.tensor(positions),
            Stretches(self._cache, stretches),
            plan,
            self._scratch,
        )
        done, rows, row = [], [], 0
        for request, (_, start, length) in zip(requests, stretches, strict=True):
            row += length
            request.cached = start + length
            if request.cached == len(request.tokens):
                done.append(request)
                rows.append(row - 1)
        if done:
            kept = hidden.index_select(0, torch.tensor(rows))
            self._emit(done, kept, segments([(1, request.adapter) for request in done]))
        for request in done:
            if request in self._running:
                self._prefixes.keep(request.key, request.tokens[: request.cached], request.slot)

    def _ready(self) -> list[_Request]:
        """Requests with one token to read, those of one adapter together."""
        ready = [request for request in self._running if len(request.tokens) - (request.cached or 0) == 1]
        ready = [request for request in ready if request.cached is not None and not request.is_cancelled]
        return sorted(ready, key=lambda request: (request.key, request.slot))

    def _make_tokens(self, requests: list[_Request]) -> None:
        positions = torch.tensor([len(request.tokens) - 1 for request in requests])
        plan = self._planner.rows([request.adapter for request in requests])
        attention = NextTokens(self._cache, [request.slot for request in requests], positions, self._windows)
        tokens = [request.tokens[-1] for request in requests]
        hidden = forward(self._base, tokens, positions, attention, plan, self._scratch)
        for request in requests:
            request.cached = len(request.tokens)
        self._emit(requests, hidden, plan)

    def _emit(self, requests: list[_Request], hidden: torch.Tensor, plan: Plan) -> None:
        """Choose and deliver the next token of each request from its hidden state."""
        rows = logits(self._base, hidden, plan, self._scratch)
        chosen = choose_all(rows, [request.chooser for request in requests])
        for request, token, row in zip(requests, chosen, rows, strict=True):
            request.is_sound = token != -1
            if not request.is_sound:
                token = EngineError("the model's output is not finite")
            if isinstance(token, EngineError):
                self._end(request, token)
                continue
            request.tokens.append(token)
            self._counts.output_tokens += 1
            top = request.chooser.sampling.top_logprobs
            logprob, likeliest = logprobs(row, token, top) if top is not None else (None, ())
            finish = self._finish(request)
            if finish is None:
                request.chooser.accept(token)
            self._end_or_go_on(request, Token(token, logprob, likeliest, finish))

    def _finish(self, request: _Request) -> Literal["stop", "length"] | None:
        sampling, made = request.chooser.sampling, len(request.tokens) - request.prompt_length
        if request.tokens[-1] in sampling.stop_token_ids:
            return "stop"
        is_full = made >= sampling.max_tokens or len(request.tokens) >= self._cache.capacity
        return "length" if is_full else None

    def _end_or_go_on(self, request: _Request, token: Token) -> None:
        if token.finish is not None:
            self._end(request, token)
        else:
            self._deliver(request, token)

    def _end(self, request: _Request, last: Token | EngineError) -> None:
        """The slot is free before the last delivery, so that who waits for that finds it so."""
        self._free(request)
        self._deliver(request, last)

    def _free(self, request: _Request) -> None:
        if request.slot >= 0:
            if not request.is_sound:
                self._cache.clear(request.slot, len(request.tokens))
            elif request.cached:
                self._prefixes.keep(request.key, request.tokens[: request.cached], request.slot)
        with self._queue.wake:
            self._let_go(request)

    def _deliver(self, request: _Request, what: Token | EngineError) -> None:
        if request.is_cancelled:
            return
        try:
            request.deliver(what)
        except Exception:
            _LOG.exception("a delivery failed; its request is cancelled")
            request.is_cancelled = True

    def _let_go(self, request: _Request) -> None:
        """Free what a request holds; under ``wake``."""
        if self._queue.requests.pop(request.ticket.number, None) is None:
            return
        if request.slot >= 0:
            self._running.remove(request)
            self._cache.give(request.slot)
        if request.adapter is not None:
            key = request.adapter.key
            self._queue.loaded[key].users -= 1
            self._drop_unused(key)
            request.adapter = None

    def _drop_unused(self, key: AdapterKey) -> None:
        found = self._queue.loaded[key]
        if not (found.loads or found.users):
            del self._queue.loaded[key]
            self._queue.forget.append(key)
