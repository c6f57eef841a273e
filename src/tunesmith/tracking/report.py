"""The files a run leaves for people and programs: ``report.json``, ``report.md``, ``loss.png``."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tunesmith.errors import OutputError, UserError
from tunesmith.tracking.events import RunRecord
from tunesmith.tracking.jsonl import plain
from tunesmith.tracking.report_markdown import report_markdown


def write_report(run_dir: Path, record: RunRecord, events: Sequence[Mapping[str, Any]]) -> None:
    """Write the three report files into ``run_dir``, each whole or not at all.

    Args:
        run_dir: the run's folder, which exists.
        record: written to ``report.json`` under its own field names; NaN as the string "NaN".
        events: the run's events as ``read_events`` or ``event_object`` give them, for the picture.

    Raises:
        OutputError: a file cannot be written.
    """
    from tunesmith.tracking.loss_plot import loss_png  # matplotlib is slow to import

    data = json.dumps(plain(record), indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    _write_whole(run_dir / "report.json", data.encode("ascii"))
    _write_whole(run_dir / "report.md", report_markdown(record).encode("utf-8", "replace"))
    _write_whole(run_dir / "loss.png", loss_png(events, f"{record.tag} ({record.method})"))


def read_record(path: Path) -> RunRecord:
    """The record in ``path``, a ``report.json``; fields this version does not know are ignored.

    Raises:
        UserError: the file is missing, is not JSON, or lacks a field or has one of a wrong type.
    """
    remedy = "rerun the training, or leave this run out"
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), error.strerror or str(error), "name a run's report.json") from error
    except ValueError as error:
        raise UserError(str(path), f"is damaged: not JSON ({error})", remedy) from error
    try:
        return _adapter().validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise UserError(str(path), f"is damaged: {where}: {first['msg']}", remedy) from error


@cache
def _adapter() -> TypeAdapter[RunRecord]:
    return TypeAdapter(RunRecord)


def _write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` so that after a crash it holds the old bytes or the new, never a mixture."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself must survive a power cut
        finally:
            os.close(folder)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        fault = f"cannot be written ({error.strerror or error})"
        raise OutputError(str(path), fault, "free space or choose another output_dir") from error
