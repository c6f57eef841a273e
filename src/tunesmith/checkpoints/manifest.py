"""What a checkpoint is: the ``tunesmith.json`` in its folder, and the check that the folder still agrees.

The manifest says from which base weights, settings and data a checkpoint came, and lists every other
file of the folder with its size and SHA-256, so that damage is found before anything is loaded. Where keys are
configured it is signed, see ``signature.py``.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.checkpoints.atomic import REAL, FileOps, write_json
from tunesmith.checkpoints.signature import check_signature, sign, signature_of
from tunesmith.errors import CheckpointError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MANIFEST_NAME = "tunesmith.json"
SIGNATURE_NAME = signature_of(Path(MANIFEST_NAME)).name
FORMAT = 1
_USE_ANOTHER = "use another checkpoint or save it again"


@dataclass(frozen=True)
class FileStamp:
    """How a file must be to be the one that was saved."""

    sha256: str  # 64 hex digits
    bytes: int


@dataclass(frozen=True)
class BaseWeights:
    """The weights training started from."""

    source: str  # hub id, folder or URL
    revision: str | None  # commit on the hub, where there is one
    files: Mapping[str, str]  # file name -> sha256
    fingerprint: str  # of all files; see fingerprint_weights


@dataclass(frozen=True)
class Parent:
    """A checkpoint that training went on from, known again wherever it lies."""

    tag: str
    run: str
    step: int
    manifest_sha256: str  # of its tunesmith.json, as sha256sum gives it
    folder: str  # where it lay, by its full path


@dataclass(frozen=True)
class Manifest:
    """One checkpoint; stored as ``tunesmith.json``, whose keys are these fields."""

    format: int  # layout of this file; see FORMAT
    method: Literal["lora", "full"]
    tag: str
    run: str
    model_id: str
    base: BaseWeights
    step: int  # optimizer steps done
    epoch: float
    eval_loss: float | None  # nats per token; None where nothing was evaluated
    metrics: Mapping[str, float | None]
    config: Mapping[str, Any]  # every resolved setting, free of secrets
    data: Mapping[str, Mapping[str, Any]]  # split -> {path, sha256, rows}
    versions: Mapping[str, str]
    created: str  # ISO 8601 with its offset, UTC
    parent: str | None  # the checkpoint that was continued, as the configuration names it
    files: Mapping[str, FileStamp]  # path relative to the folder, with "/" -> stamp
    score: float | None = None  # what checkpoints are ranked by; set by CheckpointStore.save
    parent_adapter: Parent | None = None  # the adapter that was continued
    parent_base: Parent | None = None  # the checkpoint that the base weights are
    seed: int | None = None  # of the order of rows, dropout and new weights
    code_version: str | None = None  # of tunesmith; None: one that did not record these last fields
    environment: Mapping[str, Any] = field(default_factory=dict)  # what else decides the last bits

    def __post_init__(self) -> None:
        if datetime.fromisoformat(self.created).tzinfo is None:
            raise ValueError(f"created has no UTC offset: {self.created}")

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files together."""
        return sum(stamp.bytes for stamp in self.files.values())


def hash_files(folder: Path) -> dict[str, FileStamp]:
    """Stamp every file under ``folder`` but the manifest and its signature, sorted by name.

    Raises:
        CheckpointError: something in it is a link or not a regular file, or cannot be read.
    """
    found = _files_under(folder)
    digests = _sha256_each(found.values())
    return {
        name: FileStamp(digest, path.stat().st_size)
        for (name, path), digest in zip(found.items(), digests, strict=True)
    }


def write_manifest(folder: Path, manifest: Manifest, *, fs: FileOps = REAL) -> None:
    """Write ``manifest`` into ``folder``, signed where a key is configured; NaN and infinite numbers become null.

    Raises:
        CheckpointError, OutputError: as ``write_text``.
        ConfigError: the key cannot be used.
    """
    write_json(folder / MANIFEST_NAME, manifest, fs=fs)
    sign(folder / MANIFEST_NAME, fs=fs)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in ``folder``. The listed files are not looked at; see ``verify``.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer tunesmith wrote it.
    """
    return _parsed(folder, _content(folder))


def identified(folder: Path) -> tuple[Manifest, str]:
    """The manifest of the checkpoint in ``folder`` and the SHA-256 of its file; its signature is checked.

    Raises:
        CheckpointError: as ``read_manifest`` and ``check_signature``.
        ConfigError: the key to check with cannot be used.
    """
    content = _content(folder)
    check_signature(folder / MANIFEST_NAME, content)
    return _parsed(folder, content), hashlib.sha256(content).hexdigest()


def verify(folder: Path) -> Manifest:
    """Check that ``folder`` holds exactly the files its manifest lists, bit for bit; return the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, of other size, a stranger, or of other
            content; or as ``identified``.
        ConfigError: the key to check its signature with cannot be used.
    """
    manifest, _ = identified(folder)
    verify_sizes(folder, manifest)
    names = sorted(manifest.files)
    for name, digest in zip(names, _sha256_each(folder / name for name in names), strict=True):
        if digest != manifest.files[name].sha256:
            raise CheckpointError(str(folder / name), "its content is not what was saved", _USE_ANOTHER)
    return manifest


def verify_sizes(folder: Path, manifest: Manifest) -> None:
    """The part of ``verify`` that reads no content: names and sizes.

    Raises:
        CheckpointError: as ``verify``.
    """
    present = _files_under(folder)
    for name in sorted(present.keys() | manifest.files.keys()):
        place = str(folder / name)
        if name not in present:
            raise CheckpointError(place, "is missing from the checkpoint", _USE_ANOTHER)
        if name not in manifest.files:
            raise CheckpointError(place, "is not part of the checkpoint it lies in", "move it elsewhere")
        size, saved = present[name].stat().st_size, manifest.files[name].bytes
        if size != saved:
            raise CheckpointError(place, f"has {size} bytes, {saved} were saved", _USE_ANOTHER)


def fingerprint_weights(files: Sequence[Path]) -> tuple[dict[str, str], str]:
    """SHA-256 of each weight file by file name, and one fingerprint of all.

    The fingerprint is the SHA-256 of the lines ``{sha256}  {name}`` sorted by name (what ``sha256sum``
    prints), so it depends on contents and file names, not on folders or the order given.

    Raises:
        CheckpointError: a file cannot be read.
        ValueError: two files have the same name.
    """
    ordered = sorted(files, key=lambda path: path.name)
    digests = dict(zip([path.name for path in ordered], _sha256_each(ordered), strict=True))
    if len(digests) != len(files):
        raise ValueError("two weight files have the same name")
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return digests, hashlib.sha256(lines.encode()).hexdigest()


def _content(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            str(folder), f"no {MANIFEST_NAME} in it, so it is no whole checkpoint", _USE_ANOTHER
        ) from error
    except OSError as error:
        raise CheckpointError(str(path), f"damaged ({_first_line(error)})", _USE_ANOTHER) from error


def _parsed(folder: Path, content: bytes) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        text = content.decode("utf-8")
        found = json.loads(text)["format"]
        if type(found) is not int:
            raise TypeError("format is not an integer")
        if found > FORMAT:
            fault = f"written by a newer tunesmith (format {found}; this one reads up to {FORMAT})"
            raise CheckpointError(str(path), fault, "install a newer tunesmith")
        manifest = _adapter().validate_json(text, strict=True)
        _refuse_escaping(manifest.files)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        # pydantic's ValidationError and json's and UTF-8's errors are ValueErrors.
        raise CheckpointError(str(path), f"damaged ({_first_line(error)})", _USE_ANOTHER) from error
    return manifest


def _files_under(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(str(path), "is not a regular file", "a checkpoint holds only plain files")
        if path.is_file() and name not in (MANIFEST_NAME, SIGNATURE_NAME):
            found[name] = path
    return found


def _sha256_each(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of files, several at once: a processor hashes 1 GB a second, a full checkpoint has 1.6."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})", _USE_ANOTHER) from error


@functools.cache
def _adapter() -> "TypeAdapter[Manifest]":
    from pydantic import TypeAdapter  # costs 0.1 s, which listing commands without checkpoints save

    return TypeAdapter(Manifest)


def _refuse_escaping(files: Mapping[str, FileStamp]) -> None:
    for name in files:
        path = PurePosixPath(name)
        is_ours = name in (MANIFEST_NAME, SIGNATURE_NAME)
        if path.is_absolute() or ".." in path.parts or path.as_posix() != name or is_ours:
            raise ValueError(f"{name!r} is no file name within a checkpoint")


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    # pydantic: a headline, then per fault a line with the field and a line with the reason.
    return f"{lines[1]}: {lines[2].split(' [')[0]}" if len(lines) > 2 else lines[0]
