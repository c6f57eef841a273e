"""``metrics.jsonl``: the events of a run, one JSON object a line, and reading them back.

Lines are strict JSON: a float that is not finite is written as the string "NaN", "Infinity" or
"-Infinity". Text is escaped to ASCII, so no character of a user's text can end a line early.
"""

import json
import math
import numbers
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import OutputError, UserError
from tunesmith.tracking.events import (
    CheckpointEvent,
    EpochEvent,
    EvalEvent,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    StepEvent,
)
from tunesmith.tracking.trouble import Trouble

_NAMES: dict[type, str] = {
    RunStarted: "run_started",
    Notice: "notice",
    StepEvent: "step",
    EvalEvent: "eval",
    EpochEvent: "epoch",
    CheckpointEvent: "checkpoint",
    RunFinished: "run_finished",
}
_NUMERIC_EVENTS = {"step", "eval", "epoch"}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: object) -> Any:
    """``value`` in terms of strict JSON: dataclasses and mappings as dicts, NaN as ``"NaN"``."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)  # a Path, an enum, a dtype


def event_object(event: Event) -> dict[str, Any] | None:
    """The JSON object of ``event``, its kind under "event" first; None where none is written."""
    name = _NAMES.get(type(event))
    return None if name is None else {"event": name, **plain(event)}


class JsonlSink:
    """Appends events to ``path``, each on disk (handed to the system) before ``emit`` returns.

    A last line torn by a kill is cut off when the file is opened, so a resumed run goes on cleanly.

    Raises:
        OutputError: ``path`` cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self._trouble = Trouble(str(path))
        self._torn = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise OutputError(str(path), error.strerror or str(error), "choose another output_dir") from error

    def emit(self, event: Event) -> None:
        record = event_object(event)
        if record is None or self._file.closed:
            return
        with self._trouble.caught():
            line = json.dumps(record, allow_nan=False).encode("ascii") + b"\n"
            if self._torn:  # a full disk stopped a write half way; begin a line of its own
                line = b"\n" + line
            self._torn = True
            if self._file.write(line) == len(line):
                self._torn = False
            else:
                self._trouble.warn("a line was written only in part (is the disk full?)")

    def close(self) -> None:
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():  # not there yet, or a pipe
        return
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)


def rewind(path: Path, step: int) -> None:
    """Cut ``path`` back to how it was after ``step``: what a killed run did beyond its checkpoint is done again.

    Raises:
        OutputError: the file cannot be written.
    """
    kept = 0
    try:
        if not path.is_file():
            return
        for line in path.read_bytes().splitlines(keepends=True):
            with suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "run_finished" or event.get("step", 0) > step:
                    break
            kept += len(line)
        with path.open("r+b") as file:
            file.truncate(kept)
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error), "check its owner") from error


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in ``path`` as dicts, in order; a torn last line is left out.

    "NaN" and "Infinity" in step, eval and epoch events come back as floats.

    Raises:
        UserError: the file cannot be read, or a line before the last is not an event.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(str(path), error.strerror or str(error), "name a run's metrics.jsonl") from error
    events = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "event" not in record:
                raise ValueError("not an event")
        except ValueError as error:
            if number == len(lines):
                break  # no newline after it: the process was killed while writing this line
            remedy = "the file was changed by something else; delete that line"
            raise UserError(f"{path} line {number}", "is not an event", remedy) from error
        events.append(_with_floats(record) if record["event"] in _NUMERIC_EVENTS else record)
    return events


def _with_floats(record: dict[str, Any]) -> dict[str, Any]:
    restored: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            restored[key] = _with_floats(value)
        else:
            restored[key] = _NON_FINITE.get(value, value) if isinstance(value, str) else value
    return restored
