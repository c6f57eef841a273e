"""The copy of a LoRA run's best checkpoint that a server finds: ``{storage}/lora_fine_tuning/{tag}``."""

import os
from pathlib import Path

from tunesmith.checkpoints.store import tag_parts
from tunesmith.config.schema import OutputSettings
from tunesmith.errors import OutputError

_VARIABLES = ("TUNESMITH_STORAGE", "ANYSCALE_ARTIFACT_STORAGE")


def forward_storage(settings: OutputSettings) -> str:
    """``remote_uri``, else the first storage variable that is set, else ``output_dir``."""
    named = [settings.forward_checkpoint_config.remote_uri, *(os.environ.get(name) for name in _VARIABLES)]
    return next((place for place in named if place), settings.output_dir)


def refuse_unusable_place(settings: OutputSettings) -> None:
    """Find out before hours of training what can be known: whether tag and storage can be used.

    Raises:
        OutputError: the tag is no folder name, or the storage cannot be written.
    """
    tag = settings.forward_checkpoint_config.tag or settings.custom_model_tag
    if tag is not None:
        tag_parts(tag)
    storage = forward_storage(settings)
    setting = "output_dir" if storage == settings.output_dir else "forward_checkpoint_config.remote_uri"
    remedy = f"set {setting} to a folder you can write"
    storage = storage.removeprefix("file://")
    if "://" in storage:
        from fsspec import get_filesystem_class

        try:
            get_filesystem_class(storage.partition("://")[0])
        except (ValueError, ImportError) as error:
            raise OutputError(storage, f"cannot be used ({error})", remedy) from error
        return
    folder = Path(storage).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise OutputError(storage, f"cannot be written ({existing} is no folder)", remedy)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(storage, f"cannot be written (no right to write in {existing})", remedy)
