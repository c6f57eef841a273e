"""The arrays of tokenised rows: written to the cache while they are made, mapped rather than read.

Memory stays flat, however many rows there are, where a cache folder can be written. Where it cannot, because
there is none, it is read-only or the disk is full, the arrays are kept in memory.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tunesmith.errors import DataError

Arrays = dict[str, NDArray[Any]]

DTYPES: Mapping[str, type[np.generic]] = {
    "ids": np.int32,
    "trained": np.bool_,
    "starts": np.int64,
    "file_numbers": np.int32,
    "line_numbers": np.int32,
}
_FILES = "files.json"
_TEMPORARY = ".tmp-"
_LEFT_SECONDS = 24 * 3600  # no tokenising takes so long: what is older was left by a process that was killed


class TokenStore:
    """Grows the arrays of ``DTYPES``, each of one dimension.

    Args:
        cache_dir: the folder in whose temporary subfolder they are written; None: in memory.

    Use it as a context manager: what was written is removed unless ``finish`` was reached.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._in_memory: dict[str, list[NDArray[Any]]] = {name: [] for name in DTYPES}
        self._lengths = dict.fromkeys(DTYPES, 0)
        self._folder: Path | None = None
        if cache_dir is not None:
            try:
                cache_dir.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(cache_dir)
                self._folder = Path(tempfile.mkdtemp(dir=cache_dir, prefix=_TEMPORARY))
                for name in DTYPES:
                    self._path(name).write_bytes(_header(name, 0))
            except OSError:
                self._remove_folder()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_folder()

    def append(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Append to every array."""
        arrays = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in DTYPES.items()}
        if self._folder is not None:
            try:
                for name, array in arrays.items():
                    with self._path(name).open("ab") as file:
                        file.write(array.data)
            except OSError:
                self._move_to_memory()
        if self._folder is None:
            for name, array in arrays.items():
                self._in_memory[name].append(array)
        for name, array in arrays.items():
            self._lengths[name] += len(array)

    def finish(self, folder: Path | None, files: Sequence[str]) -> Arrays:
        """The whole arrays.

        Args:
            folder: where they are to be kept for later runs, with ``files``; None: they are not kept.
            files: the files they were read from.
        """
        if self._folder is not None:
            try:
                for name in DTYPES:
                    with self._path(name).open("r+b") as file:
                        file.write(_header(name, self._lengths[name]))
                (self._folder / _FILES).write_text(json.dumps(files), encoding="utf-8")
                arrays = _mapped(self._folder)  # stay valid when the files are renamed or removed
            except OSError:
                self._move_to_memory()
            else:
                if folder is not None:
                    self._rename(self._folder, folder)
                return arrays
        return {
            name: np.concatenate([np.zeros(0, dtype), *self._in_memory[name]])
            for name, dtype in DTYPES.items()
        }

    def _rename(self, written: Path, folder: Path) -> None:
        try:
            os.rename(written, folder)  # noqa: PTH104 - must fail, not replace, when another process was first
        except OSError:  # then the arrays there are the same as these
            return
        self._folder = None

    def _move_to_memory(self) -> None:
        for name, dtype in DTYPES.items():
            path, length = self._path(name), self._lengths[name]  # a batch written in part may lie behind it
            try:
                array = np.fromfile(path, dtype, length, offset=len(_header(name, 0)))
            except OSError:
                array = np.zeros(0, dtype)
            if len(array) != length:
                fault = "the tokens written there cannot be read back"
                raise DataError(str(path), fault, "check the disk, or set TUNESMITH_CACHE to another folder")
            self._in_memory[name] = [array]
        self._remove_folder()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.npy"

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _header(name: str, length: int) -> bytes:
    """The start of a .npy file; of one size for every length, because NumPy leaves room for it to grow."""
    header = BytesIO()
    descr = npy.dtype_to_descr(np.dtype(DTYPES[name]))
    npy.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (length,)})
    return header.getvalue()


def load_arrays(folder: Path) -> tuple[Arrays, tuple[str, ...]] | None:
    """The arrays and files kept in ``folder``; None where they are not there, or torn: then it is removed."""
    if not folder.is_dir():
        return None
    try:
        arrays = _mapped(folder)
        files = tuple(json.loads((folder / _FILES).read_text(encoding="utf-8")))
        if not len(arrays["ids"]) == len(arrays["trained"]) == arrays["starts"][-1]:
            raise ValueError("arrays of different rows")
    except (OSError, ValueError, EOFError, LookupError):
        # Torn, as by a power cut: out of the way, so that the rows can be kept again.
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return arrays, files


def _remove_leftovers(cache_dir: Path) -> None:
    for folder in cache_dir.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):  # another process may be done with it just now
            if folder.stat().st_mtime < time.time() - _LEFT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _mapped(folder: Path) -> Arrays:
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in DTYPES}
