"""The CPU engine: one thread that batches the tokens of all requests, whatever adapter each is for.

Each step admits requests while slots are free, runs at most one pass over stretches of prompts, bounded in tokens so
that answers under way never wait long, and one pass that makes the next token of every running request (continuous
batching: Yu et al. 2022, Orca, OSDI). Passes of the two kinds stay apart: a prompt that comes in changes nothing that
another request computes.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.models.base import BaseFolder
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.serving.adapter_weights import read_adapter
from tunesmith.serving.base_weights import load_base
from tunesmith.serving.desk import Desk, Places, Request
from tunesmith.serving.desk_engine import DeskEngine
from tunesmith.serving.forward import Stretches, Wanted, forward, logits
from tunesmith.serving.kv_cache import KvCache, PrefixCache
from tunesmith.serving.mixed_lora import Adapter, Plan
from tunesmith.serving.next_tokens import NextTokenPass
from tunesmith.serving.planner import Planner
from tunesmith.serving.seam import AdapterKey, EngineFacts, EngineLimits

_Request = Request[Adapter]


@dataclass(frozen=True)
class EngineSettings:
    """Bounds; their memory is running * context_length tokens of KV cache at most, and prefix_tokens beside it."""

    running: int = 16
    waiting: int = 64
    context_length: int = 2048  # or what the model has, if that is less
    prefix_tokens: int = 4096
    prompt_pass: int = 512  # most prompt tokens of one pass


@dataclass
class _Seat:
    """What a running request has of this engine."""

    slot: int
    is_begun: bool = False  # ``cached`` tokens have their keys and values in the slot
    stretch: int = 0  # tokens of the prompt to read in this pass


class CpuEngine(DeskEngine[Adapter]):
    """``Engine`` of seam.py for Llama, Mistral and Qwen2 in float32, with LoRA adapters on any of their layers."""

    def __init__(
        self,
        base: BaseFolder,
        settings: EngineSettings | None = None,
        fingerprint: "Future[str] | None" = None,
    ) -> None:
        """Load the base and start the thread; ``fingerprint`` as of ``load_base``.

        Raises:
            ModelError: the base cannot be loaded, or is of another kind.
        """
        self._settings = settings = settings or EngineSettings()
        self._folder = base
        self._base = load_base(base, settings.context_length, fingerprint)
        shapes = [layer.shape for layer in self._base.layers]
        self._cache = KvCache(shapes, settings.running, len(self._base.cos))
        self._prefixes = PrefixCache(self._cache, settings.prefix_tokens)
        self._planner = Planner(self._base)
        self._scratch = Scratch()
        self._next_tokens = NextTokenPass(self._base, self._cache, self._scratch)
        limits = EngineLimits(
            len(self._base.cos), len(self._base.embeddings), settings.running, settings.waiting
        )
        self._seats: dict[_Request, _Seat] = {}
        self._reused_tokens = 0
        super().__init__(Desk(limits, leave=self._leave, forget=self._planner.forget), "engine")

    # What callers use, from any thread; the rest is DeskEngine's.

    def load(self, folder: Path) -> AdapterKey:
        """See ``Engine``. Files are read in the caller's thread; answers go on meanwhile."""
        return self._desk.add(read_adapter(folder, self._base, self._folder))

    @property
    def places(self) -> Places:
        """Of requests at work, for another engine on the same weights."""
        return self._desk.places

    def facts(self) -> EngineFacts:
        """See ``Engine``."""
        capacity = self._cache.slots * self._cache.capacity
        return self._desk.facts(capacity, self._prefixes.tokens, self._reused_tokens)

    # What the engine's thread does.

    def _work(self) -> None:
        with torch.inference_mode():
            while self._admit():
                self._pass(self._prompts(), self._read_prompts)
                self._pass(self._ready(), self._make_tokens)
        self._desk.end_all()

    def _admit(self) -> bool:
        """Wait for work and seat what is new. False: closed."""
        self._desk.drop_cancelled()
        begun = self._desk.wait()
        for request in begun or ():
            slot = self._cache.take()
            assert slot is not None  # there are as many as places
            self._seats[request] = _Seat(slot)
        return begun is not None

    def _leave(self, request: _Request) -> None:
        """Keep what is worth keeping of its slot, and free it."""
        seat = self._seats.pop(request)
        if not request.is_sound:
            self._cache.clear(seat.slot, len(request.tokens))
        elif request.cached:
            self._prefixes.keep(request.key, request.tokens[: request.cached], seat.slot)
        self._cache.give(seat.slot)

    def _pass(self, requests: list[_Request], work: Callable[[list[_Request]], None]) -> None:
        if requests:
            with self._guarded(requests):
                work(requests)

    def _prompts(self) -> list[_Request]:
        """Requests with more than one token to read, as many as one pass takes, neighbours of one adapter."""
        chosen, room = [], self._settings.prompt_pass
        for request in self._desk.running:
            if room <= 0:
                break
            if request.is_cancelled:
                continue
            seat = self._seats[request]
            if not seat.is_begun:
                self._begin(request, seat)
            left = len(request.tokens) - request.cached
            if left > 1:
                seat.stretch = min(left, room)
                room -= seat.stretch
                chosen.append(request)
        return sorted(chosen, key=lambda request: request.key)

    def _begin(self, request: _Request, seat: _Seat) -> None:
        """As late as this, so that requests that came together share what the first of them has read."""
        seat.is_begun = True
        request.cached = self._prefixes.restore(request.key, request.tokens, seat.slot)
        self._reused_tokens += request.cached

    def _read_prompts(self, requests: list[_Request]) -> None:
        stretches: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        positions: list[int] = []
        for request in requests:
            seat, start = self._seats[request], request.cached
            stretches.append((seat.slot, start, seat.stretch))
            tokens += request.tokens[start : start + seat.stretch]
            positions += range(start, start + seat.stretch)
        plan = self._planner.stretches(
            [(length, request.adapter) for (_, _, length), request in zip(stretches, requests, strict=True)]
        )
        done, rows, row = [], [], 0
        for request, (_, start, length) in zip(requests, stretches, strict=True):
            row += length
            if start + length == len(request.tokens):
                done.append(request)
                rows.append(row - 1)
        of_done = self._planner.stretches([(1, request.adapter) for request in done])
        hidden = forward(
            self._base,
            tokens,
            torch.tensor(positions),
            Stretches(self._cache, stretches, self._scratch),
            plan,
            self._scratch,
            Wanted(torch.tensor(rows, dtype=torch.int64), of_done),
        )
        for request, (_, start, length) in zip(requests, stretches, strict=True):
            request.cached = start + length
        if done:
            self._emit(done, hidden, of_done)
        for request in done:
            if not request.is_over:
                slot = self._seats[request].slot
                self._prefixes.keep(request.key, request.tokens[: request.cached], slot)

    def _ready(self) -> list[_Request]:
        """Requests with one token to read, those of one adapter together."""
        ready = [
            request
            for request in self._desk.running
            if len(request.tokens) - request.cached == 1
            and self._seats[request].is_begun
            and not request.is_cancelled
        ]
        return sorted(ready, key=lambda request: (request.key, self._seats[request].slot))

    def _make_tokens(self, requests: list[_Request]) -> None:
        plan = self._planner.rows([request.adapter for request in requests])
        hidden = self._next_tokens(
            [request.tokens[-1] for request in requests],
            [len(request.tokens) - 1 for request in requests],
            [self._seats[request].slot for request in requests],
            plan,
        )
        for request in requests:
            request.cached = len(request.tokens)
        self._emit(requests, hidden, plan)

    def _emit(self, requests: list[_Request], hidden: torch.Tensor, plan: Plan) -> None:
        """Choose and deliver the next token of each request from its hidden state."""
        self._desk.emit(requests, logits(self._base, hidden, plan, self._scratch))
