"""The bytes of a file at a URL, in blocks: a broken line costs the block it broke in, and no torn file is taken.

Each block is asked for again a bounded number of times and must have its length; at the end the file must still be
the one it was at the beginning.
"""

import errno
import hashlib
import io
import os
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.storage.faults import TornTransfer, told
from tunesmith.storage.places import Found, Place, look
from tunesmith.storage.retries import retried

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 8 * 2**20
_AT_ONCE = 4  # blocks of a file
_TIMES = 3  # that a file is fetched anew because it became another meanwhile
_MD5 = re.compile(r"\"?([0-9a-f]{32})\"?\Z")
CHANGED = "was changed while it was read"
RUN_AGAIN = "run again when nothing writes to it"


def download(file: Place, target: Path) -> Found:
    """Copy ``file`` to ``target``, which is there whole or not at all; size and, where offered, MD5 are checked.

    Raises:
        file.error: it is not there, cannot be read, does not say its size, or changes again and again.
        OSError: ``target`` cannot be written.
    """
    part = target.with_name(f".{target.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for _ in range(_TIMES):
            found = _must_be_there(file)
            if found.size is None:
                raise file.error(
                    file.url, "its size is not told, so a torn copy would go unseen", "copy it here"
                )
            _fill(file, found, found.size, part)
            if _must_be_there(file) == found:
                _check_md5(file, found, part)
                part.rename(target)
                return found
        raise file.error(file.url, CHANGED, RUN_AGAIN)
    finally:
        part.unlink(missing_ok=True)


class RemoteFile(io.RawIOBase):
    """Reads a file at a URL from its start to its end.

    Args:
        file: what is read; where its store can give parts of it, a broken line is taken up where it broke.
        found: what is there.

    Raises:
        file.error: from reading, where it cannot be read on or has become another file.
    """

    def __init__(self, file: Place, found: Found) -> None:
        super().__init__()
        self._file, self._found = file, found
        self._at, self._block, self._used = 0, b"", 0
        self._stream: Any = None
        if not (found.is_ranged and found.size is not None):
            with told(file.url, file.error):
                self._stream = retried(lambda: file.fs.open(file.path, "rb"))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        if self._used == len(self._block):
            self._block, self._used = self._next(), 0
            if not self._block:
                return 0
        piece = self._block[self._used : self._used + len(view)]
        view[: len(piece)] = piece
        self._used += len(piece)
        return len(piece)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        super().close()

    def _next(self) -> bytes:
        size = self._found.size
        with told(self._file.url, self._file.error):
            if self._stream is not None:
                block = bytes(self._stream.read(BLOCK))
                if not block and size is not None and self._at != size:
                    raise TornTransfer(f"ended after {self._at} of {size} bytes")
            else:
                assert size is not None
                block = _block(self._file, self._at, min(self._at + BLOCK, size)) if self._at < size else b""
        self._at += len(block)
        if not block and self._stream is None and _must_be_there(self._file) != self._found:
            raise self._file.error(self._file.url, CHANGED, RUN_AGAIN)
        return block


def _fill(file: Place, found: Found, size: int, part: Path) -> None:
    with part.open("wb") as out, told(file.url, file.error):
        if not found.is_ranged:
            retried(lambda: _copy(file, size, out))
            return

        def fetch(start: int) -> None:
            data = _block(file, start, min(start + BLOCK, size))
            if os.pwrite(out.fileno(), data, start) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        _all(fetch, range(0, size, BLOCK))


def _copy(file: Place, size: int, out: io.BufferedWriter) -> None:
    out.seek(0)
    out.truncate()
    with file.fs.open(file.path, "rb") as stream:
        while data := stream.read(BLOCK):
            out.write(data)
    if out.tell() != size:
        raise TornTransfer(f"{out.tell()} of {size} bytes came")


def _all(fetch: Callable[[int], None], starts: range) -> None:
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        for done in [pool.submit(fetch, start) for start in starts]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _block(file: Place, start: int, end: int) -> bytes:
    def fetch() -> bytes:
        data = bytes(file.fs.cat_file(file.path, start=start, end=end))
        if len(data) != end - start:
            raise TornTransfer(f"{len(data)} bytes came instead of {end - start} from byte {start} on")
        return data

    return retried(fetch)


def _must_be_there(file: Place) -> Found:
    found = look(file)
    if found is None:
        raise file.error(file.url, "not found", "check the address")
    return found


def _check_md5(file: Place, found: Found, part: Path) -> None:
    expected = found.md5 or _md5_of_s3(file, found)
    if expected is None:
        return
    with part.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != expected:
        raise file.error(file.url, f"what came has MD5 {digest}, the store's has {expected}", "try again")


def _md5_of_s3(file: Place, found: Found) -> str | None:
    """S3's ETag, where it is the MD5: not of uploads in parts, nor under keys of the customer's or of KMS."""
    match = _MD5.match((found.tag or "").removeprefix("ETag "))
    if match is None or not hasattr(file.fs, "call_s3"):
        return None
    bucket, _, key = file.path.partition("/")
    with told(file.url, file.error):
        head = retried(lambda: file.fs.call_s3("head_object", Bucket=bucket, Key=key))
    is_own = head.get("ServerSideEncryption") in (None, "AES256") and not head.get("SSECustomerAlgorithm")
    return match[1] if is_own else None
