"""One base in a process of Ray's: the engine of this project, which answers for whichever adapter is asked for."""

import asyncio
import os
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.chat import VoiceBox
from tunesmith.serving.engine import EngineSettings
from tunesmith.serving.engines import open_engine
from tunesmith.serving.faults import Refusal
from tunesmith.serving.handover import handover
from tunesmith.serving.remote_engine import Call, Unread
from tunesmith.serving.seam import (
    AdapterKey,
    Engine,
    EngineError,
    EngineFacts,
    Sampling,
    Ticket,
    Token,
    UnknownAdapter,
)
from tunesmith.serving.structured import Form, constraint_for
from tunesmith.serving.threads import Threads

_ATTEMPTS = 3  # an adapter may be put out between being found and being used


@dataclass(frozen=True)
class ReplicaPlan:
    """All that a replica needs: plain data, as it goes to another process.

    Attributes:
        base: its files.
        engine: bounds.
        snapshots: the folder of copies of adapters.
        most_adapters: that it holds; the least recently used goes for another.
        facts: the folder into which it tells what it does.
    """

    base: BaseFolder
    engine: EngineSettings
    snapshots: Path
    most_adapters: int
    facts: Path


class HeldAdapter:
    """An adapter in the engine's memory, until ``unload``; answers that use it finish first."""

    def __init__(self, engine: Engine, key: AdapterKey) -> None:
        self.key = key
        self._engine, self._is_loaded = engine, True

    def unload(self) -> None:
        """Once is enough."""
        if self._is_loaded:
            self._is_loaded = False
            with suppress(UnknownAdapter):
                self._engine.unload(self.key)

    def __del__(self) -> None:  # which Ray Serve calls when it puts a model out
        self.unload()


class Worker:
    """The work of a replica, without Ray.

    Args:
        plan: what it serves.
        engine: on it; None: a new one.

    Attributes:
        threads: for loading and compiling.
    """

    def __init__(self, plan: ReplicaPlan, engine: Engine | None = None) -> None:
        self._plan = plan
        self._engine = engine or open_engine(plan.base, plan.engine)
        self._box = VoiceBox()
        self.threads = Threads()

    def limits(self) -> tuple[int, int]:
        """Context length and vocabulary, in tokens."""
        return self._engine.limits.context_length, self._engine.limits.vocabulary

    def facts(self) -> EngineFacts:
        """What its engine does at this moment."""
        return self._engine.facts()

    def load(self, name: str) -> HeldAdapter:
        """Load a snapshot. Raises as ``Engine.load``."""
        return HeldAdapter(self._engine, self._engine.load(self._plan.snapshots / name))

    async def answer(
        self, call: Call, adapter: Callable[[str], Awaitable[HeldAdapter]]
    ) -> AsyncGenerator[tuple[Token, ...] | EngineError, None]:
        """The tokens of an answer as they are made, or what ended it; closing this cancels it.

        Args:
            call: what is asked.
            adapter: gives a loaded snapshot.
        """
        arrived: asyncio.Queue[Token | EngineError] = asyncio.Queue()
        deliver = partial(handover().call, arrived.put_nowait)
        try:
            ticket = await self._submit(call, adapter, deliver)
        except EngineError as error:
            yield error
            return
        try:
            is_done = False
            while not is_done:
                items = [await arrived.get()]
                while not arrived.empty():
                    items.append(arrived.get_nowait())
                tokens = tuple(item for item in items if isinstance(item, Token))
                if tokens:
                    is_done = tokens[-1].finish is not None
                    yield tokens
                for item in items:
                    if isinstance(item, EngineError):
                        yield item
                        return
        finally:
            self._engine.cancel(ticket)

    async def _submit(
        self,
        call: Call,
        adapter: Callable[[str], Awaitable[HeldAdapter]],
        deliver: Callable[[Token | EngineError], None],
    ) -> Ticket:
        sampling = call.sampling
        if call.form is not None:
            sampling = await self.threads.run("form", self._constrained, call, call.form)
        for _ in range(_ATTEMPTS):
            held = await adapter(call.adapter) if call.adapter is not None else None
            with suppress(UnknownAdapter):
                return self._engine.submit(call.prompt, held.key if held else None, sampling, deliver)
        raise EngineError("the adapter is put out of memory again and again; hold more of them at once")

    def _constrained(self, call: Call, form: Form) -> Sampling:
        """The sampling with the constraint that this process makes of the form."""
        voice = self._box.of_base(self._plan.base)
        if call.adapter is not None:
            voice = self._box.of_adapter(self._plan.snapshots / call.adapter, call.adapter, voice)
        try:
            begin = constraint_for(form, voice, self._engine.limits.vocabulary, call.sampling.stop_token_ids)
        except Refusal as refusal:
            raise EngineError(refusal.message) from refusal
        return replace(call.sampling, constraint=begin)


async def read_adapter(name: str, adapter: Callable[[str], Awaitable[HeldAdapter]]) -> AdapterKey | Unread:
    """The key of a snapshot that ``adapter`` gives, or why it gives none."""
    try:
        return (await adapter(name)).key
    except TunesmithError as error:
        return Unread(type(error).__name__, error.fault, error.remedy)
    except (OSError, ValueError) as error:
        return Unread(type(error).__name__, str(error))


def silence_libraries() -> None:
    """As the command does: their warnings are for programmers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(peft|torch|transformers|huggingface_hub)\b")
