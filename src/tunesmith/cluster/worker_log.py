"""What a worker process writes, kept in the run's folder: one file for each worker."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

LOGS = "logs"
_STREAMS = (1, 2)  # standard output and error, as the system numbers them


class WorkerLog:
    """Where standard output and error of this process go: the launcher's files, after ``open`` one in the run's folder.

    Attributes:
        path: of that file; None before ``open``, and where the folder cannot be reached.
    """

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._begun = [os.fstat(stream).st_size for stream in _STREAMS]
        self.path: Path | None = None

    def open(self, folder: Path) -> None:
        """From now on into ``logs/worker-N.log`` of the run's ``folder``; what was written before is copied there.

        The system itself is told, so that libraries in C and processes started from here write there too, and what a
        killed worker wrote is there. A worker that was started again goes on in the same file. Where the folder cannot
        be reached, as from another machine, that is said on standard error.
        """
        path = folder / LOGS / f"worker-{self._rank}.log"
        try:
            # Not its parents: a folder of that name on another machine would not be the run's.
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            fault = f"cannot be reached from here ({error.strerror})"
            print(f"{path}: {fault}; this worker's log stays with Ray", file=sys.stderr, flush=True)
            return
        streams = _STREAMS[:1] if os.path.sameopenfile(*_STREAMS) else _STREAMS
        before = b"".join(_written_since(s, begun) for s, begun in zip(streams, self._begun, strict=False))
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        head = f"--- {now} worker {self._rank} of {self._world}, process {os.getpid()}\n"
        os.write(file, head.encode() + before)
        _flush()
        for stream in _STREAMS:
            os.dup2(file, stream)
        os.close(file)
        for text in (sys.stdout, sys.stderr):
            if isinstance(text, io.TextIOWrapper):
                text.reconfigure(line_buffering=True)  # a killed process leaves all whole lines
        self.path = path


@contextmanager
def worker_log(rank: int, world: int) -> Iterator[WorkerLog]:
    """A log for the block; afterwards both streams go where they went before."""
    _flush()
    before = [os.dup(stream) for stream in _STREAMS]
    try:
        yield WorkerLog(rank, world)
    finally:
        _flush()
        for stream, kept in zip(_STREAMS, before, strict=True):
            os.dup2(kept, stream)
            os.close(kept)


def _written_since(stream: int, begun: int) -> bytes:
    """What a stream's file got from ``begun`` on; nothing where it is no file, or the system does not tell which."""
    _flush()
    name = Path(f"/proc/self/fd/{stream}")  # Linux only
    if name.is_file():
        with suppress(OSError), name.open("rb") as file:
            file.seek(begun)
            return file.read()
    return b""


def _flush() -> None:
    for text in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a full disk
            text.flush()
