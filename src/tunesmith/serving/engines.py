"""Which engine serves a base, and the two that share one: fast for plain LoRA, plain for every other kind of it."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.adapter_files import NotServed
from tunesmith.serving.base_weights import hashed_beside
from tunesmith.serving.engine import CpuEngine, EngineSettings
from tunesmith.serving.plain_engine import PlainEngine
from tunesmith.serving.plain_model import share_plain
from tunesmith.serving.seam import (
    AdapterKey,
    Deliver,
    Engine,
    EngineError,
    EngineFacts,
    EngineLimits,
    Sampling,
    Ticket,
    UnknownAdapter,
)

_FAST_KINDS = ("llama", "mistral", "qwen2")  # of config.json; what else decides is seen once it is loaded


def open_engine(base: BaseFolder, settings: EngineSettings | None = None) -> Engine:
    """The engine for ``base``: the fast one where it computes this model, with a plain one beside it from the first
    adapter on that only the plain one computes; else the plain one.

    Raises:
        ModelError: the base cannot be loaded by either.
    """
    settings = settings or EngineSettings()
    fingerprint = hashed_beside(base)  # before the first import of transformers, which takes longer
    config = _config(base)
    if config.model_type in _FAST_KINDS:
        try:
            fast = CpuEngine(base, settings, fingerprint)
        except NotServed:
            return PlainEngine(base, settings, fingerprint=fingerprint)
        return PairedEngine(fast, lambda: _beside(fast, base, config, settings))
    return PlainEngine(base, settings, fingerprint=fingerprint)


def _config(base: BaseFolder) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.path)
    except Exception as error:  # foreign files, and a library with exceptions of a kind of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            base.model_id, f"its config.json cannot be loaded ({reason})", "check the folder"
        ) from error


def _beside(fast: CpuEngine, base: BaseFolder, config: Any, settings: EngineSettings) -> PlainEngine:
    return PlainEngine(base, settings, model=share_plain(fast._base, config), places=fast.places)


class PairedEngine:
    """Two engines on the same weights as one ``Engine``. Base and plain LoRA adapters are the fast one's.

    Both together accept and run as many requests as ``limits`` says, in the order in which they came.
    """

    def __init__(self, fast: CpuEngine, make: Callable[[], PlainEngine]) -> None:
        """``make`` is called at most once, when the first adapter needs it."""
        self._engines: list[CpuEngine | PlainEngine] = [fast]
        self._make = make
        self._making = threading.Lock()
        self._is_closed = False

    def submit(
        self, prompt: Sequence[int], adapter: AdapterKey | None, sampling: Sampling, deliver: Deliver
    ) -> Ticket:
        """See ``Engine``."""
        engines = list(self._engines)
        for number, engine in enumerate(engines):
            try:
                ticket = engine.submit(prompt, adapter, sampling, deliver)
            except UnknownAdapter:
                if engine is engines[-1]:
                    raise
            else:
                return Ticket(2 * ticket.number + number)
        raise AssertionError("there is no engine")

    def cancel(self, ticket: Ticket) -> None:
        """See ``Engine``."""
        number, place = divmod(ticket.number, 2)
        self._engines[place].cancel(Ticket(number))

    def load(self, folder: Path) -> AdapterKey:
        """See ``Engine``. Raises what the plain engine says of an adapter that neither computes."""
        try:
            return self._engines[0].load(folder)
        except NotServed:
            return self._plain().load(folder)

    def unload(self, key: AdapterKey) -> None:
        """See ``Engine``."""
        engines = list(self._engines)
        for engine in engines:
            try:
                return engine.unload(key)
            except UnknownAdapter:
                if engine is engines[-1]:
                    raise
        return None

    @property
    def limits(self) -> EngineLimits:
        """See ``Engine``."""
        return self._engines[0].limits

    def facts(self) -> EngineFacts:
        """See ``Engine``: the sums of both."""
        first, *rest = [engine.facts() for engine in list(self._engines)]
        for other in rest:
            names = [f.name for f in fields(EngineFacts) if f.name != "parts"]
            sums = {name: getattr(first, name) + getattr(other, name) for name in names}
            first = EngineFacts(**sums)
        return first

    def close(self) -> None:
        """See ``Engine``."""
        with self._making:
            self._is_closed = True
        for engine in self._engines:
            engine.close()

    def _plain(self) -> CpuEngine | PlainEngine:
        with self._making:
            if self._is_closed:
                raise EngineError("the engine is closed")
            if len(self._engines) == 1:
                self._engines.append(self._make())
            return self._engines[1]
