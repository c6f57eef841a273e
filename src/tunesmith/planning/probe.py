"""A few real steps of a configuration on this machine, in a process and a folder that are gone afterwards.

``python -m tunesmith.planning.probe FOLDER`` is that process: it trains as ``FOLDER/settings.yaml`` says for as many
steps as a time allows, saves nothing, and leaves ``FOLDER/measured.json``. Standard input is a pipe that nobody writes
to: when it ends, whoever asked is gone, and so is the probe.
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tunesmith.checkpoints.atomic import write_json, write_text
from tunesmith.config.load import LoadedConfig, load_config
from tunesmith.config.yaml_file import dump_yaml
from tunesmith.errors import RunError, TunesmithError

_SETTINGS, _MEASURED, _FAULT = "settings.yaml", "measured.json", "fault.json"
_LEAST_STEPS, _MOST_STEPS, _SECONDS = 3, 40, 20.0


@dataclass(frozen=True)
class Measured:
    """What a probe found.

    Attributes:
        steps, real_tokens, seconds: of the steps that count; the first one, which also makes the buffers, does not.
        peak_bytes: highest resident memory of the process; ``predicted_bytes``: what it had planned, if it plans.
        cpu_seconds: of all threads in those steps.
        taken_by_others: share of this machine's processors that other processes had meanwhile.
    """

    steps: int
    real_tokens: int
    seconds: float
    peak_bytes: int
    predicted_bytes: int | None
    cpu_seconds: float
    taken_by_others: float

    @property
    def seconds_per_token(self) -> float:
        """Of training, for each real token."""
        return self.seconds / self.real_tokens


def probe(loaded: LoadedConfig, *, skip_bad_rows: bool) -> Measured:
    """Train a few steps as the configuration says, and forget the result.

    Raises:
        RunError: it could not be trained.
    """
    settings = loaded.resolved() | {"logger": None}
    with TemporaryDirectory(prefix="tunesmith-probe-") as name:
        folder = Path(name)
        write_text(folder / _SETTINGS, dump_yaml(settings | {"output_dir": str(folder / "outputs")}))
        command = [sys.executable, "-m", "tunesmith.planning.probe", name]
        if skip_bad_rows:
            command.append("--skip-bad-rows")
        # A session of its own: Ctrl-C ends it by the end of its standard input, once and without a traceback.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as child:  # fmt: skip
            try:
                assert child.stderr is not None
                said = child.stderr.read()  # not communicate, which would end its standard input
                child.wait()
            except BaseException:
                child.kill()
                raise
        if child.returncode or not (folder / _MEASURED).is_file():
            raise RunError(
                "--probe", _reason(folder, said, child.returncode), "plan without it, or mend that"
            )
        return Measured(**json.loads((folder / _MEASURED).read_text(encoding="utf-8")))


def _reason(folder: Path, said: bytes, code: int) -> str:
    if (folder / _FAULT).is_file():
        return f"the steps failed ({json.loads((folder / _FAULT).read_text(encoding='utf-8'))})"
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return f"the steps failed ({lines[-1][:200] if lines else f'exit code {code}'})"


def measure(folder: Path, *, skip_bad_rows: bool) -> None:
    """Train, and leave what was measured or why it could not be."""
    from tunesmith.assembly import assemble
    from tunesmith.run_steps import make_optimizer, steps_after
    from tunesmith.training.memory_errors import memory_errors

    try:
        loaded = load_config(str(folder / _SETTINGS), settled=True)
        with memory_errors():
            parts = assemble(loaded, skip_bad_rows=skip_bad_rows, say=lambda _text: None)
            settings = loaded.config.optimization
            optimizer = make_optimizer(parts, settings)
            begun, uses = time.perf_counter(), [ProcessorUse.now()]
            events = []
            for event in steps_after(parts, settings, optimizer, 0, begun):
                events.append(event)
                uses.append(ProcessorUse.now())
                spent = time.perf_counter() - begun
                if len(events) >= _MOST_STEPS or (len(events) > _LEAST_STEPS and spent > _SECONDS):
                    break
    except TunesmithError as error:
        write_json(folder / _FAULT, str(error))
        return
    counted = events[1:] or events
    before, after = uses[-1 - len(counted)], uses[-1]
    found = Measured(
        len(counted),
        sum(event.real_tokens for event in counted),
        sum(event.train_time_per_step for event in counted),
        max(event.peak_memory for event in events),
        parts.memory.peak_bytes if parts.memory else None,
        after.own - before.own,
        after.others_since(before),
    )
    write_json(folder / _MEASURED, asdict(found))


@dataclass(frozen=True)
class ProcessorUse:
    """Seconds, since some time in the past, of this process and of all; ``wall``: of each processor."""

    own: float
    every: float
    wall: float

    @classmethod
    def now(cls) -> "ProcessorUse":
        import psutil

        times = psutil.cpu_times()._asdict()
        # A guest's time is part of user's; waiting for a disk is idle.
        idle = ("idle", "iowait", "guest", "guest_nice")
        return cls(
            time.process_time(),
            sum(seconds for kind, seconds in times.items() if kind not in idle),
            time.perf_counter(),
        )

    def others_since(self, earlier: "ProcessorUse") -> float:
        """Share of all processors that other processes had; between 0 and 1."""
        there = (self.wall - earlier.wall) * (os.cpu_count() or 1)
        others = (self.every - earlier.every) - (self.own - earlier.own)
        return min(1.0, max(0.0, others / there)) if there > 0 else 0.0


def _end_with_parent() -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    measure(Path(sys.argv[1]), skip_bad_rows="--skip-bad-rows" in sys.argv[2:])
