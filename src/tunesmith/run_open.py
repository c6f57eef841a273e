"""The start of a run: names, its folder, its trackers."""

import json
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rich.console import Console

from tunesmith.assembly import Assembly
from tunesmith.checkpoints.atomic import write_json, write_text
from tunesmith.checkpoints.lock import locked
from tunesmith.checkpoints.manifest import BaseWeights, fingerprint_weights
from tunesmith.checkpoints.naming import model_tag, new_run_folder
from tunesmith.config.load import LoadedConfig
from tunesmith.config.schema import Logger
from tunesmith.models.base import BaseFolder
from tunesmith.models.catalog import CATALOG
from tunesmith.paths import expanded
from tunesmith.resuming import ResumePoint
from tunesmith.run_record import Run
from tunesmith.storage.urls import is_url
from tunesmith.tracking.events import Sink
from tunesmith.tracking.fanout import Fanout
from tunesmith.tracking.jsonl import rewind
from tunesmith.tracking.ray_gauges import RayGauges
from tunesmith.tracking.sinks import open_sinks, tracker_ids
from tunesmith.tracking.slow_workers import SlowWorkers
from tunesmith.training.workers import ALONE, Workers, on_first

_NAMES = "run.json"


@dataclass(frozen=True)
class Names:
    """What a run is called, here and by its trackers; stored as ``run.json``, so that it stays."""

    tag: str
    trackers: dict[str, str] = field(default_factory=dict)


def open_run(
    loaded: LoadedConfig,
    parts: Assembly,
    base: BaseWeights,
    console: Console,
    started: float,
    resumed: ResumePoint | None,
    held: ExitStack,
    workers: Workers = ALONE,
) -> Run:
    """Make the run's folder with its ``config.yaml``, or take up that of ``resumed``, and open its trackers.

    A new folder is locked until ``held`` is closed, before anything is in it by which another process could find it.
    Of several workers the first does this; the others are told the names, write nothing and track nothing.

    Raises:
        OutputError: the folder cannot be written.
        ConfigError: a tracker cannot be opened; no new folder is left then.
    """
    sinks: list[Sink] = []

    def opened() -> tuple[Names, Path]:
        names, folder, found = _open(loaded, parts, console, resumed, held)
        sinks.extend(found)
        if workers.world > 1:
            sinks.extend((RayGauges(), SlowWorkers(found)))
        return names, folder

    names, folder = on_first(workers, opened)
    run = Run(
        loaded=loaded,
        parts=parts,
        name=folder.name,
        tag=names.tag,
        folder=folder,
        track=Fanout(sinks),
        base=base,
        tracker_url=next((url for sink in sinks if (url := getattr(sink, "url", None))), None),
        started=started,
        resumed=resumed,
        workers=workers,
    )
    if workers.rank == 0:
        store = run.store  # clears what a process that was killed while saving has left
        for path in resumed.damaged if resumed else ():
            store.set_aside(path)
    return run


def _open(
    loaded: LoadedConfig, parts: Assembly, console: Console, resumed: ResumePoint | None, held: ExitStack
) -> tuple[Names, Path, list[Sink]]:
    output = loaded.config.output
    model_id = loaded.config.model.model_id
    output_dir = expanded(output.output_dir)
    names = _names(resumed) or Names(output.custom_model_tag or model_tag(model_id))
    if resumed is not None:
        folder = resumed.folder
        rewind(folder / "metrics.jsonl", resumed.step)
        sinks = _sinks(output.logger, folder, output_dir, names, console)
    else:
        folder = new_run_folder(output_dir, model_id, parts.kind, datetime.now())
        try:
            held.enter_context(locked(folder))
            write_text(folder / "config.yaml", loaded.as_yaml())
            sinks = _sinks(output.logger, folder, output_dir, names, console)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    write_json(folder / _NAMES, Names(names.tag, names.trackers | tracker_ids(sinks)))
    return names, folder, sinks


def _names(resumed: ResumePoint | None) -> Names | None:
    if resumed is None:
        return None
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((resumed.folder / _NAMES).read_text(encoding="utf-8"))
        return Names(str(found["tag"]), dict(found["trackers"]))
    return Names(resumed.manifest.tag) if resumed.manifest else None


def base_weights(base: BaseFolder) -> BaseWeights:
    """What identifies the weights a run starts from; a local folder by its full path, a URL as it is."""
    files, fingerprint = fingerprint_weights(base.weight_files)
    has_name = base.revision is not None or base.model_id in CATALOG or is_url(base.model_id)
    source = base.model_id if has_name else str(base.path.resolve())
    return BaseWeights(source, base.revision, files, fingerprint)


def _sinks(
    logger: Logger | None, folder: Path, output_dir: Path, names: Names, console: Console
) -> list[Sink]:
    settings = logger.provider_config.model_dump() if logger else {}
    settings["run_name"] = settings.get("run_name") or names.tag
    settings["resumed"] = names.trackers
    if logger and logger.provider == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        # MLflow's own default is a database in the current folder, which its small package cannot open.
        settings["tracking_uri"] = settings["tracking_uri"] or str((output_dir / "mlruns").resolve())
    return open_sinks(folder, console, logger.provider if logger else None, **settings)
