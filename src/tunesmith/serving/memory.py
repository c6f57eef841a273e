"""Which bases and adapters are in memory, within a limit: loaded when asked for, put out when others need the room.

Whoever wants a model holds it by a claim, which ends with the request. What is held is never put out; of the rest,
adapters go first and then whole bases, each the least recently used one first. Loading runs in threads of its own,
one base at a time as it takes all cores and most memory; everybody who wants the same model waits for one load.
"""

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Literal, Self

from tunesmith.checkpoints.manifest import fingerprint_weights
from tunesmith.errors import TunesmithError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.chat import Voice
from tunesmith.serving.metrics import Histogram
from tunesmith.serving.seam import AdapterKey, Engine, EngineError, EngineFacts, EngineLimits, UnknownAdapter

_LOG = logging.getLogger(__name__)
# What a model's own files can be at fault for; anything else may go better next time.
LOAD_FAULTS = (TunesmithError, EngineError, OSError, ValueError)
# What a machine may lack at one moment and have at the next; no model is at fault for it.
_LACKS = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.EDQUOT, errno.ESTALE,
    errno.ETIMEDOUT,
})  # fmt: skip
_ADAPTER_LOADS = 2

Kind = Literal["base", "adapter"]


@dataclass(frozen=True)
class Act:
    """What gives memory back; ``is_long``: it waits for a pass of an engine."""

    do: Callable[[], None]
    is_long: bool = False


class NoRoom(Exception):
    """Nothing can be put out to make room now. ``is_final``: nor ever, as the limit is too small."""

    def __init__(self, message: str, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class Gone(Exception):
    """The model is no longer what its name means."""


class Unloadable(EngineError):
    """Its files have been found to be no model of this server."""


class Closed(EngineError):
    """Nothing is loaded any more."""


@dataclass(frozen=True, eq=False)
class Version:
    """A loaded model as one request uses it; ``key`` None: the base itself."""

    name: str
    parent: str | None
    key: AdapterKey | None
    voice: Voice
    engine: Engine


@dataclass(eq=False)
class Resident:
    """What may be in memory: one content of files, under one name. All but the first two are ``Memory``'s."""

    name: str
    bytes: int
    ready: "Future[Version] | None" = field(default=None, init=False)  # None: not in memory, nor on its way
    uses: int = field(default=0, init=False)  # claims, and loads under way
    turn: int = field(default=0, init=False)  # of its last use, later ones are greater
    fault: str | None = field(default=None, init=False)  # why loading it again is of no use
    is_gone: bool = field(default=False, init=False)  # leaves memory with its last use

    @property
    def version(self) -> Version | None:
        """It as loaded, None while it is not."""
        ready = self.ready
        return ready.result() if ready is not None and ready.done() and not ready.exception() else None


@dataclass(eq=False)
class Base(Resident):
    """A base. ``is_given``: named on the command line, not found in the loading path."""

    folder: BaseFolder
    context_length: int
    recorded: str | None = None  # its fingerprint as its manifest has it
    is_given: bool = True

    @cached_property
    def fingerprint(self) -> str:
        """Of its weights; hashes them where no manifest lists them. CheckpointError where that fails."""
        return self.recorded or fingerprint_weights(self.folder.weight_files)[1]


@dataclass(eq=False)
class Adapter(Resident):
    """An adapter and the base it belongs to. A use of it is one of the base."""

    folder: Path
    base: Base


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory, for ``/metrics``."""

    name: str
    bytes: int
    facts: EngineFacts
    limits: EngineLimits


@dataclass(frozen=True)
class MemoryFacts:
    """What is in memory, and what has happened there since the start."""

    bases: tuple[LoadedBase, ...]
    bytes: int  # of bases and adapters together
    limit: int | None
    evictions: Counter[Kind]
    seconds: dict[Kind, Histogram]  # that loads took
    waited_for: tuple[str, ...]  # adapters that are being loaded


class Claim:
    """What one request holds; to be closed when it has ended, by whatever way. Also a context manager."""

    def __init__(self, memory: "Memory") -> None:
        self.memory = memory
        self.held: list[Resident] = []
        self.is_closed = False

    def hold(self, item: Resident) -> "Future[Version]":
        """As ``Memory.hold``."""
        return self.memory.hold(self, item)

    def close(self) -> None:
        """Let go of all; once is enough."""
        self.memory.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Memory:
    """Loads, holds and puts out models. Safe to use from any thread; no call waits for a load.

    Args:
        limit: most bytes of all models together, None: no limit. Counted by ``Resident.bytes``.
        open_base: loads a base and starts its engine.
        read_adapter: loads an adapter into its base's engine.
        report: told in one line why a model could not be loaded.
    """

    def __init__(
        self,
        limit: int | None,
        open_base: Callable[[Base], Version],
        read_adapter: Callable[[Adapter, Version], Version],
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.limit = limit
        self._open, self._read, self.report = open_base, read_adapter, report
        self._lock = threading.Lock()
        self._counted: set[Resident] = set()  # what takes memory, or has its room reserved
        self._loading: dict[Resident, Future[Version]] = {}
        self._turns = count(1)
        self._evictions: Counter[Kind] = Counter()
        self._seconds: dict[Kind, Histogram] = {"base": Histogram(), "adapter": Histogram()}
        self._base_loads = ThreadPoolExecutor(1, "load-base")
        self._adapter_loads = ThreadPoolExecutor(_ADAPTER_LOADS, "load-adapter")
        self._ends = ThreadPoolExecutor(1, "end-engine")
        self._is_closed = False

    def claim(self) -> Claim:
        """An empty claim."""
        return Claim(self)

    def hold(self, claim: Claim, item: Resident) -> "Future[Version]":
        """Keep ``item`` in memory until the claim ends; loads it if need be.

        Returns:
            It as loaded, once it is; or NoRoom, or what loading it raised.

        Raises:
            Gone: it, its base or the claim has come to its end.
            Unloadable: it has been tried.
        """
        with self._lock:
            chain = _chain(item)
            if claim.is_closed or self._is_closed or any(part.is_gone for part in chain):
                raise Gone
            if fault := next((part.fault for part in chain if part.fault), None):
                raise Unloadable(fault)
            self._use(item)
            claim.held.append(item)
            return self._wanted(item)

    def release(self, claim: Claim) -> None:
        """End a claim. An engine that ends by it does so in a thread of its own: this may be an event loop."""
        with self._acting(is_loop=True) as acts:
            claim.is_closed = True
            for item in claim.held:
                acts += self._let_go(item)
            claim.held.clear()

    def retire(self, item: Resident) -> None:
        """Its name means something else from now on, or nothing: it leaves memory when its last use has ended."""
        with self._acting() as acts:
            item.is_gone = True
            acts += self._leave_if_done(item)

    def lose(self, version: Version, item: Resident) -> None:
        """Its engine has put it out by itself."""
        with self._lock:
            if item.version is version:
                item.ready = None
                self._counted.discard(item)

    def has_room(self, item: Resident) -> bool:
        """Whether it could be loaded with nothing put out for it."""
        with self._lock:
            return self.limit is None or _bytes(self._counted) + item.bytes <= self.limit

    def is_loaded(self, item: Resident) -> bool:
        """Whether it is in memory and can answer at once."""
        with self._lock:
            return item.version is not None

    def facts(self) -> MemoryFacts:
        """Everything for ``/metrics``."""
        with self._lock:
            loaded = [
                (item, version.engine)
                for item in self._counted
                if isinstance(item, Base) and (version := item.version) is not None
            ]
            waited = {item.name for item in self._loading if isinstance(item, Adapter)}
            total, evictions = _bytes(self._counted), Counter(self._evictions)
        bases = [LoadedBase(base.name, base.bytes, engine.facts(), engine.limits) for base, engine in loaded]
        bases.sort(key=lambda base: base.name)
        return MemoryFacts(tuple(bases), total, self.limit, evictions, self._seconds, tuple(sorted(waited)))

    def close(self) -> None:
        """End every load and engine."""
        with self._lock:
            self._is_closed = True
        for pool in (self._base_loads, self._adapter_loads):
            pool.shutdown(cancel_futures=True)
        with self._lock:
            for ready in self._loading.values():
                if not ready.done():
                    ready.set_exception(Closed("the server is stopping"))
            engines = [v.engine for item in self._counted if isinstance(item, Base) and (v := item.version)]
            self._counted.clear()
        for engine in engines:
            _done(Act(engine.close))
        self._ends.shutdown()

    # Loading

    def _wanted(self, item: Resident) -> "Future[Version]":
        """Its future; under the lock, as all that have no word on it."""
        if item.ready is not None:
            return item.ready
        ready: Future[Version] = Future()
        ready.set_running_or_notify_cancel()  # so that no waiter can cancel it for the others
        item.ready = self._loading[item] = ready
        self._use(item)
        if isinstance(item, Adapter):
            base = self._wanted(item.base)
            base.add_done_callback(lambda base: self._start(self._adapter_loads, item, ready, base))
        else:
            self._start(self._base_loads, item, ready, None)
        return ready

    def _start(
        self,
        pool: ThreadPoolExecutor,
        item: Resident,
        ready: "Future[Version]",
        base: "Future[Version] | None",
    ) -> None:
        with suppress(RuntimeError):  # closed: ``close`` ends what has not begun
            pool.submit(self._load, item, ready, base)

    def _load(self, item: Resident, ready: "Future[Version]", base: "Future[Version] | None") -> None:
        """In a thread of a pool, without the lock."""
        try:
            version = self._loaded(item, base)
        except BaseException as error:
            if not isinstance(error, (*LOAD_FAULTS, NoRoom)):
                _LOG.exception("loading failed")
            with self._acting() as acts:
                item.ready = None
                self._counted.discard(item)
                if isinstance(error, LOAD_FAULTS) and not (base is not None and base.exception()):
                    fault, when = str(error), " now" if is_passing(error) else ""
                    item.fault = None if when else fault
                    acts.append(
                        Act(lambda: self.report(f"model {item.name} cannot be loaded{when}: {fault}"))
                    )
                ready.set_exception(error)
                acts += self._loading_done(item)
        else:
            # Both at once: whoever has the result finds the load's own use gone.
            with self._acting() as acts:
                ready.set_result(version)
                acts += self._loading_done(item)

    def _loaded(self, item: Resident, base: "Future[Version] | None") -> Version:
        opened = base.result() if base is not None else None
        with self._acting() as acts:
            acts += self._make_room(item)
            self._counted.add(item)
        began = time.monotonic()
        if isinstance(item, Adapter):
            assert opened is not None
            version = self._read(item, opened)
        else:
            assert isinstance(item, Base)
            version = self._open(item)
        with self._lock:
            self._seconds[_kind(item)].add(time.monotonic() - began)
        return version

    def _loading_done(self, item: Resident) -> list[Act]:
        self._loading.pop(item, None)
        return self._let_go(item)

    # Room

    def _make_room(self, item: Resident) -> list[Act]:
        """What is to be done so that ``item`` has its room; NoRoom, with nothing put out, where it cannot have it."""
        if self.limit is None:
            return []
        busy = _bytes(other for other in self._counted if other.uses)
        if busy + item.bytes > self.limit:
            least = item.bytes + (item.base.bytes if isinstance(item, Adapter) else 0)
            raise NoRoom(_no_room(item, least, self.limit), least > self.limit)
        acts: list[Act] = []
        while _bytes(self._counted) + item.bytes > self.limit:
            idle = [other for other in self._counted if not other.uses]
            victim = min(idle, key=lambda other: (isinstance(other, Base), other.turn))
            self._evictions[_kind(victim)] += 1
            acts += self._put_out(victim)
        return acts

    def _put_out(self, item: Resident) -> list[Act]:
        """Strike ``item`` off; what gives its memory back is left to be done without the lock."""
        version = item.version
        item.ready = None
        self._counted.discard(item)
        if version is None:
            return []
        if isinstance(item, Base):
            for other in [o for o in self._counted if isinstance(o, Adapter) and o.base is item]:
                other.ready = None
                self._counted.discard(other)
            return [Act(version.engine.close, is_long=True)]
        return [Act(lambda: self._unload(version))]

    def _unload(self, version: Version) -> None:
        assert version.key is not None
        try:
            version.engine.unload(version.key)
        except UnknownAdapter:  # the engine has put it out of memory itself
            self.report(f"model {version.name} was no longer in memory")

    # Uses

    def _use(self, item: Resident) -> None:
        for part in _chain(item):
            part.uses += 1
            part.turn = next(self._turns)

    def _let_go(self, item: Resident) -> list[Act]:
        acts: list[Act] = []
        for part in _chain(item):
            part.uses -= 1
            acts += self._leave_if_done(part)
        return acts

    def _leave_if_done(self, item: Resident) -> list[Act]:
        return self._put_out(item) if item.is_gone and not item.uses else []

    @contextmanager
    def _acting(self, *, is_loop: bool = False) -> Iterator[list[Act]]:
        """Holds the lock; what is added to the list is done after it, the long ones elsewhere if ``is_loop``."""
        acts: list[Act] = []
        with self._lock:
            yield acts
        for act in acts:
            if is_loop and act.is_long:
                with suppress(RuntimeError):  # closed, and so is every engine
                    self._ends.submit(_done, act)
            else:
                _done(act)


def is_passing(error: BaseException) -> bool:
    """Whether loading the same files may go better next time, as the machine lacked something."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return False
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno in _LACKS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _done(act: Act) -> None:
    """An engine that fails at it is no fault of whoever needs the room, and keeps nobody from theirs."""
    try:
        act.do()
    except Exception:
        _LOG.exception("memory could not be given back")


def _chain(item: Resident) -> Sequence[Resident]:
    return (item, item.base) if isinstance(item, Adapter) else (item,)


def _kind(item: Resident) -> Kind:
    return "base" if isinstance(item, Base) else "adapter"


def _bytes(items: Iterable[Resident]) -> int:
    """Memory of all together; adapters of equal content on one base share theirs."""
    total, shared = 0, set()
    for item in items:
        version = item.version
        if isinstance(item, Adapter) and version is not None:
            mark = (item.base, version.key)
            if mark in shared:
                continue
            shared.add(mark)
        total += item.bytes
    return total


def _no_room(item: Resident, least: int, limit: int) -> str:
    if least > limit:
        return (
            f"{item.name} needs {size(least)} of memory, {size(limit)} are the most that models may have here"
        )
    busy = f"the {size(limit)} that models may have are taken by models that are answering"
    return f"{item.name} needs {size(item.bytes)} of memory, and {busy}"


def size(number: int) -> str:
    """Bytes for people: ``1.3 GB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} bytes"
