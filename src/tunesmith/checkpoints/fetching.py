"""A model or checkpoint at a URL -> a folder of this machine, whole and checked, kept for the next time."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from tunesmith.checkpoints.atomic import remove_folder, remove_leftovers, whole_folder
from tunesmith.checkpoints.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileStamp
from tunesmith.errors import OutputError, UserError
from tunesmith.storage.blocks import CHANGED, RUN_AGAIN, download
from tunesmith.storage.places import Found, Place, list_files, open_place, read
from tunesmith.storage.urls import is_safe_name, shown

_MARKS = (MANIFEST_NAME, "adapter_config.json", "config.json")
_BEST = "best"  # of a run's folder
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.safetensors")
_WEIGHTS = "*.safetensors"
_TIMES = 3  # that a checkpoint is fetched anew because another took its place meanwhile
_SHOW_FROM = 10 * 10**6  # bytes
# Longer than any wait for a store: where nothing was written for so long, nobody writes any more.
_ABANDONED_SECONDS = 900.0

Say = Callable[[str], None]


class Replaced(Exception):
    """Another checkpoint has come to the place while this one was fetched."""


def fetch_model(
    url: str, cache: Path, error: type[UserError], *, weights: bool = True, say: Say = lambda _: None
) -> Path:
    """The folder ``url`` copied below ``cache``; what is there already and still the same is not fetched again.

    A checkpoint of ours is fetched as its manifest lists it and each file must have its SHA-256. Of other folders the
    files of a Hugging Face model are taken, and must be the same before and after. A folder of a run means its best.

    Args:
        url: of the folder.
        cache: where copies are kept, by URL and content.
        error: the class of errors that name the URL.
        weights: False: settings and tokenizer only.
        say: told what is fetched, where that may take a while.

    Raises:
        error: nothing is there, it cannot be read, is damaged, or changes again and again.
        CheckpointError, OutputError: the copy cannot be written.
    """
    root = open_place(url, error)
    for _ in range(_TIMES):
        folder, files = _model_in(root)
        with suppress(Replaced):
            return fetch_listed(folder, files, cache / short_digest(url), weights=weights, say=say)
    raise error(shown(url), CHANGED, RUN_AGAIN)


def stamps_of(manifest: bytes, place: Place) -> dict[str, FileStamp]:
    """The files that a manifest lists. Raises ``place.error`` where it is none."""
    try:
        files = {
            str(name): FileStamp(str(stamp["sha256"]), int(stamp["bytes"]))
            for name, stamp in json.loads(manifest)["files"].items()
        }
        if not all(is_safe_name(name) for name in files):
            raise ValueError("a name leads out of the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise place.error(place.url, f"is no manifest ({type(error).__name__})", "save it again") from error
    return files


def fetch_file(place: Place, target: Path, stamp: FileStamp | None) -> None:
    """One file of a model, with the SHA-256 that its manifest lists.

    Raises:
        place.error: it cannot be had, or is not the one that was saved.
        OSError: ``target`` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    download(place, target)
    if stamp is not None:
        with target.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != stamp.sha256:
            raise place.error(place.url, "its content is not what was saved", "upload it again")


def _model_in(root: Place) -> tuple[Place, dict[str, Found]]:
    files = list_files(root)
    if any(mark in files for mark in _MARKS):
        return root, files
    best = {
        name.removeprefix(f"{_BEST}/"): found for name, found in files.items() if name.startswith(f"{_BEST}/")
    }
    if any(mark in best for mark in _MARKS):
        return root.below(_BEST), best
    fault = f"has none of {', '.join(_MARKS)}" if files else "not found"
    raise root.error(root.url, fault, "name the folder of a model, a checkpoint or a run")


def fetch_listed(
    folder: Place, files: Mapping[str, Found], cache: Path, *, weights: bool = True, say: Say = lambda _: None
) -> Path:
    """The model in ``folder`` with these files as a folder in ``cache``; see ``fetch_model``.

    Raises:
        Replaced: another took its place meanwhile.
        folder.error, CheckpointError, OutputError: as ``fetch_model``.
    """
    manifest = read(folder.below(MANIFEST_NAME)) if MANIFEST_NAME in files else None
    stamps: Mapping[str, FileStamp | None]
    if manifest is not None:
        stamps, identity = stamps_of(manifest, folder.below(MANIFEST_NAME)), manifest
    else:
        stamps = {
            name: None
            for name in files
            if any(fnmatch(name, kind) for kind in _MODEL_FILES) and "/" not in name
        }
        identity = repr([(name, files[name].size, files[name].tag) for name in stamps]).encode()
    wanted = {name: stamp for name, stamp in stamps.items() if weights or not fnmatch(name, _WEIGHTS)}
    target = cache / f"{hashlib.sha256(identity).hexdigest()[:32]}{'' if weights else '-settings'}"
    _clear_abandoned(cache, target.name)
    if _is_there(target, wanted, files):
        return target
    total = sum((stamp.bytes if stamp else files[name].size or 0) for name, stamp in wanted.items())
    if total >= _SHOW_FROM:
        say(f"Fetching {total / 1e6:,.0f} MB from {folder.url}")
    if target.exists():  # somebody has taken files out of it
        remove_folder(target)
    try:
        with whole_folder(target, needs=total) as copy:
            try:
                for name, stamp in wanted.items():
                    fetch_file(folder.below(name), copy / name, stamp)
            except folder.error as error:
                if _identity(folder, manifest, stamps) != identity:
                    raise Replaced from error
                raise
            if _identity(folder, manifest, stamps) != identity:
                raise Replaced
            if manifest is not None and weights:
                _keep_manifest(folder, files, manifest, copy)
    except OutputError:
        if not _is_there(target, wanted, files):  # else another process was faster
            raise
    return target


def _clear_abandoned(cache: Path, name: str) -> None:
    """Remove what killed processes left of ``name``.

    Another machine, or container, that shares the cache may be at it, and its process ids say nothing here.
    """
    newest = 0.0
    for path in (*cache.glob(f".{name}.*"), *cache.glob(f".{name}.*/**/*")):
        with suppress(OSError):  # gone meanwhile
            newest = max(newest, path.lstat().st_mtime)
    if time.time() - newest > _ABANDONED_SECONDS:
        remove_leftovers(cache, of=name)


def _identity(folder: Place, manifest: bytes | None, stamps: Mapping[str, FileStamp | None]) -> bytes:
    """What is there now, as ``fetch_listed`` makes it of what it fetches."""
    files = list_files(folder)
    if manifest is not None:
        return read(folder.below(MANIFEST_NAME)) if MANIFEST_NAME in files else b""
    kept = [name for name in stamps if name in files]
    return repr([(name, files[name].size, files[name].tag) for name in kept]).encode()


def _keep_manifest(folder: Place, files: Mapping[str, Found], manifest: bytes, copy: Path) -> None:
    if SIGNATURE_NAME in files:
        (copy / SIGNATURE_NAME).write_bytes(read(folder.below(SIGNATURE_NAME)))
    (copy / MANIFEST_NAME).write_bytes(manifest)


def _is_there(target: Path, wanted: Mapping[str, FileStamp | None], files: Mapping[str, Found]) -> bool:
    try:
        return all(
            (target / name).stat().st_size == (stamp.bytes if stamp else files[name].size)
            for name, stamp in wanted.items()
        )
    except OSError:
        return False


def short_digest(url: str) -> str:
    """Names what is kept of ``url``."""
    return hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
