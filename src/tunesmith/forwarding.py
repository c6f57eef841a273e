"""The copy of a LoRA run's best checkpoint that a server finds: ``{storage}/lora_fine_tuning/{tag}``."""

import os
from pathlib import Path

from tunesmith.checkpoints.manifest import MANIFEST_NAME
from tunesmith.checkpoints.store import FORWARDED, tag_parts
from tunesmith.config.schema import OutputSettings
from tunesmith.errors import ConfigError, OutputError
from tunesmith.storage.places import look, open_place
from tunesmith.storage.urls import below, is_url, refuse_secrets, shown

_VARIABLES = ("TUNESMITH_STORAGE", "ANYSCALE_ARTIFACT_STORAGE")


def forward_storage(settings: OutputSettings) -> str:
    """``remote_uri``, else the first storage variable that is set, else ``output_dir``."""
    return _named_storage(settings)[1]


def refuse_unusable_place(settings: OutputSettings, *, forwards: bool) -> None:
    """Find out before hours of training what can be known: whether ``output_dir`` can be used, and tag and storage.

    Args:
        forwards: whether a copy will be made. If not, tag and storage do not matter.

    Raises:
        OutputError: the tag is no folder name or that of something else, or the storage cannot be written: a folder
            without the rights, a URL without driver, credentials or bucket, or whose store cannot be reached. Rights
            to write there show only when the copy is made.
        ConfigError: the tracker's address has credentials in it, which would end in every manifest.
    """
    if is_url(settings.output_dir):
        remedy = "name a folder, and the URL as forward_checkpoint_config.remote_uri"
        raise OutputError(
            f"output_dir {shown(settings.output_dir)}", "is a URL; a run is written to a folder", remedy
        )
    if settings.logger is not None and settings.logger.provider_config.tracking_uri is not None:
        refuse_secrets(settings.logger.provider_config.tracking_uri, ConfigError)
    tag = settings.forward_checkpoint_config.tag or settings.custom_model_tag
    if forwards and tag is not None:
        tag_parts(tag)
    setting, storage = _named_storage(settings) if forwards else ("output_dir", settings.output_dir)
    remedy = f"set {setting} to a folder you can write"
    storage = storage.removeprefix("file://")
    if is_url(storage):
        try:
            look(open_place(below(storage, FORWARDED), OutputError))
        except OutputError as error:
            raise OutputError(
                f"{setting} {error.place}", f"cannot be used ({error.fault})", error.remedy
            ) from error
        return
    try:
        folder = Path(storage).expanduser().absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, "~nobody", a null character
        raise OutputError(shown(storage), f"is no place that can be ({error})", remedy) from error
    if not existing.is_dir():
        raise OutputError(storage, f"cannot be written ({existing} is no folder)", remedy)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(storage, f"cannot be written (no right to write in {existing})", remedy)
    if forwards and tag is not None:
        _refuse_taken(folder / FORWARDED, tag)


def _named_storage(settings: OutputSettings) -> tuple[str, str]:
    """What names the storage, and the storage."""
    named = {
        "forward_checkpoint_config.remote_uri": settings.forward_checkpoint_config.remote_uri,
        **{name: os.environ.get(name) for name in _VARIABLES},
    }
    return next(
        ((name, place) for name, place in named.items() if place), ("output_dir", settings.output_dir)
    )


def _refuse_taken(root: Path, tag: str) -> None:
    """What ``store.forward`` would refuse after the run."""
    target = root.joinpath(*tag_parts(tag))
    if target.exists() and not (target / MANIFEST_NAME).exists():
        raise OutputError(str(target), "exists and is no checkpoint", "move it away or choose another tag")
    above = [folder for folder in target.parents if folder.is_relative_to(root) and folder != root]
    for folder in above:
        if (folder / MANIFEST_NAME).exists():
            raise OutputError(str(folder), "is itself a forwarded model", f"choose another tag than {tag}")
