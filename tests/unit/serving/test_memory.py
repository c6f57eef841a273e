"""What is in memory: counted bytes, who makes room for whom, and that nothing in use ever does."""

import errno
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_parts import wait_for
from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.memory import (
    Adapter,
    Base,
    Claim,
    Closed,
    Gone,
    Memory,
    NoRoom,
    Resident,
    Unloadable,
    Version,
    size,
)
from tunesmith.serving.seam import AdapterKey, EngineError

VOICE: Any = None


@dataclass(eq=False)
class Engine:
    """Counts what is loaded into it; ``fault`` is what it raises instead of giving memory back."""

    loads: list[str] = field(default_factory=list)
    is_closed: bool = False
    fault: Exception | None = None
    is_idle: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.is_idle.set()

    def unload(self, key: AdapterKey) -> None:
        if self.fault is not None:
            raise self.fault
        self.loads.remove(key)

    def close(self) -> None:
        assert self.is_idle.wait(10)
        self.is_closed = True
        if self.fault is not None:
            raise self.fault


@dataclass
class Loader:
    """Loads at once, or when ``gate`` is set; ``begun`` tells in which order."""

    gate: threading.Event = field(default_factory=threading.Event)
    begun: list[str] = field(default_factory=list)
    engines: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, Exception] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def open(self, base: Base) -> Version:
        self._wait(base)
        self.engines[base.name] = engine = Engine()
        return Version(base.name, None, None, VOICE, engine)  # type: ignore[arg-type]

    def read(self, adapter: Adapter, on: Version) -> Version:
        self._wait(adapter)
        key = AdapterKey(self.keys.get(adapter.name, adapter.name))
        on.engine.loads.append(key)  # type: ignore[attr-defined]
        return Version(adapter.name, on.name, key, VOICE, on.engine)

    def _wait(self, item: Resident) -> None:
        self.begun.append(item.name)
        assert self.gate.wait(10)
        if fault := self.faults.pop(item.name, None):
            raise fault


@pytest.fixture
def loader() -> Loader:
    found = Loader()
    found.gate.set()
    return found


@pytest.fixture
def make(loader: Loader) -> Iterator[Callable[[int | None], Memory]]:
    made = []

    def make_memory(limit: int | None) -> Memory:
        made.append(Memory(limit, loader.open, loader.read))
        return made[-1]

    yield make_memory
    loader.gate.set()
    for memory in made:
        memory.close()


def base(name: str, bytes_: int = 100) -> Base:
    return Base(name, bytes_, BaseFolder(name, Path(name), None), 256)


def adapter(name: str, on: Base, bytes_: int = 10) -> Adapter:
    return Adapter(name, bytes_, Path(name), on)


def use(memory: Memory, item: Resident) -> Version:
    with memory.claim() as claim:
        return claim.hold(item).result(10)


def loaded(memory: Memory, *items: Resident) -> str:
    return "".join(item.name for item in items if memory.is_loaded(item))


def test_what_is_loaded_stays_and_is_counted(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a = make(1_000), base("A")
    x = adapter("x", a)
    first = use(memory, x)
    assert use(memory, x) is first
    assert use(memory, a).engine is first.engine
    assert loader.begun == ["A", "x"]
    assert {item.name for item in memory._counted} == {"A", "x"}
    assert memory.has_room(base("B", 890))
    assert not memory.has_room(base("B", 891))


def test_the_least_recently_used_adapter_goes_first_and_no_base(make: Callable[..., Memory]) -> None:
    memory, a = make(130), base("A")
    x, y, z, w = (adapter(name, a) for name in "xyzw")
    for item in (x, y, z, x, w):  # y is the one that was not used for longest
        use(memory, item)
    assert loaded(memory, a, x, y, z, w) == "Axzw"
    assert sorted(a.version.engine.loads) == ["w", "x", "z"]  # type: ignore[union-attr]


def test_adapters_go_before_bases_and_bases_in_their_order(
    make: Callable[..., Memory], loader: Loader
) -> None:
    memory, a, b, c = make(230), base("A"), base("B"), base("C")
    x, y = adapter("x", a), adapter("y", b)
    for item in (y, x, b):  # A and its x are older than B, y is the oldest of all
        use(memory, item)
    use(memory, adapter("z", b, 30))  # takes what x and y have
    assert loaded(memory, a, b, x, y) == "AB"
    use(memory, c)
    assert loaded(memory, a, b, c) == "BC"
    assert loader.engines["A"].is_closed
    assert memory._evictions == {"adapter": 3, "base": 1}
    assert use(memory, x).engine is loader.engines["A"]  # loaded anew, with its base
    assert loader.begun == ["B", "y", "A", "x", "z", "C", "A", "x"]


def test_an_evicted_base_leaves_nothing_behind(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a = make(110), base("A")
    use(memory, adapter("x", a))
    engine = weakref.ref(loader.engines.pop("A"))
    use(memory, base("B"))
    gc.collect()
    assert engine() is None


def test_what_is_held_is_never_put_out(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a, b = make(115), base("A"), base("B")
    x = adapter("x", a)
    with memory.claim() as claim:
        claim.hold(x).result(10)
        with pytest.raises(NoRoom, match=r"B needs 100 bytes of memory, .* that are answering") as full:
            use(memory, b)
        assert not full.value.is_final
        with pytest.raises(NoRoom):
            use(memory, adapter("y", a))
        assert loaded(memory, a, x) == "Ax"
        assert memory._evictions == {}
    use(memory, b)
    assert loaded(memory, a, b, x) == "B"


def test_nothing_is_put_out_in_vain(make: Callable[..., Memory]) -> None:
    memory, a, b = make(220), base("A"), base("B")
    x = adapter("x", b)
    use(memory, x)
    with memory.claim() as claim:
        claim.hold(a)
        with pytest.raises(NoRoom):
            use(memory, base("C", 150))
        assert loaded(memory, a, b, x) == "ABx"


def test_what_can_never_fit_is_told_apart(make: Callable[..., Memory]) -> None:
    with pytest.raises(NoRoom, match=r"A needs 2\.0 GB of memory, 1\.5 GB are the most") as never:
        use(make(1_500_000_000), base("A", 2_000_000_000))
    assert never.value.is_final
    with pytest.raises(NoRoom) as never:
        use(make(105), adapter("x", base("B")))
    assert never.value.is_final


def test_adapters_of_equal_content_are_counted_once(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a = make(120), base("A")
    x, y, z = (adapter(name, a) for name in "xyz")
    loader.keys = {"x": "same", "y": "same"}
    for item in (x, y):
        use(memory, item)
    assert not memory.has_room(adapter("w", a, 11))
    use(memory, z)
    assert loaded(memory, x, y, z) == "xyz"
    use(memory, adapter("w", a))  # both of the same content have to go for it
    assert loaded(memory, x, y, z) == "z"
    assert loader.engines["A"].loads == ["z", "w"]


def test_many_that_want_one_model_load_it_once(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a = make(None), base("A")
    x = adapter("x", a)
    loader.gate.clear()
    claims = [memory.claim() for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        waiting = list(pool.map(lambda claim: claim.hold(x), claims))
    assert len(set(waiting)) == 1
    assert not waiting[0].done()
    loader.gate.set()
    assert waiting[0].result(10).key == "x"
    assert loader.begun == ["A", "x"]
    assert (x.uses, a.uses) == (16, 16)
    for claim in claims:
        claim.close()
    assert (x.uses, a.uses) == (0, 0)


def test_others_go_on_while_a_model_is_loaded(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a, b = make(None), base("A"), base("B")
    x, y = adapter("x", a), adapter("y", a)
    use(memory, x)
    loader.gate.clear()
    with memory.claim() as claim:
        slow = claim.hold(b)
        wait_for(lambda: "B" in loader.begun)
        assert use(memory, x).key == "x"
        loader_of_y = memory.claim()
        waiting = loader_of_y.hold(y)  # an adapter of a loaded base does not queue behind another base
        wait_for(lambda: "y" in loader.begun)
        assert not slow.done()
        loader.gate.set()
        assert waiting.result(10).key == "y"
        assert slow.result(10).name == "B"
        loader_of_y.close()


def test_a_load_whose_waiter_has_left_is_finished_and_kept(
    make: Callable[..., Memory], loader: Loader
) -> None:
    memory, a = make(None), base("A")
    loader.gate.clear()
    claim = memory.claim()
    waiting = claim.hold(a)
    claim.close()
    assert a.uses == 1  # the load's own
    with pytest.raises(Gone):
        claim.hold(a)
    assert not waiting.cancel()
    loader.gate.set()
    waiting.result(10)
    wait_for(lambda: a.uses == 0)
    assert loaded(memory, a) == "A"


def test_a_model_at_fault_is_tried_once_and_others_are_not_blamed(
    make: Callable[..., Memory], loader: Loader
) -> None:
    memory, a, b = make(None), base("A"), base("B")
    memory.report = (said := []).append
    x, y, z = adapter("x", a), adapter("y", a), adapter("z", b)
    loader.faults = {"x": ModelError("x", "is damaged", "mend it"), "B": ModelError("B", "is strange")}
    with pytest.raises(ModelError):
        use(memory, x)
    with pytest.raises(Unloadable, match="x: is damaged; mend it"):
        use(memory, x)
    assert use(memory, y).key == "y"
    with pytest.raises(ModelError, match="B: is strange"):
        use(memory, z)
    with pytest.raises(Unloadable, match="B: is strange"):
        use(memory, z)
    assert z.fault is None
    assert said == [
        "model x cannot be loaded: x: is damaged; mend it",
        "model B cannot be loaded: B: is strange",
    ]
    assert (x.uses, a.uses, z.uses, b.uses) == (0, 0, 0, 0)
    assert {item.name for item in memory._counted} == {"A", "y"}


def test_a_fault_of_the_machine_is_not_the_models(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a = make(None), base("A")
    loader.faults = {"A": MemoryError()}
    with pytest.raises(MemoryError):
        use(memory, a)
    assert use(memory, a).name == "A"


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), ModelError("A", "cannot be read")]
)
def test_what_the_machine_lacks_for_a_moment_is_no_fault_of_a_model(
    make: Callable[..., Memory], loader: Loader, error: Exception
) -> None:
    if isinstance(error, ModelError):  # as readers of files say it
        error.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    memory, a = make(None), base("A")
    memory.report = (said := []).append
    loader.faults = {"A": error}
    with pytest.raises(type(error)):
        use(memory, a)
    assert len(said) == 1
    assert use(memory, a).name == "A"


@pytest.mark.parametrize("other", ["adapter", "base"])
def test_an_engine_that_fails_to_give_memory_back_is_no_fault_of_who_needs_it(
    make: Callable[..., Memory], loader: Loader, other: str
) -> None:
    memory, a, b = make(115), base("A"), base("B")
    x, y = adapter("x", a), adapter("y", a)
    use(memory, x)
    loader.engines["A"].fault = EngineError("it is gone")
    assert use(memory, y if other == "adapter" else b).name in ("y", "B")
    assert (y.fault, b.fault) == (None, None)
    assert loaded(memory, x) == ""


def test_the_end_of_a_request_does_not_wait_for_the_end_of_an_engine(
    make: Callable[..., Memory], loader: Loader
) -> None:
    memory, a = make(None), base("A")
    claim = memory.claim()
    claim.hold(a).result(10)
    memory.retire(a)
    engine = loader.engines["A"]
    engine.is_idle.clear()
    claim.close()  # in a server this is the event loop, with everybody's streams
    assert not engine.is_closed
    engine.is_idle.set()
    memory.close()  # which waits for it
    assert engine.is_closed


def test_what_is_retired_leaves_with_its_last_use(make: Callable[..., Memory], loader: Loader) -> None:
    memory, a = make(None), base("A")
    x, y = adapter("x", a), adapter("y", a)
    use(memory, y)
    claims = [memory.claim(), memory.claim()]
    for claim in claims:
        claim.hold(x).result(10)
    memory.retire(x)
    memory.retire(y)
    assert loader.engines["A"].loads == ["x"]
    with pytest.raises(Gone):
        use(memory, x)
    claims[0].close()
    assert loader.engines["A"].loads == ["x"]
    claims[1].close()
    claims[1].close()
    assert loader.engines["A"].loads == []
    memory.retire(a)
    assert loader.engines["A"].is_closed
    with pytest.raises(Gone):
        use(memory, adapter("z", a))


def test_a_closed_memory_ends_those_that_wait(loader: Loader) -> None:
    memory, a, b = Memory(None, loader.open, loader.read), base("A"), base("B")
    loader.gate.clear()
    claim = memory.claim()
    first, second = claim.hold(a), claim.hold(b)
    wait_for(lambda: loader.begun)
    closing = threading.Thread(target=memory.close)
    closing.start()
    wait_for(lambda: memory._is_closed)
    loader.gate.set()
    closing.join(10)
    assert first.result(0).name == "A"
    assert loader.engines["A"].is_closed
    assert isinstance(second.exception(0), Closed)
    with pytest.raises(Gone):
        memory.claim().hold(a)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_is_asked_for_the_limit_holds_and_nothing_held_goes(data: st.DataObject) -> None:
    loader = Loader()
    loader.gate.set()
    limit = data.draw(st.integers(100, 330))
    memory = Memory(limit, loader.open, loader.read)
    bases = [base(name, data.draw(st.integers(50, 120))) for name in "ABC"]
    adapters = [adapter(f"{on.name}{n}", on, data.draw(st.integers(1, 40))) for on in bases for n in range(3)]
    held: list[tuple[Claim, Resident, Version]] = []
    try:
        for item in data.draw(st.lists(st.sampled_from([*bases, *adapters]), max_size=25)):
            claim = memory.claim()
            try:
                version = claim.hold(item).result(10)
            except NoRoom:
                claim.close()
            else:
                held.append((claim, item, version))
            for _ in range(data.draw(st.integers(0, 2))):
                if held:
                    held.pop(data.draw(st.integers(0, len(held) - 1)))[0].close()
            assert sum(part.bytes for part in memory._counted) <= limit
            for _, kept, as_it_was in held:
                assert kept.version is as_it_was
                assert not as_it_was.engine.is_closed  # type: ignore[attr-defined]
        for claim, _, _ in held:
            claim.close()
        wait_for(lambda: all(part.uses == 0 for part in [*bases, *adapters]))
        engines = [b.version.engine for b in bases if b.version]
        inside = sorted(part.name for part in adapters if part.version)
        assert sorted(key for engine in engines for key in engine.loads) == inside  # type: ignore[attr-defined]
    finally:
        memory.close()


def test_a_race_of_threads_leaves_no_use_and_no_byte_too_many(loader: Loader) -> None:
    memory = Memory(240, loader.open, loader.read)
    bases = [base(name) for name in "ABC"]
    items = [*bases, *(adapter(f"{on.name}{n}", on) for on in bases for n in range(4))]
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(60):
            item = items[(seed * 7 + step * 5) % len(items)]
            with memory.claim() as claim:
                try:
                    version = claim.hold(item).result(10)
                except NoRoom:
                    continue
                if version.name != item.name or version.engine.is_closed:  # type: ignore[attr-defined]
                    wrong.append(item.name)

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, seed) for seed in range(6)]:
            future.result(30)
    wait_for(lambda: not any(item.uses for item in items))
    assert wrong == []
    assert sum(item.bytes for item in memory._counted) <= 240
    memory.close()
    assert all(engine.is_closed for engine in loader.engines.values())


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1_000, "1.0 kB"), (2_540_000_000, "2.5 GB")]
)
def test_sizes_for_people(number: int, text: str) -> None:
    assert size(number) == text
