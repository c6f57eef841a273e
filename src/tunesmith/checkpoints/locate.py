"""From what a user calls a model to its folder, and the list of what has been trained."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.checkpoints.atomic import is_temporary
from tunesmith.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_sizes
from tunesmith.checkpoints.store import BEST, CHECKPOINTS, newest_checkpoint, read_checkpoints
from tunesmith.errors import CheckpointError, ModelError

REPORT_NAME = "report.json"
_RUN_MARKS = ("config.yaml", "metrics.jsonl", REPORT_NAME, CHECKPOINTS, BEST)
_MODEL_MARKS = ("adapter_config.json", "config.json")


@dataclass(frozen=True)
class RunListing:
    """One trained or unfinished run; a fact that the run's files do not tell is None."""

    tag: str | None
    model_id: str | None
    method: str | None  # "lora" or "full"
    best_loss: float | None  # nats per token, of the best checkpoint
    bytes: int | None  # of the best checkpoint
    path: Path
    status: str  # the report's "finished", "interrupted" or "failed"; else "unfinished" or "damaged"
    created: str  # ISO 8601, UTC


def locate_model(reference: str, output_dirs: Sequence[Path]) -> Path | None:
    """The folder of the trained model that ``reference`` means, or None: then it is a base model's id.

    ``reference`` may be a checkpoint folder, a run folder (its ``best/``, else its newest checkpoint),
    or the name or tag of a run in one of ``output_dirs``. Contents are not verified.

    Raises:
        ModelError: several runs are meant, or the run has no checkpoint yet.
    """
    folder = _as_folder(reference)
    if folder is not None and _is_model(folder):
        return folder
    if folder is not None and _is_run(folder):
        return _model_of_run(folder)
    named = [run for run in _runs(output_dirs) if reference == run.name or reference in _tags(run)]
    if not named:
        return None
    models = {run: model for run in named if (model := _find_model(run)) is not None}
    if len(models) > 1:
        places = ", ".join(str(run) for run in models)
        raise ModelError(reference, f"means {len(models)} runs: {places}", "give the folder of one instead")
    # A run that failed before its first checkpoint does not make a later one of the same tag ambiguous.
    return next(iter(models.values()), None) or _model_of_run(named[0])


def run_status(folder: Path) -> str | None:
    """The status in the run's report: "finished", "interrupted" or "failed"; None where there is no readable one."""
    with suppress(OSError, ValueError, RecursionError):
        return _text(_report(folder), "status")
    return None


def list_runs(output_dirs: Sequence[Path]) -> list[RunListing]:
    """Every run in ``output_dirs``, newest first; damaged ones are listed with that status."""
    listings = [_listing(run) for run in _runs(output_dirs)]
    return sorted(
        listings, key=lambda item: (datetime.fromisoformat(item.created), str(item.path)), reverse=True
    )


def _as_folder(reference: str) -> Path | None:
    try:
        path = Path(reference).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # no possible path, such as a very long id or "~nobody"
        return None


def _is_model(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MODEL_MARKS)


def _is_run(folder: Path) -> bool:
    try:
        return any((folder / mark).exists() for mark in _RUN_MARKS)
    except PermissionError:
        return True  # what may not be looked into is shown as damaged rather than hidden


def _runs(output_dirs: Sequence[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for output_dir in output_dirs:
        entries: list[Path] = []
        with suppress(OSError):  # one that does not exist or cannot be read has no runs to offer
            entries = sorted(output_dir.iterdir())
        for run in entries:
            with suppress(OSError):  # an entry that cannot be looked at hides no other
                if run.is_dir() and not is_temporary(run) and run.resolve() not in seen and _is_run(run):
                    seen.add(run.resolve())
                    yield run


def _find_model(run: Path) -> Path | None:
    try:
        if _is_model(run / BEST):
            return run / BEST
        last = newest_checkpoint(run)
    except PermissionError as error:
        raise ModelError(str(run), "this run cannot be read", "give yourself read access to it") from error
    return last if last is not None and _is_model(last) else None


def _model_of_run(run: Path) -> Path:
    model = _find_model(run)
    if model is None:
        raise ModelError(
            str(run), "this run has no checkpoint yet", "wait for its first one, or train it again"
        )
    return model


def _tags(run: Path) -> set[str]:
    tags: set[str | None] = set()
    with suppress(OSError, ValueError, RecursionError):
        tags.add(_text(_report(run), "tag"))
    with suppress(CheckpointError):
        tags.add(read_manifest(run / BEST).tag)
    with suppress(OSError):
        tags.update(manifest.tag for _, manifest in read_checkpoints(run).values())
    return {tag for tag in tags if tag is not None}


def _report(run: Path) -> dict[str, Any]:
    """The run's report; empty where there is none yet. ValueError where it is damaged."""
    try:
        report = json.loads((run / REPORT_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(report, dict):
        raise ValueError("not an object")
    return report


def _listing(run: Path) -> RunListing:
    damaged = False
    report: dict[str, Any] = {}
    manifest: Manifest | None = None
    try:
        report = _report(run)
    except (OSError, ValueError, RecursionError):
        damaged = True
    try:
        manifest = _shown_manifest(run)
    except (OSError, CheckpointError):
        damaged = True
    status = _text(report, "status") or "unfinished"
    # The report promises a model that is not there.
    damaged = damaged or (status == "finished" and manifest is None)
    return RunListing(
        tag=manifest.tag if manifest else _text(report, "tag"),
        model_id=manifest.model_id if manifest else _text(report, "model_id"),
        method=manifest.method if manifest else _text(report, "method"),
        best_loss=manifest.eval_loss if manifest else _number(report, "eval_loss"),
        bytes=manifest.total_bytes if manifest else None,
        path=run,
        status="damaged" if damaged else status,
        created=manifest.created if manifest else _changed(run),
    )


def _shown_manifest(run: Path) -> Manifest | None:
    """The manifest of ``best/``, else of the newest checkpoint, its files there in full size."""
    folder = run / BEST if (run / BEST).exists() else newest_checkpoint(run)
    if folder is None:
        _refuse_only_damaged(run / CHECKPOINTS)
        return None
    manifest = read_manifest(folder)
    verify_sizes(folder, manifest)
    return manifest


def _refuse_only_damaged(checkpoints: Path) -> None:
    for entry in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if entry.is_dir() and not is_temporary(entry):
            raise CheckpointError(str(entry), f"no readable {MANIFEST_NAME} in it")


def _changed(run: Path) -> str:
    changed = 0.0  # of a run that somebody removes at this moment
    for path in (run, run / REPORT_NAME):
        with suppress(OSError):
            changed = path.stat().st_mtime
    return datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds")


def _text(report: dict[str, Any], key: str) -> str | None:
    value = report.get(key)
    return value if isinstance(value, str) else None


def _number(report: dict[str, Any], key: str) -> float | None:
    value = report.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
