"""What an arm costs to serve, and what it has forgotten; each measured in a process of its own.

``python -m tunesmith.comparison.measure ORDER.json`` does one order. Serving goes through the engine of ``tunesmith
serve``, in process and without HTTP: one request at a time, greedy, so that the numbers are those of a single user.
"""

import functools
import hashlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tunesmith.checkpoints.atomic import write_json
from tunesmith.comparison.record import Forgetting, Serving
from tunesmith.errors import Interrupted, TunesmithError
from tunesmith.training.stop import terminate_as_interrupt

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from tunesmith.models.base import BaseFolder
    from tunesmith.serving.engine import CpuEngine
    from tunesmith.serving.seam import AdapterKey

SERVING, FORGETTING = "serving.json", "forgetting.json"
_TOKENS = 32
_REPEATS = 3
_PROMPT = 16  # tokens


@dataclass(frozen=True)
class ServingOrder:
    """Measure how ``checkpoint`` serves; ``base`` is what its adapter belongs on."""

    checkpoint: str
    base: str
    output: str


@dataclass(frozen=True)
class ForgettingOrder:
    """Measure base and checkpoints on general text.

    Attributes:
        base: name or folder of the untuned weights.
        runs: (run folder, arm, seed) of each.
        files: the user's texts, beside the shipped ones.
    """

    base: str
    runs: tuple[tuple[str, str, int], ...]
    files: tuple[str, ...]


def measure_serving(checkpoint: Path, base: str) -> Serving:
    """Load, swap and answer with one checkpoint.

    Raises:
        TunesmithError: the engine does not serve this kind of model.
    """
    from tunesmith.models.base import BaseFolder, find_base
    from tunesmith.serving.engine import CpuEngine, EngineSettings

    settings = EngineSettings(running=1, context_length=_PROMPT + _TOKENS + 8, prefix_tokens=0)

    def load(folder: BaseFolder) -> "tuple[CpuEngine, float]":
        begun = time.perf_counter()
        engine = CpuEngine(folder, settings)
        return engine, time.perf_counter() - begun

    if not (checkpoint / "adapter_config.json").is_file():
        engine, load_seconds = load(BaseFolder(str(checkpoint), checkpoint, None))
        speed = _speed(engine, None)
        engine.close()
        weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        return Serving(load_seconds, load_seconds, weights, speed, None)
    found = find_base(base)
    engine, base_seconds = load(found)
    begun = time.perf_counter()
    key = engine.load(checkpoint)
    swap_seconds = time.perf_counter() - begun
    adapter_bytes, unmerged = engine.facts().adapter_bytes, _speed(engine, key)
    engine.close()
    del engine
    merged = _merged_speed(checkpoint, base, lambda folder: load(folder)[0])
    return Serving(base_seconds + swap_seconds, swap_seconds, adapter_bytes, merged, unmerged)


def _merged_speed(checkpoint: Path, base: str, load: "Callable[[BaseFolder], CpuEngine]") -> float:
    from tunesmith.models.base import BaseFolder
    from tunesmith.models.lora import merge
    from tunesmith.models.merging import save_merged
    from tunesmith.models.servable import load_servable

    servable = load_servable(str(checkpoint), [], base=base, precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        save_merged(merge(servable.model), servable.tokenizer, None, Path(folder))
        del servable
        engine = load(BaseFolder(folder, Path(folder), None))
        speed = _speed(engine, None)
        engine.close()
    return speed


def _speed(engine: "CpuEngine", adapter: "AdapterKey | None") -> float:
    """Generated tokens a second, median of three answers after one to warm up; reading the prompt is not counted."""
    from tunesmith.serving.seam import EngineError, Sampling, Token

    def answer() -> float:
        times: list[float] = []
        done = threading.Event()
        faults: list[EngineError] = []

        def deliver(what: Token | EngineError) -> None:
            times.append(time.perf_counter())
            if isinstance(what, EngineError):
                faults.append(what)
            if isinstance(what, EngineError) or what.finish is not None:
                done.set()

        prompt = [3 + i % 7 for i in range(_PROMPT)]
        engine.submit(prompt, adapter, Sampling(_TOKENS, temperature=0.0), deliver)
        done.wait()
        if faults:
            raise TunesmithError("serving", str(faults[0]))
        return (len(times) - 1) / (times[-1] - times[0])

    answer()
    return median(answer() for _ in range(_REPEATS))


def forgetting_key(files: Sequence[str]) -> str:
    """Digest of what would be measured on, so that a saved measurement of other texts is not taken for it."""
    from tunesmith.comparison.forgetting import GENERAL_CHOICE, GENERAL_TEXT
    from tunesmith.data.sources import file_digest

    digests = [(file, file_digest(file)) for file in (*map(str, (GENERAL_TEXT, GENERAL_CHOICE)), *files)]
    # Names of the shipped files depend on where this package is installed.
    return hashlib.sha256(json.dumps([(Path(f).name, d) for f, d in digests]).encode()).hexdigest()


def read_forgetting(run: Path, files: Sequence[str]) -> tuple[Forgetting, ...] | None:
    """What was measured of a run on these very texts, if it was."""
    try:
        data = json.loads((run / FORGETTING).read_bytes())
        if data["key"] != forgetting_key(files):
            return None
        return _adapter().validate_json(json.dumps(data["entries"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_serving(run: Path) -> Serving | None:
    """What was measured of a run, if it was."""
    try:
        return _serving_adapter().validate_json((run / SERVING).read_bytes())
    except (OSError, ValueError):
        return None


@functools.cache
def _serving_adapter() -> "TypeAdapter[Serving]":
    from pydantic import TypeAdapter

    return TypeAdapter(Serving)


@functools.cache
def _adapter() -> "TypeAdapter[tuple[Forgetting, ...]]":
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[Forgetting, ...])


def carry_out(kind: str, order: Mapping[str, Any]) -> None:
    """One order, its results written beside what it measured.

    A checkpoint that cannot be measured keeps none of the others from it.

    Raises:
        TunesmithError: any of its kinds; of several checkpoints the first.
    """
    if kind == "serving":
        write_json(Path(order["output"]), measure_serving(Path(order["checkpoint"]), order["base"]))
        return
    from tunesmith.comparison.forgetting import measure_forgetting, measure_general

    files = list(order["files"])
    before = measure_general(order["base"], files=files)
    key = forgetting_key(files)
    faults: list[TunesmithError] = []
    for run, arm, seed in order["runs"]:
        try:
            found = measure_forgetting(str(Path(run) / "best"), before, arm=arm, seed=seed, files=files)
        except TunesmithError as error:
            faults.append(error)
            continue
        write_json(Path(run) / FORGETTING, {"key": key, "entries": [asdict(entry) for entry in found]})
    if faults:
        raise faults[0]


if __name__ == "__main__":
    from tunesmith.comparison.child import stop_when_alone

    stop_when_alone()
    _order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        # As an exception, so that temporary folders, which hold whole models, are removed.
        with terminate_as_interrupt():
            carry_out(_order["kind"], _order["order"])
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except TunesmithError as _error:
        write_json(Path(sys.argv[1]).with_suffix(".fault"), {"message": str(_error)})
        sys.exit(_error.exit_code)
