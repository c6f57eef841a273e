"""Where training starts, if not at the model's own weights: another checkpoint, or an adapter to continue."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoints.lineage import parent_of
from tunesmith.checkpoints.locate import locate_model
from tunesmith.checkpoints.manifest import MANIFEST_NAME, Parent
from tunesmith.checkpoints.signature import refuse_unsigned
from tunesmith.config.schema import ModelSettings, RepoId
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.base import BaseFolder, fetch_from_hub, fetch_from_url
from tunesmith.models.servable import check_base, verified_manifest
from tunesmith.storage.urls import is_url

_ADAPTER_FILES = ["*.json", "*.jinja", "adapter_model.safetensors"]


@dataclass(frozen=True)
class Origin:
    """What a run goes on from; all None where it is base weights that no checkpoint of ours holds.

    Attributes:
        name: the adapter or else the base checkpoint, as the configuration names it.
        adapter, base: what is recorded of each, where it has a manifest.
    """

    name: str | None
    adapter: Parent | None
    base: Parent | None


def origin_of(settings: ModelSettings, base: BaseFolder, adapter: Path | None) -> Origin:
    """What the manifests of a run say of its parents. To be asked when they are loaded: later they may be others.

    Args:
        settings: as the configuration has them.
        base: the weights that were loaded; a folder of ``model_id`` with a manifest counts as a checkpoint too.
        adapter: the folder of the adapter that is continued, see ``adapter_to_continue``.

    Raises:
        CheckpointError: a manifest cannot be read, or is not signed where it must be; or a file of a base checkpoint
            at a URL is not the one that was saved.
    """
    _check_fetched(settings.initial_base_model_ckpt_path, base.path)
    start = settings.initial_adapter_model_ckpt_path
    name = str(start.repo_id if isinstance(start, RepoId) else start) if start is not None else None
    if name is None and settings.initial_base_model_ckpt_path is not None:
        name = base.model_id
    return Origin(name, parent_of(adapter) if adapter is not None else None, parent_of(base.path))


def weights_id(settings: ModelSettings) -> str:
    """Where the base weights come from: the model itself, or a checkpoint or run folder in its place.

    Raises:
        ModelError: it is a run without a checkpoint.
        CheckpointError: a file of the checkpoint is not the one that was saved.
    """
    start = settings.initial_base_model_ckpt_path
    if start is None:
        return settings.model_id
    if isinstance(start, RepoId):
        return start.repo_id
    folder = None if is_url(start) else locate_model(start, [])
    if folder is not None:
        verified_manifest(folder)
    return start if folder is None else str(folder)


def _check_fetched(start: str | RepoId | None, folder: Path) -> None:
    """Of a base checkpoint that was fetched, what ``weights_id`` checks of one that is here."""
    if isinstance(start, RepoId):
        if not (folder / MANIFEST_NAME).is_file():
            refuse_unsigned(folder, f"no {MANIFEST_NAME} in it")
    elif start is not None and is_url(start):
        verified_manifest(folder)


def adapter_to_continue(
    start: str | RepoId, base: BaseFolder, lora_config: Mapping[str, Any], place: str
) -> Path:
    """The folder of the adapter that is trained on: a checkpoint, a run (its best one), from the hub or a URL.

    Args:
        start: as the configuration names it.
        base: the base model of this run.
        lora_config: the file's, which must not ask for another adapter than this one.
        place: where ``lora_config`` stands, for errors.

    Raises:
        ModelError: there is no such adapter, it cannot be read, or it was trained on other base weights.
        CheckpointError: a file is not the one that was saved.
        ConfigError: ``lora_config`` has another value than the adapter.
    """
    if isinstance(start, RepoId):
        folder = fetch_from_hub(start.repo_id, _ADAPTER_FILES).path
    elif is_url(start):
        folder = fetch_from_url(start).path
    else:
        try:
            local = Path(start).expanduser()
            is_there = local.is_dir()
        except (OSError, RuntimeError, ValueError):  # no possible path: too long, "~nobody", a null character
            is_there = False
        if not is_there:
            raise ModelError(start, "no such adapter folder", "check initial_adapter_model_ckpt_path")
        folder = locate_model(start, []) or local
    manifest = verified_manifest(folder)
    if manifest is not None:
        check_base(str(start), manifest, base)
    _refuse_other_settings(folder, lora_config, place)
    return folder


def _refuse_other_settings(folder: Path, lora_config: Mapping[str, Any], place: str) -> None:
    from peft import LoraConfig, PeftConfig

    if not (folder / "adapter_config.json").is_file():
        return  # told apart, with a better message, when the adapter is loaded
    try:
        saved = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises what the first step that fails happens to raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        fault = f"its adapter_config.json cannot be read ({reason})"
        raise ModelError(str(folder), fault, "save the adapter again") from error
    if not isinstance(saved, LoraConfig):
        raise ModelError(str(folder), "its adapter_config.json is of no LoRA adapter", "name another adapter")
    for key, value in lora_config.items():
        has = getattr(saved, key, None)
        if _comparable(value) != _comparable(has):
            raise ConfigError(
                place, f"lora_config.{key} is {value}, the adapter has {has}", "leave it out or start afresh"
            )


def _comparable(value: Any) -> Any:
    # Target names are kept as a set, and enumerations by their value.
    if isinstance(value, list | tuple | set):
        return sorted(map(str, value))
    return getattr(value, "value", value)
