"""A local file opened so that reading it ends, whatever becomes of the file meanwhile.

Between looking at a path and opening it a pipe may take the file's place, and a file that is written to
while it is read may have no end. Neither may hang a run.
"""

import io
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from tunesmith.errors import DataError, printable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHANGED = "was changed while it was read"
RUN_AGAIN = "run again when nothing writes to it"


def open_regular(file: str) -> "WatchedFile":
    """Open a regular file, without waiting for the writer of a pipe.

    Raises:
        OSError: it cannot be opened.
        DataError: it is a pipe, socket or device.
    """
    raw = io.FileIO(file, "rb", opener=_open_at_once)
    status = os.fstat(raw.fileno())
    if not stat.S_ISREG(status.st_mode):
        raw.close()
        raise not_regular(file)
    # Some virtual files have text but no size: their end has to be believed.
    return WatchedFile(raw, file, status.st_size or None)


def not_regular(file: str) -> DataError:
    """The error for a pipe, socket or device."""
    return DataError(printable(file), "is a pipe, socket or device", "name a regular file")


class WatchedFile(io.RawIOBase):
    """Reads a stream, and refuses to read more than it had when it was opened.

    Args:
        raw: the stream; closed with this one.
        name: the place named in an error.
        size: its bytes when it was opened; None: not known.
        on_bytes: called with all that is read, in order.

    Raises:
        DataError: from reading, when there is more than ``size``.
    """

    def __init__(
        self,
        raw: io.RawIOBase | io.BufferedIOBase,
        name: str,
        size: int | None,
        on_bytes: Callable[[memoryview], object] = lambda _data: None,
    ) -> None:
        super().__init__()
        self._raw = raw
        self._name = name
        self._left = size
        self.on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int | None:
        count = self._raw.readinto(buffer)
        if not count:
            return count
        if self._left is not None:
            self._left -= count
            if self._left < 0:
                raise DataError(printable(self._name), CHANGED, RUN_AGAIN)
        self.on_bytes(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
