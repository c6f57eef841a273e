"""``metrics.jsonl``: the events of a run, one JSON object a line, and reading them back.

Lines are strict JSON: a float that is not finite is written as the string "NaN", "Infinity" or
"-Infinity". Text is escaped to ASCII, so no character of a user's text can end a line early.
"""

import json
import math
import numbers
import os
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

    A last line torn by a kill is cut off when the file is opened, so a resumed run goes on cleanly. A line that a full
    disk did not take is cut off at once and written again with the next one.

    Raises:
        OutputError: ``path`` cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self._trouble = Trouble(str(path))
        self._waiting = b""  # lines that could not be written yet
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
            self._waiting += json.dumps(record, allow_nan=False).encode("ascii") + b"\n"
            self._write()

    def close(self) -> None:
        if not self._file.closed:
            with self._trouble.caught():
                self._write()
            self._file.close()

    def _write(self) -> None:
        if not self._waiting:
            return
        length = os.fstat(self._file.fileno()).st_size
        written = self._file.write(self._waiting)
        if written == len(self._waiting):
            self._waiting = b""
            return
        with suppress(OSError):  # not a plain file: what has gone out is gone
            self._file.truncate(length)
        self._trouble.warn("a line could not be written whole (is the disk full?); it is tried again")


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
        UserError: a line is not an event: known before the steps are done, not after.
    """
    kept = 0
    try:
        if not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                event = _parsed(line)
            except ValueError as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    break  # torn by a kill
                raise _no_event(path, number) from error
            if event["event"] == "run_finished" or event.get("step", 0) > step:
                break
            kept += len(line)
        with path.open("r+b") as file:
            file.truncate(kept)
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error), "check its owner") from error


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in ``path`` as dicts, in order; a torn last line is left out.

    "NaN" and "Infinity" in step, eval and epoch events come back as floats. Those of steps have a
    number and a loss.

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
            events.append(_parsed(line))
        except ValueError as error:
            if number == len(lines):
                break  # no newline after it: the process was killed while writing this line
            raise _no_event(path, number) from error
    return events


def _parsed(line: bytes) -> dict[str, Any]:
    """The event of a line. Raises ValueError where it is none."""
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    if not isinstance(kind := record.get("event"), str):
        raise ValueError("not an event")
    if kind in _NUMERIC_EVENTS:
        record = _with_floats(record)
        if type(record.get("step")) is not int:
            raise ValueError("of no step")
        if kind == "step" and not isinstance(record.get("train_loss_batch"), int | float):
            raise ValueError("without a loss")
    elif type(record.get("step", 0)) is not int:
        raise ValueError("of no step")
    return record


def _no_event(path: Path, number: int) -> UserError:
    remedy = "the file was changed by something else; delete that line"
    return UserError(f"{path} line {number}", "is not an event", remedy)


def _with_floats(record: dict[str, Any]) -> dict[str, Any]:
    restored: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            restored[key] = _with_floats(value)
        else:
            restored[key] = _NON_FINITE.get(value, value) if isinstance(value, str) else value
    return restored
