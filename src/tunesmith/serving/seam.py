"""The seam between the server's routes and whatever makes the tokens: plain data and one protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NewType, Protocol

import numpy as np
from numpy.typing import NDArray

AdapterKey = NewType(
    "AdapterKey", str
)  # 64 hex digits: the SHA-256 of all that decides what the adapter computes


class EngineError(Exception):
    """An engine cannot do what was asked; the message is one line, without contents of requests."""


class EngineFull(EngineError):
    """As many requests wait as may."""


class UnknownAdapter(EngineError):
    """The key is of no loaded adapter."""


class BadRequest(EngineError):
    """The prompt or a number of the request is out of bounds."""


class Constraint(Protocol):
    """What one answer may go on with; used from the engine's thread alone."""

    def mask(self) -> NDArray[np.bool_]:
        """(vocabulary,), true where the token may come next; stop tokens are true where the answer may end.

        Raises:
            EngineError: it cannot be worked out; the answer has to end.
        """
        ...

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``, which ``mask`` allowed and which did not end it. Must not block."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None  # the same seed, prompt and model give the same tokens whatever else runs
    stop_token_ids: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = (
        None  # None: no logprobs; 0: of the chosen token alone; n: also the n likeliest
    )
    constraint: Callable[[], Constraint] | None = (
        None  # begins the one of an answer; it does not touch logprobs
    )
    # The prompt's last tokens where they are of this answer already: its draws and its constraint go on after them.
    made: tuple[int, ...] = ()


@dataclass(frozen=True)
class Token:
    """One token of an answer. A stop token is delivered too, with ``finish`` "stop"."""

    id: int
    logprob: float | None  # of the softmax over the whole vocabulary, before bias and temperature
    top: tuple[tuple[int, float], ...]  # (id, logprob), likeliest first
    finish: Literal["stop", "length"] | None  # set on the last one


Deliver = Callable[[Token | EngineError], None]


@dataclass(frozen=True)
class Ticket:
    """A request that was accepted."""

    number: int


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of an engine; a request outside them is refused by ``submit``."""

    context_length: int  # tokens of prompt and answer together
    vocabulary: int
    running: int  # most requests at work at once
    waiting: int  # most requests that wait beside them


@dataclass(frozen=True)
class EngineFacts:
    """What an engine does at this moment, and what it has done, for ``/metrics``.

    Attributes:
        parts: the same of the processes that make the tokens, by a name of each, those that could tell in time; the
            numbers of memory and caches are theirs alone. None: the tokens are made here.
    """

    running: int
    waiting: int
    loaded: tuple[AdapterKey, ...]
    adapter_bytes: int  # memory of the loaded adapters' tensors
    cache_tokens: int  # tokens in the KV cache of running requests
    cache_capacity: int  # tokens that it holds at most
    prefix_tokens: int  # tokens in the prefix cache
    prompt_tokens: int  # of all requests begun, since the start
    reused_tokens: int  # of these, taken from the prefix cache
    output_tokens: int  # made since the start
    parts: "Mapping[str, EngineFacts] | None" = None


class Engine(Protocol):
    """Makes tokens for many requests at once, on one base with many adapters."""

    def submit(
        self, prompt: Sequence[int], adapter: AdapterKey | None, sampling: Sampling, deliver: Deliver
    ) -> Ticket:
        """Queue a request; thread-safe. ``adapter`` None: the base.

        ``deliver`` is called from the engine's thread with each token in order, the last with ``finish`` set, or with
        the error that ended the request; it must not block.

        Raises:
            BadRequest, EngineFull, UnknownAdapter: nothing was queued.
        """
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Free the request's slot before the next forward pass; nothing more is delivered. Twice is as once."""
        ...

    def load(self, folder: Path) -> AdapterKey:
        """Check and load an adapter; equal content gives an equal key. Each load wants an ``unload`` of its own.

        Raises:
            ModelError, CheckpointError: it is damaged, of another base, or of a kind this engine does not serve;
                nothing has changed.
        """
        ...

    def unload(self, key: AdapterKey) -> None:
        """Take back one ``load``. After the last one no new request is accepted, and memory goes when those that
        wait or run have ended.

        Raises:
            UnknownAdapter: it is not loaded.
        """
        ...

    @property
    def limits(self) -> EngineLimits: ...

    def facts(self) -> EngineFacts: ...

    def close(self) -> None:
        """End every request with an ``EngineError`` and give the memory back."""
        ...
