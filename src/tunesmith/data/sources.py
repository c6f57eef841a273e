"""JSONL files -> raw rows, each with the file and line it came from.

Rows are read as a stream: memory is bounded by the longest line, and that by ``MAX_LINE_BYTES``, also
inside gzip. What spoils one row is yielded as a ``Problem`` and reading goes on; what spoils a whole
file (missing, unreadable, UTF-16, damaged gzip) raises ``DataError``, because after it nobody can say how
many rows were lost. So does much text without a row in it: a few MB of gzip hold hours of it.
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from tunesmith.data.locations import open_file, read_errors, resolve_files
from tunesmith.data.problems import Problem, shorten
from tunesmith.data.watched_file import CHANGED, RUN_AGAIN
from tunesmith.errors import DataError, printable

__all__ = ["MAX_LINE_BYTES", "Problem", "RawRecord", "file_digest", "read_records", "resolve_files"]

MAX_LINE_BYTES = 64 * 2**20
_MOST_DROPPED_BYTES = 2**30  # of one line that is over the limit
_MOST_BLANK_BYTES = 2**20  # of blank lines between two rows
_CHUNK_BYTES = 2**20
_GZIP_MAGIC = b"\x1f\x8b"  # never valid UTF-8, so a plain file cannot start with it
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# Where UTF-16 and UTF-32 without a mark have zero bytes in the first two or one ASCII letters.
_UTF16_ZEROS = {(0, 1, 0, 1), (1, 0, 1, 0), (0, 1, 1, 1), (1, 1, 1, 0)}
# Formats people pass by mistake; none of these starts is valid JSON.
_FOREIGN_MAGIC = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
}


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One line of a data file, without its line end; ``line`` counts from 1."""

    text: str
    file: str
    line: int


def read_records(path: str, sha256: str | None = None) -> Iterator[RawRecord | Problem]:
    """Stream every row of the files that ``path`` names; blank lines count as lines but are no rows.

    Lines end at LF only, so U+2028 and U+0085 are data. CRLF and a byte order mark at the start of a file
    are accepted. Byte offsets count from 0, in the decompressed text where the file is gzip.

    Args:
        path: see ``resolve_files``.
        sha256: what ``file_digest`` gave before; None: whatever is there now is read.

    Raises:
        DataError: as ``resolve_files``, at once; while reading, when a file cannot be read on, is
            not UTF-8 text as a whole, has too much text without a row; at the end, when all files together
            have no row, or do not have the digest ``sha256``.
    """
    return _stream(path, resolve_files(path), sha256)


def file_digest(path: str) -> str:
    """SHA-256 (hex) of the stored bytes: of the file, or of the digests of several files in order.

    One file gives what ``sha256sum`` gives. Several are framed by their own digests, so that a byte that
    moves from one file to the next changes the result.
    """
    return _digest_of_all([_digest(file) for file in resolve_files(path)])


def _digest_of_all(digests: list[bytes]) -> str:
    if len(digests) == 1:
        return digests[0].hex()
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(file: str) -> bytes:
    digest = hashlib.sha256()
    with open_file(file) as stream, read_errors(file):
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()


def _stream(path: str, files: list[str], sha256: str | None) -> Iterator[RawRecord | Problem]:
    found = False
    digests = []
    for file in files:
        digest = hashlib.sha256()
        for row in _read_file(file, digest.update if sha256 is not None else None):
            found = True
            yield row
        digests.append(digest.digest())
    if sha256 is not None and _digest_of_all(digests) != sha256:
        raise DataError(printable(path), CHANGED, RUN_AGAIN)
    if not found:
        raise DataError(printable(path), "has no rows", "write one JSON object a line")


def _read_file(file: str, on_bytes: Callable[[memoryview], object] | None) -> Iterator[RawRecord | Problem]:
    with open_file(file, on_bytes or (lambda _data: None)) as raw:
        blank = 0
        for number, offset, data in _lines(_unpacked(raw, file), file):
            row = _decode(data, file, number, offset)
            if row is not None:
                blank = 0
                yield row
                continue
            blank += len(data)
            if blank > _MOST_BLANK_BYTES:
                place, fault = f"{printable(file)}:{number}", f"more than {_MOST_BLANK_BYTES:,} bytes"
                raise DataError(place, f"{fault} of blank lines without a row between them", "remove them")


def _unpacked(raw: io.BufferedReader, file: str) -> BinaryIO:
    """``raw`` itself, or a decompressing stream over it; refuses what is neither JSONL nor gzip."""
    with read_errors(file):
        head = raw.peek(8)
    if head.startswith(_GZIP_MAGIC):
        return cast("BinaryIO", gzip.GzipFile(fileobj=raw, mode="rb"))
    if file.endswith(".gz"):
        fault = "is named .gz but is " + ("not gzip" if head else "empty, which gzip never is")
        raise DataError(printable(file), fault, "rename it or compress it again")
    for magic, name in _FOREIGN_MAGIC.items():
        if head.startswith(magic):
            raise DataError(printable(file), f"is a {name} file", "convert it to JSONL, plain or .gz")
    return raw


def _lines(stream: BinaryIO, file: str) -> Iterator[tuple[int, int, bytes]]:
    """(number, byte offset, line with its LF); of a line over the limit only its first limit + 1 bytes."""
    offset = number = 0
    while data := _read_line(stream, file, MAX_LINE_BYTES + 1, offset):
        start, tail = offset, data
        number += 1
        offset += len(data)
        while tail and not tail.endswith(b"\n"):  # drops the rest of a line over the limit
            if offset - start > _MOST_DROPPED_BYTES:
                fault = f"line is longer than {_MOST_DROPPED_BYTES:,} bytes"
                raise DataError(f"{printable(file)}:{number}", fault, "write one JSON object a line")
            tail = _read_line(stream, file, _CHUNK_BYTES, offset)
            offset += len(tail)
        yield number, start, data


def _read_line(stream: BinaryIO, file: str, size: int, offset: int) -> bytes:
    with read_errors(file):
        try:
            return stream.readline(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            fault = f"gzip data is truncated or damaged after {offset} bytes of text"
            raise DataError(printable(file), fault, "fetch or compress the file again") from error


def _decode(data: bytes, file: str, number: int, offset: int) -> RawRecord | Problem | None:
    """One line as a record, as a problem, or None where it is blank."""
    if offset == 0 and _is_utf16(data):
        remedy = "save it as UTF-8, for example with iconv -f UTF-16 -t UTF-8"
        raise DataError(printable(file), "is UTF-16 or UTF-32 text", remedy)
    if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
        start = data[:400].decode("utf-8", errors="replace")
        return Problem(file, number, f"line is longer than {MAX_LINE_BYTES:,} bytes", shorten(start))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        piece = data[max(0, error.start - 20) : error.start + 60].rstrip(b"\r\n")
        rule = f"invalid UTF-8 at byte {offset + error.start} of the file"
        return Problem(file, number, rule, shorten(piece.decode("utf-8", errors="backslashreplace")))
    if offset == 0:
        text = text.removeprefix("\ufeff")
    text = text.removesuffix("\n").removesuffix("\r")
    return None if not text or text.isspace() else RawRecord(text, file, number)


def _is_utf16(start: bytes) -> bool:
    return start.startswith(_UTF16_MARKS) or tuple(int(byte == 0) for byte in start[:4]) in _UTF16_ZEROS
