"""What an operating system's error while saving means for the user."""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import CheckpointError, OutputError, TunesmithError

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})
# Rust libraries (safetensors, tokenizers) raise their own exception types; the number is only in the text.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class Need:
    """How much room something takes."""

    bytes: int
    is_all: bool  # False: what was written until it failed, so more than this is needed


def shown_error(
    error: BaseException, final: Path, temporary: Path, need: Need, free_bytes: Callable[[Path], int]
) -> TunesmithError | None:
    """The error to show when writing ``final`` by way of ``temporary`` failed with ``error``.

    None lets ``error`` pass as it is: it already names its place, or no operating system's error is
    behind it.
    """
    if isinstance(error, TunesmithError) and not error.place.startswith(str(temporary)):
        return None
    system = _system_error(error)
    if system is None:
        return None
    if system.errno in _NO_SPACE:
        return _no_space(system, final, need, free_bytes)
    place = _place(system, final)
    if system.errno in _NOT_WRITABLE:
        fault = f"cannot be written ({system.strerror})"
        return OutputError(place, fault, "give write access to it or set output_dir elsewhere")
    if system.errno == errno.EFBIG:
        fault = "a file in it is larger than this process or disk allows"
        return CheckpointError(place, fault, "raise the limit (ulimit -f); nothing half-written was left")
    fault = f"could not be saved ({system.strerror})"
    return CheckpointError(place, fault, "check the disk; nothing half-written was left")


def human_bytes(count: int) -> str:
    """A byte count for people, in powers of 1000: ``human_bytes(12_300_000) == "12.3 MB"``."""
    if count < 1000:
        return f"{count} bytes"
    size = count / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if isinstance(error, Exception) and (match := _RUST_OS_ERROR.search(str(error))):
            number = int(match[1])
            return OSError(number, os.strerror(number))
        error = error.__cause__
    return None


def _place(system: OSError, final: Path) -> str:
    if isinstance(system.filename, str | bytes):
        named = Path(os.fsdecode(system.filename))
        if named.is_absolute() and not named.is_relative_to(final.parent):
            return str(named)  # e.g. a source file that a writer could not read
    return str(final)


def _no_space(system: OSError, final: Path, need: Need, free_bytes: Callable[[Path], int]) -> CheckpointError:
    existing = next(path for path in final.parents if path.exists())
    try:
        # Asked after the half-written part is gone, so that it compares with the need.
        free = f", has {human_bytes(free_bytes(existing))} free"
    except OSError:
        free = ""
    quota = ": your quota is used up" if system.errno == errno.EDQUOT else ""
    needs = f"needs {'' if need.is_all else 'more than '}{human_bytes(need.bytes)}"
    fault = f"no space left on the disk{quota} ({needs}{free})"
    remedy = "free some space or set output_dir to another disk; nothing half-written was left"
    return CheckpointError(str(final), fault, remedy)
