"""A path, folder, glob or URL as the user writes it -> the files it stands for, opened for reading.

Local paths are handled here, because pipes, devices, links and rights need exact answers; everything
with ``://`` goes through ``storage``.
"""

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path

from tunesmith.data.problems import closest
from tunesmith.data.watched_file import WatchedFile, not_regular, open_regular
from tunesmith.errors import DataError, printable
from tunesmith.storage.blocks import RemoteFile
from tunesmith.storage.faults import told
from tunesmith.storage.places import Found, Place, look, open_place
from tunesmith.storage.retries import retried
from tunesmith.storage.urls import is_url, shown

_BUFFER_BYTES = 2**17
_REMOTE_BUFFER_BYTES = 2**20
_SUFFIXES = (".jsonl", ".jsonl.gz")
_NO_ROW_FILES = "has no *.jsonl or *.jsonl.gz files"
_NO_MATCH = "matches no file"
_DENIED = ("permission denied", "give this user the right to read it")


def resolve_files(path: str) -> list[str]:
    """The files that ``path`` names, in the order in which they are read.

    Args:
        path: one file of any name; a folder, standing for its own ``*.jsonl`` and ``*.jsonl.gz`` that are
            not hidden, sorted; or a glob (``**`` does not follow links to folders). A URL means the same at its
            store.

    Raises:
        DataError: nothing there, nothing that can be read, or not a regular file.
    """
    if not path.strip():
        raise DataError("data", "the path is empty", "name a JSONL file, a folder or a glob")
    return _resolve_url(path) if is_url(path) else _resolve_local(path)


def open_file(file: str, on_bytes: Callable[[memoryview], object] = lambda _data: None) -> io.BufferedReader:
    """Open one resolved file for reading bytes.

    Args:
        file: one of ``resolve_files``.
        on_bytes: called with each stored byte that is read, in order.

    Raises:
        DataError: it cannot be opened; and from reading on, when the file changes meanwhile.
    """
    with read_errors(file):
        if is_url(file):
            place = open_place(file, DataError)
            remote = RemoteFile(place, _must_be_there(place))
            raw, buffer = WatchedFile(remote, file, None), _REMOTE_BUFFER_BYTES
        else:
            raw, buffer = open_regular(file), _BUFFER_BYTES
        raw.on_bytes = on_bytes
        # fsspec's own readline knows no size limit; BufferedReader's does.
        return io.BufferedReader(raw, buffer)


@contextmanager
def read_errors(place: str) -> Iterator[None]:
    """Turn what a file system raises into a DataError that names ``place``.

    For a local path anything but OSError and ValueError (a NUL inside the path) is a fault of this program and
    passes unchanged, and so does what was not caught where a store was asked.
    """
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:
        fault, remedy = _fault_of(error)
        raise DataError(shown(place), printable(fault), remedy) from error


def _fault_of(error: Exception) -> tuple[str, str]:
    if isinstance(error, PermissionError):
        return _DENIED
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "its symbolic links form a loop", "point the link at a real file"
    cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot be read ({cause})", "check the path and that it can be reached"


def _resolve_local(path: str) -> list[str]:
    local = Path(path)
    if path.startswith("~/"):
        try:
            local = local.expanduser()
        except RuntimeError as error:  # neither HOME nor an entry for this user
            raise DataError(printable(path), "has no home folder here", "write the path in full") from error
    mode = _mode(local)
    if mode is None:
        if has_magic(path):
            return _resolve_glob(local)
        raise _missing_local(local)
    if not stat.S_ISDIR(mode):
        return _files_only(path, [local], _NO_MATCH)
    with read_errors(path):
        entries = sorted(item for item in local.iterdir() if _is_row_file(item.name))
    return _files_only(path, entries, _NO_ROW_FILES)


def _resolve_glob(pattern: Path) -> list[str]:
    fixed = next(i for i, part in enumerate(pattern.parts) if has_magic(part))
    folder, wild = Path(*pattern.parts[:fixed]), Path(*pattern.parts[fixed:])
    place = str(pattern)
    has_hidden = any(part.startswith(".") for part in wild.parts)
    try:
        _refuse_closed_folders(folder, wild, has_hidden)
        # pathlib's ** does not descend into linked folders: a loop of links cannot trap it.
        found = sorted(set(folder.glob(str(wild))))
    except (OSError, ValueError) as error:
        raise DataError(printable(place), f"is not a usable glob ({error})", "mend the pattern") from error
    found = [item for item in found if has_hidden or not _is_hidden(item, folder)]
    return _files_only(place, found, _NO_MATCH)


def _refuse_closed_folders(folder: Path, wild: Path, has_hidden: bool) -> None:
    """pathlib's glob passes over folders without rights in silence, and with them over their rows."""
    for count in range(len(wild.parts)):
        looked_in = folder.glob(str(Path(*wild.parts[:count]))) if count else [folder]
        for item in looked_in:
            if not has_hidden and _is_hidden(item, folder):
                continue
            with read_errors(str(item)):
                if item.is_dir() and not _may_enter(item):
                    raise DataError(printable(str(item)), *_DENIED)


def _may_enter(folder: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=effective)


def _is_hidden(item: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in item.parts[len(below.parts) :])


def _files_only(path: str, items: list[Path], fault_if_none: str) -> list[str]:
    """The regular files among ``items``; folders are left out, pipes, devices and dead links refused."""
    files = []
    for item in items:
        mode = _mode(item)
        if mode is None:
            raise _missing_local(item)
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise not_regular(str(item))
        files.append(str(item))
    if not files:
        raise DataError(printable(path), fault_if_none, "check the path")
    return files


def _mode(path: Path) -> int | None:
    """The file's type bits with links followed, or None where nothing is there."""
    with read_errors(str(path)):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None


def _is_row_file(name: str) -> bool:
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def _missing_local(path: Path) -> DataError:
    if path.is_symlink():
        fault = "is a link to a file that does not exist"
        return DataError(printable(str(path)), fault, "mend or remove the link")
    if not path.parent.is_dir():
        remedy = f"nor is there a folder {printable(str(path.parent))}"
        return DataError(printable(str(path)), "does not exist", remedy)
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:  # a folder that may be entered but not listed
        names = []
    return _missing(str(path), path.name, names)


def _missing(place: str, name: str, names: list[str]) -> DataError:
    nearest = closest(name, (other for other in names if not other.startswith(".")))
    remedy = f"closest there is {printable(nearest)}" if nearest else "check the path"
    return DataError(printable(place), "does not exist", remedy)


def _resolve_url(url: str) -> list[str]:
    place = open_place(url, DataError)
    if url.startswith(("file://", "local://")):
        return _resolve_local(place.path)
    found = look(place)
    if found is not None and not found.is_folder:
        return [url]
    with told(url, DataError):
        return retried(lambda: _resolve_remote(place, found))


def _resolve_remote(place: Place, found: Found | None) -> list[str]:
    if found is not None:
        listed = place.fs.ls(place.path, detail=True)
        entries, fault = [item for item in listed if _is_row_file(_base_name(item["name"]))], _NO_ROW_FILES
    elif has_magic(place.path):
        entries, fault = list(place.fs.glob(place.path, detail=True).values()), _NO_MATCH
    else:
        raise _missing_remote(place)
    names = sorted(item["name"] for item in entries if item["type"] == "file")
    if not names:
        raise DataError(shown(place.url), fault, "check the path")
    if "::" in place.url:
        raise DataError(shown(place.url), "chains file systems over a folder or glob", "name one file")
    return [str(place.fs.unstrip_protocol(name)) for name in names]


def _missing_remote(place: Place) -> DataError:
    folder, _, name = place.path.rpartition("/")
    try:
        siblings = place.fs.ls(folder, detail=False) if folder else []
    except (FileNotFoundError, PermissionError):  # a key may allow to read a file and not to list others
        siblings = []
    return _missing(shown(place.url), name, [_base_name(item) for item in siblings])


def _must_be_there(place: Place) -> Found:
    found = look(place)
    if found is None:
        raise _missing_remote(place)
    return found


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]
