"""One process at a time in a run's folder."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import OutputError

LOCK_NAME = ".lock"
_LOOK_SECONDS = 0.2
_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` within the block. The kernel lets go of it when the process ends, however it ends.

    Raises:
        OutputError: another process holds it, or the folder cannot be written.
    """
    try:
        # Not inherited by children (PEP 446): a dataloader that outlives its parent must not hold the run.
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(str(folder), f"cannot be written ({error.strerror})", "check its owner") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                fault = f"cannot be locked ({error.strerror})"
                raise OutputError(str(folder), fault, "set output_dir to a file system with locks") from error
            raise OutputError(
                str(folder), f"is in use by process {_holder(descriptor)}", "wait for it to end, or stop it"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        # The file stays: removing it would let two processes lock two files of the same name.
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process holds ``folder`` now."""
    return lock_holder(folder) is not None


def lock_holder(folder: Path) -> str | None:
    """The id of the process that holds ``folder`` now; None: nobody does."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _holder(descriptor) if error.errno in _HELD else None
    finally:
        os.close(descriptor)
    return None


def wait_until_free(folder: Path, seconds: float) -> bool:
    """Wait until nobody holds ``folder``, for ``seconds`` at most; whether it is free."""
    waited_until = time.monotonic() + seconds
    while is_locked(folder):
        if time.monotonic() >= waited_until:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
