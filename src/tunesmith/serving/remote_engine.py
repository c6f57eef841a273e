"""An engine whose tokens are made in other processes, any of which may end at any moment.

Requests go to one of several replicas that each hold the same base. Where one is lost, what it had not answered is
asked for anew: prompt and tokens so far are read by another replica as one prompt, and the draws of the request's
seed, which is chosen here where the client has none, go on after those that were made. The client sees one answer.
"""

import asyncio
import logging
import secrets
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Protocol

from tunesmith.errors import CheckpointError, ModelError, TunesmithError
from tunesmith.serving.desk import check_request
from tunesmith.serving.footprint import adapter_bytes
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
from tunesmith.serving.snapshots import Snapshots
from tunesmith.serving.structured import Begin, Form

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 5  # a request that itself ends every replica it reaches has to come to an end
_FIRST_PAUSE = 0.1  # seconds after the first loss, twice as many after each further one
_SECONDS_TO_END = 10  # for what is cancelled


class Lost(Exception):
    """The replica at work is gone, or could not be reached: another one may do it."""


@dataclass(frozen=True)
class Call:
    """One answer to be made: plain data, as it goes to another process.

    Attributes:
        prompt: tokens, those of the answer that are there already at the end.
        sampling: with a seed, and without a constraint, which no other process could run.
        form: what the constraint is made of.
        adapter: the name of its snapshot; None: the base.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    form: Form | None
    adapter: str | None

    def after(self, made: Sequence[int]) -> "Call":
        """The rest of the answer, ``made`` tokens of which are there."""
        if not made:
            return self
        sampling = replace(self.sampling, made=tuple(made), max_tokens=self.sampling.max_tokens - len(made))
        return replace(self, prompt=(*self.prompt, *made), sampling=sampling)


@dataclass(frozen=True)
class Unread:
    """Why a replica could not load an adapter; ``kind`` is the error's class."""

    kind: str
    fault: str
    remedy: str = ""

    def error(self, folder: Path) -> TunesmithError | EngineError:
        """The error as an engine in this process would raise it."""
        if self.kind == CheckpointError.__name__:
            return CheckpointError(str(folder), self.fault, self.remedy)
        return ModelError(str(folder), self.fault, self.remedy)


class Replicas(Protocol):
    """Processes that each hold the base.

    ``answers`` and ``read`` raise ``Lost``, and EngineError where all of them are at fault.
    """

    def answers(self, call: Call) -> AsyncGenerator[tuple[Token, ...] | EngineError, None]:
        """The tokens as they are made, the last with its ``finish``, or what ended the answer. Closing it cancels."""
        ...

    async def read(self, adapter: str) -> AdapterKey | Unread:
        """Load a snapshot into one of them."""
        ...

    def facts(self) -> Mapping[str, EngineFacts]:
        """What each of them does, by its name; nothing of one that does not tell."""
        ...

    def close(self) -> None:
        """End them."""
        ...


@dataclass
class _Adapter:
    snapshot: str
    bytes: int
    loads: int = 0
    users: int = 0


@dataclass(eq=False)
class _Request:
    number: int
    deliver: Deliver
    adapter: AdapterKey | None
    work: "Future[None] | None" = None
    has_begun: bool = False
    is_cancelled: bool = False  # nothing more may be delivered


@dataclass
class _Counts:
    prompt_tokens: int = 0
    output_tokens: int = 0
    numbers: "count[int]" = field(default_factory=count)


class RemoteEngine:
    """``Engine`` of seam.py over replicas.

    Args:
        replicas: of one base.
        limits: of all of them together.
        snapshots: of adapters, which the replicas read.
    """

    def __init__(self, replicas: Replicas, limits: EngineLimits, snapshots: Snapshots) -> None:
        self._replicas, self._limits, self._snapshots = replicas, limits, snapshots
        self._lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._adapters: dict[AdapterKey, _Adapter] = {}
        self._counts = _Counts()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> EngineLimits:
        """See ``Engine``."""
        return self._limits

    def submit(
        self, prompt: Sequence[int], adapter: AdapterKey | None, sampling: Sampling, deliver: Deliver
    ) -> Ticket:
        """See ``Engine``."""
        check_request(prompt, sampling, self._limits)
        begin, form = sampling.constraint, None
        if begin is not None:
            if not isinstance(begin, Begin):
                raise BadRequest("the constraint cannot be sent to another process")
            form = begin.form
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        with self._lock:
            if self._is_closed:
                raise EngineError("the engine is closed")
            found = self._adapters.get(adapter) if adapter is not None else None
            if adapter is not None and (found is None or not found.loads):
                raise UnknownAdapter(f"no adapter with the key {adapter[:64]} is loaded")
            if len(self._requests) >= self._limits.running + self._limits.waiting:
                raise EngineFull(f"{len(self._requests)} requests run and wait already")
            if found is not None:
                found.users += 1
            plain = replace(sampling, seed=seed, constraint=None)
            call = Call(tuple(prompt), plain, form, found.snapshot if found else None)
            request = _Request(next(self._counts.numbers), deliver, adapter)
            self._requests[request.number] = request
            self._counts.prompt_tokens += len(prompt)
            work = asyncio.run_coroutine_threadsafe(self._answer(request, call), self._loop)
            request.work = work
        # Without the lock, which it takes at once where the work is done already.
        work.add_done_callback(lambda _: self._let_go(request))
        return Ticket(request.number)

    def cancel(self, ticket: Ticket) -> None:
        """See ``Engine``."""
        with self._lock:
            request = self._requests.get(ticket.number)
        if request is not None:
            _cancel(request)

    def load(self, folder: Path) -> AdapterKey:
        """See ``Engine``: by one replica, which says whether it is good; others load it when they are asked."""
        name = self._snapshots.take(folder)
        try:
            computed = self._read(name, folder)
        except BaseException:
            self._snapshots.drop(name)
            raise
        # What it computes, as one engine has it, and all its files: a form is held to by its own tokenizer.
        key = AdapterKey(computed[:32] + name[:32])
        new = _Adapter(name, adapter_bytes(self._snapshots.root / name))
        with self._lock:
            found = self._adapters.setdefault(key, new)
            found.loads += 1
        if found is not new:
            self._snapshots.drop(name)
        return key

    def unload(self, key: AdapterKey) -> None:
        """See ``Engine``. Replicas put it out of their memory when they need the room."""
        with self._lock:
            found = self._adapters.get(key)
            if found is None or not found.loads:
                raise UnknownAdapter(f"no adapter with the key {key[:64]} is loaded")
            found.loads -= 1
            self._drop_unused(key)

    def facts(self) -> EngineFacts:
        """See ``Engine``. Caches are the replicas' own: ``parts`` tells of them."""
        parts = self._replicas.facts()
        with self._lock:
            running = sum(request.has_begun for request in self._requests.values())
            return EngineFacts(
                running=running,
                waiting=len(self._requests) - running,
                loaded=tuple(key for key, found in self._adapters.items() if found.loads),
                adapter_bytes=sum(found.bytes for found in self._adapters.values()),
                cache_tokens=0,
                cache_capacity=0,
                prefix_tokens=0,
                prompt_tokens=self._counts.prompt_tokens,
                reused_tokens=0,
                output_tokens=self._counts.output_tokens,
                parts=parts,
            )

    def close(self) -> None:
        """See ``Engine``."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            left = list(self._requests.values())
        for request in left:
            self._deliver(request, EngineError("the engine was closed"))
            _cancel(request)
        # Cancelled work ends in the loop, which therefore runs a little longer.
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_rest(), self._loop).result(_SECONDS_TO_END)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._replicas.close()
        self._loop.close()
        for found in self._adapters.values():
            self._snapshots.drop(found.snapshot)

    # In the loop

    async def _answer(self, request: _Request, call: Call) -> None:
        made: list[int] = []
        end = EngineError(f"{_ATTEMPTS} replicas were lost while they answered")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if await self._go_on(request, call, made):
                    return
                await _pause(attempt, f"{len(made)} tokens were made", "it stopped")
            except Lost as error:
                await _pause(attempt, f"{len(made)} tokens were made", error)
            except EngineError as error:
                end = error
                break
            except Exception as error:
                _LOG.exception("an answer failed")
                end = EngineError(f"the replica failed ({type(error).__name__})")
                break
        self._let_go(request)
        self._deliver(request, end)

    async def _go_on(self, request: _Request, call: Call, made: list[int]) -> bool:
        """Deliver what comes; whether the answer has come to its end."""
        is_done = False
        try:
            async with aclosing(self._replicas.answers(call.after(made))) as answers:
                async for items in answers:  # to its own end: one that is closed before is cancelled
                    if isinstance(items, EngineError):
                        raise items
                    request.has_begun = True
                    for token in items:
                        made.append(token.id)
                        self._counts.output_tokens += 1
                        is_done = token.finish is not None
                        if is_done:  # the place is free before the last delivery, see ``desk.py``
                            self._let_go(request)
                        self._deliver(request, token)
        except Lost:
            if not is_done:
                raise
        return is_done

    def _deliver(self, request: _Request, what: Token | EngineError) -> None:
        if request.is_cancelled:
            return
        try:
            request.deliver(what)
        except Exception:
            _LOG.exception("a delivery failed; its request is cancelled")
            _cancel(request)

    # Adapters

    def _read(self, name: str, folder: Path) -> AdapterKey:
        with self._lock:
            if self._is_closed:
                raise EngineError("the engine is closed")
            reading = asyncio.run_coroutine_threadsafe(self._read_by_any(name), self._loop)
        try:
            found = reading.result()
        except CancelledError:
            raise EngineError("the engine was closed") from None
        if isinstance(found, Unread):
            raise found.error(folder)
        return found

    async def _read_by_any(self, name: str) -> AdapterKey | Unread:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._replicas.read(name)
            except Lost as error:
                await _pause(attempt, "an adapter was being read", error)
        raise EngineError(f"{_ATTEMPTS} replicas were lost while they read an adapter")

    def _let_go(self, request: _Request) -> None:
        """Free what a request holds; once is enough."""
        with self._lock:
            if self._requests.pop(request.number, None) is not None and request.adapter is not None:
                self._adapters[request.adapter].users -= 1
                self._drop_unused(request.adapter)

    def _drop_unused(self, key: AdapterKey) -> None:
        """Under the lock."""
        found = self._adapters[key]
        if not (found.loads or found.users):
            del self._adapters[key]
            self._snapshots.drop(found.snapshot)


def _cancel(request: _Request) -> None:
    request.is_cancelled = True
    if request.work is not None:
        request.work.cancel()


async def _pause(attempt: int, what: str, why: object) -> None:
    _LOG.warning("replica lost, attempt %d of %d; %s: %s", attempt, _ATTEMPTS, what, why)
    if attempt < _ATTEMPTS:
        await asyncio.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))


async def _rest() -> None:
    """Until all other tasks of this loop have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
