"""Checkpoints put to URLs (s3://, gs://, hf://, …) so that readers find a whole one or none."""

import json
from pathlib import Path

from tunesmith.checkpoints.manifest import MANIFEST_NAME, SIGNATURE_NAME, verify
from tunesmith.errors import OutputError
from tunesmith.storage.places import Place, look, open_place, read, remove, upload
from tunesmith.storage.urls import below, is_safe_name

_WEIGHTS = ".safetensors"


def upload_checkpoint(checkpoint: Path, storage_root: str, name: str) -> str:
    """Copy the folder ``checkpoint`` to ``{storage_root}/{name}``, replacing an earlier checkpoint there.

    Object stores cannot rename a folder. So the manifest is removed first, with every file that it lists, and written
    last: a reader that finds one finds every file it lists. Weights come right before it: programs that know nothing
    of manifests find no model, or all of it, and never old weights beside new settings.

    Returns:
        The URL of the copy.

    Raises:
        CheckpointError: ``checkpoint`` is damaged; nothing was uploaded.
        OutputError: the place cannot be reached or written; no manifest is there.
    """
    files = verify(checkpoint).files
    url = below(storage_root, name)
    try:
        place = open_place(url, OutputError)
        _remove_earlier(place)
        for item in sorted(files, key=lambda item: (item.endswith(_WEIGHTS), item)):
            upload(checkpoint / item, place.below(item))
        for item in (SIGNATURE_NAME, MANIFEST_NAME):
            if (checkpoint / item).is_file():
                upload(checkpoint / item, place.below(item))
    except OutputError as error:
        fault = f"cannot be written ({error.fault})"
        raise OutputError(error.place, fault, f"{error.remedy}; it is safe in {checkpoint}") from error
    return url


def _remove_earlier(place: Place) -> None:
    manifest = place.below(MANIFEST_NAME)
    outdated: set[str] = set()
    if look(manifest) is not None:
        # Only what the earlier checkpoint lists is removed: anything else there is not ours.
        outdated = _listed_files(read(manifest))
        remove(manifest)
    for name in sorted((*outdated, SIGNATURE_NAME), key=lambda name: not name.endswith(_WEIGHTS)):
        remove(place.below(name))


def _listed_files(manifest: bytes) -> set[str]:
    try:
        names = set(json.loads(manifest)["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str) and is_safe_name(name)}
