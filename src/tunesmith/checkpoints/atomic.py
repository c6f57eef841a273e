"""Files and folders that appear on the disk whole or not at all.

Everything is written beside its final place under a name no reader looks at, flushed to the disk,
and then renamed: a rename within one folder is atomic on POSIX file systems. A crash at any instant
therefore leaves the old state or the new one, plus at most hidden siblings named
``.{name}.tmp-{pid}-{random}`` (being written or removed) and ``.{name}.old-{pid}-{random}`` (the
folder being replaced), which ``remove_leftovers`` clears or puts back.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tunesmith.checkpoints.disk_errors import Need, shown_error
from tunesmith.errors import OutputError

_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-[0-9a-f]{8}$")

# How a rename fails where another process renames the same folder.
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT})
_ATTEMPTS = 100

# Names in use by this process. A container gives each process the same pid again after a restart, so
# "our own pid" alone doesn't say that a temporary name is still in use.
_in_use: set[str] = set()


class FileOps:
    """The changes to the disk that this package makes, one method each.

    A test passes a subclass that fails, or ends the process, at the n-th call.
    """

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write_bytes(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def copy_file(self, source: Path, target: Path) -> None:
        # A copy, never a hard link: a link would share any later damage with its source.
        shutil.copyfile(source, target)

    def fsync(self, path: Path) -> None:
        """Flush a file's content, or a folder's list of entries, to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot flush a folder; their entries are durable at once.
            if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all in it."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


REAL = FileOps()


def write_text(path: Path, text: str, *, fs: FileOps = REAL) -> None:
    """Write ``text`` as UTF-8 to ``path``, replacing what is there; missing parent folders are made.

    Raises:
        CheckpointError: no space, or the disk failed; ``path`` is as it was, or holds all of ``text``.
        OutputError: ``path`` cannot be written.
    """
    path = path.absolute()
    data = text.encode()
    with _temporary_name(path, "tmp") as temporary:
        try:
            _make_parents(path.parent, fs)
            fs.write_bytes(temporary, data)
            fs.fsync(temporary)
            fs.rename(temporary, path)
            fs.fsync(path.parent)
        except BaseException as error:
            _remove_quietly(temporary, fs)
            shown = shown_error(error, path, temporary, Need(len(data), is_all=True), fs.free_bytes)
            if shown is None:
                raise
            raise shown from error


def write_json(path: Path, value: Any, *, fs: FileOps = REAL) -> None:
    """Write ``value`` as indented UTF-8 JSON with ``write_text``'s guarantees.

    Mappings, sequences, sets, dataclasses and paths are accepted. NaN and infinities, which JSON
    lacks, become ``null``.
    """
    plain = _plain(value)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    if any("\ud800" <= character <= "\udfff" for character in text):
        # Half a surrogate pair, which a JSONL row may hold, has no UTF-8 form; escapes carry it.
        text = json.dumps(plain, indent=2, allow_nan=False)
    write_text(path, text + "\n", fs=fs)


def flush(path: Path, *, fs: FileOps = REAL) -> None:
    """Have on the disk what was written to the file ``path`` so far, if there is one.

    Raises:
        CheckpointError, OutputError: the disk failed.
    """
    try:
        fs.fsync(path)
    except FileNotFoundError:
        return  # nothing was written
    except OSError as error:
        raise shown_error(error, path, path, Need(0, is_all=False), fs.free_bytes) or error from error


@contextmanager
def whole_folder(
    final: Path, *, replace: bool = False, needs: int | None = None, fs: FileOps = REAL
) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it becomes ``final``, whole and flushed to the disk.

    On any exception what was written is removed and ``final`` is as it was before.

    Args:
        final: the folder's place; missing parents are made.
        replace: move a folder already there aside and remove it once the new one is in place.
        needs: bytes that will be written, where known; only for the message when space runs out.
        fs: the file operations.

    Raises:
        CheckpointError: no space, or the disk failed.
        OutputError: ``final`` cannot be written, or exists and ``replace`` is false.
    """
    final = final.absolute()
    with _temporary_name(final, "tmp") as temporary:
        try:
            if not replace:
                _refuse_existing(final)
            _make_parents(final.parent, fs)
            fs.make_folder(temporary)
            yield temporary
            _sync_tree(temporary, fs)
            _put_in_place(temporary, final, replace, fs)
        except BaseException as error:
            written = _bytes_under(temporary)
            _remove_quietly(temporary, fs)
            need = (
                Need(written, is_all=False) if needs is None or needs <= written else Need(needs, is_all=True)
            )
            shown = shown_error(error, final, temporary, need, fs.free_bytes)
            if shown is None:
                raise
            raise shown from error


def remove_folder(folder: Path, *, fs: FileOps = REAL) -> None:
    """Remove ``folder`` so that a crash halfway never leaves half of it under its own name.

    Raises:
        OSError: it could not be moved aside; it is still whole.
    """
    folder = folder.absolute()
    with _temporary_name(folder, "tmp") as aside:
        fs.rename(folder, aside)
        _remove_quietly(aside, fs)


def remove_leftovers(folder: Path, *, of: str | None = None, fs: FileOps = REAL) -> None:
    """Clear from ``folder`` what writers that no longer live left there, and undo a half-done replacement.

    ``of``: only what belongs to this name.

    Process ids mean something on one machine only: call this where all writers are on this machine.

    Raises:
        OutputError, CheckpointError: a replaced folder could not be put back in its place.
    """
    folder = folder.absolute()
    found = [
        (entry, match)
        for entry in _entries(folder)
        if (match := _LEFTOVER.match(entry.name))
        and of in (None, match["name"])
        and not _writer_lives(int(match["pid"]), entry.name)
    ]
    # The last one moved aside is the one to put back; any other is an earlier one that was in the way.
    found.sort(key=lambda item: item[0].lstat().st_ctime_ns, reverse=True)
    for entry, match in found:
        final = folder / match["name"]
        if match["kind"] == "old" and not os.path.lexists(final):
            try:
                fs.rename(entry, final)
                fs.fsync(folder)
            except OSError as error:
                need = Need(0, is_all=False)  # a rename needs next to no room
                raise shown_error(error, final, entry, need, fs.free_bytes) or error from error
        else:
            _remove_quietly(entry, fs)


def is_temporary(path: Path) -> bool:
    """Whether ``path`` bears a name under which this module writes, so that no reader should look at it."""
    return _LEFTOVER.match(path.name) is not None


@contextmanager
def _temporary_name(final: Path, kind: str) -> Iterator[Path]:
    name = f".{final.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"
    _in_use.add(name)
    try:
        yield final.with_name(name)
    finally:
        _in_use.discard(name)


def _writer_lives(pid: int, name: str) -> bool:
    if pid == os.getpid():
        return name in _in_use
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # it lives and belongs to someone else
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise OutputError(str(final), "exists already", "choose another name or remove it")


def _make_parents(folder: Path, fs: FileOps) -> None:
    missing: list[Path] = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process may make it at the same time
            fs.make_folder(path)
        fs.fsync(path.parent)


def _sync_tree(folder: Path, fs: FileOps) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                fs.fsync(path)
        fs.fsync(Path(root))


def _put_in_place(temporary: Path, final: Path, replace: bool, fs: FileOps) -> None:
    for left in reversed(range(_ATTEMPTS)):
        try:
            _try_in_place(temporary, final, replace, fs)
            return
        except OSError as error:
            # Another process puts its own folder here at this moment: the last one stays.
            if not (replace and left and error.errno in _TAKEN and temporary.exists()):
                raise


def _try_in_place(temporary: Path, final: Path, replace: bool, fs: FileOps) -> None:
    with _temporary_name(final, "old") as aside:
        with ExitStack() as undo:
            # Renaming onto an empty folder succeeds, so existence is asked, not tried.
            replacing = os.path.lexists(final)
            if replacing:
                if not replace:
                    _refuse_existing(final)
                fs.rename(final, aside)
                undo.callback(_put_back, aside, final, fs)
            fs.rename(temporary, final)
            undo.callback(fs.rename, final, temporary)
            fs.fsync(final.parent)
            undo.pop_all()
        if replacing:
            _remove_quietly(aside, fs)


def _put_back(aside: Path, final: Path, fs: FileOps) -> None:
    try:
        fs.rename(aside, final)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        _remove_quietly(aside, fs)  # another process has put a newer one here


def _remove_quietly(path: Path, fs: FileOps) -> None:
    # What is hidden and not removed now is removed by the next remove_leftovers; the error that
    # brought us here, or the success, matters more to the caller.
    if os.path.lexists(path):
        with contextlib.suppress(OSError):
            fs.remove(path)


def _bytes_under(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def _plain(value: Any) -> Any:
    """``value`` with JSON types only."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    return value
