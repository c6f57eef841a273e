"""What a job takes along to the cluster: the configuration and the local files that it names, in one small folder."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.load import LoadedConfig
from tunesmith.config.yaml_file import dump_yaml
from tunesmith.data.locations import resolve_files
from tunesmith.errors import ConfigError, OutputError
from tunesmith.storage.urls import is_url, refuse_secrets, shown

MOST_BYTES = 100 * 10**6  # Ray keeps what is uploaded in the memory of the cluster's head
CONFIG = "config.yaml"
_ROWS = ("train_path", "valid_path", "evaluation.test_path")
_MODELS = ("model_id", "initial_base_model_ckpt_path", "initial_adapter_model_ckpt_path")
_FILES = ("deepspeed.config_path",)
_PLACES = ("forward_checkpoint_config.remote_uri", "logger.provider_config.tracking_uri")
_TRACKERS = ("databricks", "databricks-uc", "uc")  # words of MLflow's for a server
_LOCAL = ("file://", "local://", "file:")  # the last as MLflow writes folders


@dataclass(frozen=True)
class Parcel:
    """A file to take along: where it is here, and its name in the job's folder."""

    source: Path
    name: str
    bytes: int
    setting: str


def pack(loaded: LoadedConfig, folder: Path) -> list[Parcel]:
    """Fill ``folder`` with the configuration and every local file that it names; returns these files.

    Rows, models and DeepSpeed files that are here are copied and named anew; URLs, hub ids and catalog names stay.

    Args:
        loaded: the configuration.
        folder: an empty folder.

    Raises:
        ConfigError: what the run leaves would go with the job, a URL has credentials in it, a model is not here, or
            the files are too large.
        DataError: rows that are not there.
        OutputError: a file cannot be copied.
    """
    # Defaults stay out: in a file they would count as asked for, and the run would say of some that they cannot act.
    values = {key: value for key, value in loaded.resolved().items() if loaded.is_given(key)}
    _refuse_fleeting(loaded, values)
    parcels: list[Parcel] = []
    for setting in (*_ROWS, *_MODELS, *_FILES):
        value = _get(values, setting)
        if not isinstance(value, str):
            continue
        value = _without_scheme(value)
        if is_url(value):
            refuse_secrets(value, ConfigError)
            continue
        if setting in _MODELS:
            _refuse_missing(loaded, setting, value)
        named, own = _parcels(setting, value)
        if own:
            _set(values, setting, named)
            parcels += own
    total = sum(parcel.bytes for parcel in parcels)
    if total > MOST_BYTES:
        largest = max(parcels, key=lambda parcel: parcel.bytes)
        fault = f"its local files have {total / 1e6:,.0f} MB, a job may take {MOST_BYTES / 1e6:,.0f} MB along"
        remedy = f"put {largest.source} ({largest.bytes / 1e6:,.0f} MB) to a URL and name that"
        raise ConfigError(loaded.place(largest.setting), fault, remedy)
    for parcel in parcels:
        try:
            (folder / parcel.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(parcel.source, folder / parcel.name)
        except OSError as error:
            fault = f"cannot be copied for the job ({error.strerror})"
            raise OutputError(str(parcel.source), fault, "check its rights and the room in TMPDIR") from error
    (folder / CONFIG).write_text(dump_yaml(values), encoding="utf-8")
    return parcels


def _refuse_fleeting(loaded: LoadedConfig, values: Mapping[str, Any]) -> None:
    """Refuse places that go with the job: what a run leaves there would be lost."""
    output_dir = loaded.config.output.output_dir
    if is_url(output_dir):
        fault = f"{shown(output_dir)} is a URL; a run is written to a folder"
        raise ConfigError(loaded.place("output_dir"), fault, "name a folder that every machine sees")
    for setting in ("output_dir", *_PLACES):
        value = output_dir if setting == "output_dir" else _get(values, setting)
        if not isinstance(value, str):
            continue
        if is_url(value):
            refuse_secrets(value, ConfigError)
        elif not Path(_without_scheme(value)).is_absolute() and value not in _TRACKERS:
            fault = f"is {value}, in the job's own folder, which the cluster removes after the job"
            remedy = "set it to a full path that lasts and every machine sees, such as /mnt/cluster_storage/outputs"
            raise ConfigError(loaded.place(setting), fault, remedy)


def _refuse_missing(loaded: LoadedConfig, setting: str, value: str) -> None:
    """Refuse a folder that is meant to be here and is not; one with a full path may be there on the cluster."""
    if value.startswith(("./", "../", "~")) and not _is(value, Path.is_dir):
        raise ConfigError(loaded.place(setting), f"{value} is no folder here", "check the path")


def _without_scheme(value: str) -> str:
    """A path of this machine that is written as a URL, as a path."""
    return next((value.removeprefix(scheme) for scheme in _LOCAL if value.startswith(scheme)), value)


def _is(value: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(value).expanduser())
    except (OSError, RuntimeError, ValueError):  # no possible path: too long, "~nobody", a null character
        return False


def _parcels(setting: str, value: str) -> tuple[str, list[Parcel]]:
    """What the setting is called in the job's folder, and the files that go there; none: it is not local."""
    folder = f"files/{setting.replace('.', '-')}"
    if setting in _ROWS:
        files = [Path(file) for file in resolve_files(value)]
        # Of equal names in several folders each keeps its place in the order.
        names = [f"{folder}/{number:05d}-{file.name}" for number, file in enumerate(files)]
        found = [_parcel(file, name, setting) for file, name in zip(files, names, strict=True)]
        return (names[0] if len(files) == 1 else f"{folder}/*"), found
    if not _is(value, Path.is_file if setting in _FILES else Path.is_dir):
        return value, []
    local = Path(value).expanduser()
    if setting in _FILES:
        return f"{folder}/{local.name}", [_parcel(local, f"{folder}/{local.name}", setting)]
    root = f"{folder}/{local.resolve().name}"
    inside = [path for path in sorted(local.rglob("*")) if path.is_file() and not _is_hidden(path, local)]
    return root, [_parcel(path, f"{root}/{path.relative_to(local).as_posix()}", setting) for path in inside]


def _parcel(source: Path, name: str, setting: str) -> Parcel:
    return Parcel(source, name, source.stat().st_size, setting)


def _is_hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _get(values: Mapping[str, Any], dotted: str) -> Any:
    found: Any = values
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _set(values: dict[str, Any], dotted: str, value: str) -> None:
    *above, last = dotted.split(".")
    for part in above:
        values = values[part]
    values[last] = value


def shown_sizes(parcels: list[Parcel]) -> Iterator[str]:
    """A line for each setting whose files go along."""
    for setting in dict.fromkeys(parcel.setting for parcel in parcels):
        own = [parcel for parcel in parcels if parcel.setting == setting]
        files = "1 file" if len(own) == 1 else f"{len(own)} files"
        yield f"{setting}: {files}, {sum(parcel.bytes for parcel in own) / 1e6:,.1f} MB"
