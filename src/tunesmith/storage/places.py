"""Files and folders at URLs, through fsspec: looked at, listed, read, written and removed, with bounded retries.

Credentials come from where each driver looks for them in the environment; none is ever passed on from a
configuration. Listings are never cached: what another machine has put there a second ago is seen.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.storage.faults import TornTransfer, is_about_bucket, told
from tunesmith.storage.retries import retried
from tunesmith.storage.urls import below, is_safe_name, protocol_of, refuse_secrets

MAX_FILES = 100_000  # in one listing
_MOST_READ = 64 * 2**20  # bytes of a file that is taken into memory whole
_OWN_TRIES = 2
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
# What drivers call that which changes with every new content, most telling first.
_TAGS = (
    "ETag", "etag", "generation", "md5Hash", "blob_id", "VersionId", "Content-MD5", "mtime", "LastModified",
    "Last-Modified", "updated", "modified", "created",
)  # fmt: skip
_TIMES = ("LastModified", "updated", "mtime", "modified", "created")


@dataclass(frozen=True)
class Place:
    """A file or folder at a URL.

    Attributes:
        url: as it is shown.
        fs: fsspec's file system.
        path: the same place as ``fs`` names it.
        error: the class of the errors that name it.
    """

    url: str
    fs: Any
    path: str
    error: type[UserError]

    def below(self, name: str) -> "Place":
        """``name`` in this folder."""
        return replace(self, url=below(self.url, name), path=f"{self.path.rstrip('/')}/{name}")


@dataclass(frozen=True)
class Found:
    """What is at a place.

    Attributes:
        size: in bytes; None: the store does not say.
        tag: another one where the content is another; None: the store has none.
        is_folder: a folder, or a prefix of keys.
        is_ranged: whether any part of it can be asked for.
        md5: of the content, where the store offers it as such.
        changed: seconds since 1970, where the store says.
    """

    size: int | None
    tag: str | None
    is_folder: bool = False
    is_ranged: bool = True
    md5: str | None = None
    changed: float | None = None


def open_place(url: str, error: type[UserError]) -> Place:
    """The place that ``url`` names; nothing is asked of the store yet.

    Raises:
        error: it has credentials in it, no driver knows it, or the driver is not installed.
    """
    refuse_secrets(url, error)
    with told(url, error):
        from fsspec.core import url_to_fs  # imported late: local files need none of it

        fs, path = url_to_fs(url, **_options(protocol_of(url)))
    if protocol_of(url) in ("s3", "s3a"):
        fs.retries = (
            _OWN_TRIES  # of s3fs for each request, so that a part of a large upload is sent again alone
        )
    return Place(url, fs, str(path), error)


def look(place: Place) -> Found | None:
    """What is there now; None: nothing.

    Raises:
        place.error: the store cannot be asked, or there is no such bucket.
    """
    with told(place.url, place.error):
        return retried(lambda: _look(place))


def list_files(folder: Place) -> dict[str, Found]:
    """Every file in and below ``folder`` by its name relative to it, sorted. Empty where there is none.

    Names that would lead out of the folder they are copied to are left out.

    Raises:
        folder.error: it cannot be listed, or has more than ``MAX_FILES``.
    """
    with told(folder.url, folder.error):
        entries = retried(lambda: _find(folder))
    if len(entries) > MAX_FILES:
        raise folder.error(folder.url, f"has more than {MAX_FILES:,} files", "name a folder with fewer")
    start = folder.path.rstrip("/") + "/"
    names = {name.removeprefix(start): info for name, info in entries.items() if name.startswith(start)}
    return {name: _found(names[name], folder) for name in sorted(names) if is_safe_name(name)}


def read(file: Place) -> bytes:
    """All of a small file.

    Raises:
        file.error: it is not there, cannot be read, or has more than 64 MiB.
    """
    with told(file.url, file.error):
        return retried(lambda: _read(file))


def upload(source: Path, file: Place) -> None:
    """Copy a local file to ``file``, and check that it has its size there.

    Raises:
        file.error: it could not be written.
    """
    with told(file.url, file.error):
        retried(lambda: _put(source, file))


def remove(file: Place) -> None:
    """Remove the file, if it is there.

    Raises:
        file.error: it could not be removed.
    """

    def gone() -> None:
        # Not fs.exists: it calls what cannot be asked absent.
        if _look(file) is not None:
            file.fs.rm_file(file.path)

    with told(file.url, file.error):
        retried(gone)


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("gs", "gcs"):
        return {"use_listings_cache": False}
    if protocol not in ("s3", "s3a"):
        return {}
    from fsspec.config import conf

    options: dict[str, Any] = {"use_listings_cache": False}
    if "config_kwargs" not in conf.get("s3", {}):
        # botocore's own would wait for minutes, times our attempts.
        times = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        options["config_kwargs"] = {**times, "retries": {"mode": "standard", "total_max_attempts": 1}}
    return options


def _look(place: Place) -> Found | None:
    place.fs.invalidate_cache()
    try:
        return _found(place.fs.info(place.path), place)
    except FileNotFoundError as error:
        if is_about_bucket(error):
            raise
        return None


def _find(folder: Place) -> Mapping[str, Mapping[str, Any]]:
    folder.fs.invalidate_cache()
    try:
        found: Mapping[str, Mapping[str, Any]] = folder.fs.find(folder.path, detail=True)
    except FileNotFoundError as error:
        if is_about_bucket(error):
            raise
        return {}
    return {name: info for name, info in found.items() if info.get("type") == "file"}


def _read(file: Place) -> bytes:
    file.fs.invalidate_cache()
    size = file.fs.info(file.path).get("size")
    if size is not None and size > _MOST_READ:
        raise file.error(
            file.url, f"has {size:,} bytes, far more than a file of its name", "check the address"
        )
    content = bytes(file.fs.cat_file(file.path))
    if size is not None and len(content) != size:
        raise TornTransfer(f"{len(content)} of {size} bytes came")
    return content


def _put(source: Path, file: Place) -> None:
    folder = file.path.rpartition("/")[0]
    if protocol_of(file.url) not in ("s3", "s3a", "gs", "gcs"):  # whose folders are but parts of names
        file.fs.makedirs(folder, exist_ok=True)
    file.fs.put_file(str(source), file.path)
    file.fs.invalidate_cache()
    there, own = file.fs.info(file.path).get("size"), source.stat().st_size
    if there is not None and there != own:
        raise TornTransfer(f"it has {there} bytes there instead of {own}")


def _found(info: Mapping[str, Any], place: Place) -> Found:
    tag = next((f"{name} {info[name]}" for name in _TAGS if info.get(name)), None)
    is_web = protocol_of(place.url) in ("http", "https")
    # A file inside an archive is unpacked from its start at each look: parts of it are dear.
    is_ranged = "::" not in place.url and (not is_web or bool(info.get("partial")))
    return Found(
        size=info.get("size"),
        tag=tag,
        is_folder=info.get("type") == "directory",
        is_ranged=is_ranged,
        md5=_md5(info),
        changed=next((time for name in _TIMES if (time := _seconds(info.get(name))) is not None), None),
    )


def _md5(info: Mapping[str, Any]) -> str | None:
    offered = info.get("md5Hash") or info.get("Content-MD5")
    try:
        return base64.b64decode(offered, validate=True).hex() if offered else None
    except (binascii.Error, TypeError, ValueError):
        return None


def _seconds(value: Any) -> float | None:
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
