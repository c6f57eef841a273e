"""Checkpoints at URLs (s3://, gs://, hf://, …), through fsspec."""

import json
from pathlib import Path, PurePosixPath

from tunesmith.checkpoints.manifest import MANIFEST_NAME, SIGNATURE_NAME, verify
from tunesmith.errors import OutputError


def upload_checkpoint(checkpoint: Path, storage_root: str, name: str) -> str:
    """Copy the folder ``checkpoint`` to ``{storage_root}/{name}``, replacing an earlier checkpoint there.

    Object stores cannot rename a folder. So the manifest is removed first and written last: a reader
    that finds one finds every file it lists.

    Returns:
        The URL of the copy.

    Raises:
        CheckpointError: ``checkpoint`` is damaged; nothing was uploaded.
        OutputError: the place cannot be reached or written; no manifest is there.
    """
    manifest = verify(checkpoint)
    url = f"{storage_root.rstrip('/')}/{name}"
    try:
        _upload(checkpoint, url, {item: stamp.bytes for item, stamp in manifest.files.items()})
    except Exception as error:  # every store has its own exceptions, and a missing driver is an ImportError
        fault = f"cannot be written ({type(error).__name__}: {error})"
        raise OutputError(
            url, fault, f"check the address and your credentials; it is safe in {checkpoint}"
        ) from error
    return url


def _upload(checkpoint: Path, url: str, sizes: dict[str, int]) -> None:
    from fsspec.core import url_to_fs

    store, root = url_to_fs(url)
    manifest_at = f"{root}/{MANIFEST_NAME}"
    outdated: set[str] = set()
    if store.exists(manifest_at):
        # Only what the earlier checkpoint lists is removed: anything else there is not ours.
        outdated = _listed_files(store.cat_file(manifest_at)) - sizes.keys()
        store.rm_file(manifest_at)
    for name in (*outdated, SIGNATURE_NAME):
        if store.exists(f"{root}/{name}"):
            store.rm_file(f"{root}/{name}")
    for name, size in sizes.items():
        at = f"{root}/{name}"
        store.put_file(str(checkpoint / name), at)
        store.invalidate_cache(str(PurePosixPath(at).parent))
        stored = store.size(at)
        if stored is not None and stored != size:
            raise OSError(f"{name} has {stored} bytes there instead of {size}")
    if (checkpoint / SIGNATURE_NAME).is_file():
        store.put_file(str(checkpoint / SIGNATURE_NAME), f"{root}/{SIGNATURE_NAME}")
    store.put_file(str(checkpoint / MANIFEST_NAME), manifest_at)


def _listed_files(manifest: bytes) -> set[str]:
    try:
        names = set(json.loads(manifest)["files"])
    except (ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if ".." not in PurePosixPath(name).parts}
