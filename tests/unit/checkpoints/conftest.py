"""Real disks that are full or read-only, operations that fail on cue, and manifests to save."""

import errno
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tunesmith.checkpoints.atomic import FileOps
from tunesmith.checkpoints.manifest import FORMAT, BaseWeights, FileStamp, Manifest

CHANGES = ("make_folder", "write_bytes", "copy_file", "fsync", "rename", "remove")


class UnflushedOps(FileOps):
    """The real operations without waiting for the disk; no test here cuts its power."""

    def fsync(self, path: Path) -> None:
        assert path.exists()


class CountedOps(UnflushedOps):
    """The real operations; before the ``at``-th change (from 0) ``act`` is called instead or as well.

    ``act`` may raise or end the process. ``once`` False: it is called from then on.
    """

    def __init__(self, at: int | None = None, act: Callable[[], None] = lambda: None, *, once: bool = True):
        self.log: list[tuple[str, Path]] = []
        self.at, self.act, self.once = at, act, once

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in CHANGES:
            return method

        def counted(path: Path, *rest: Any) -> None:
            index = len(self.log)
            self.log.append((name, path))
            if self.at is not None and (index == self.at or (index > self.at and not self.once)):
                self.act()
            method(path, *rest)

        return counted


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken_disk() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def run_killed(work: Callable[[FileOps], None], at: int) -> bool:
    """Run ``work`` in a fork that gets SIGKILL before its ``at``-th change; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        try:
            work(CountedOps(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def build_manifest(files: Mapping[str, FileStamp], **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "format": FORMAT,
        "method": "lora",
        "tag": "org/tiny:alice:abcde",
        "run": "run-1",
        "model_id": "org/tiny",
        "base": BaseWeights("org/tiny", "0123abc", {"model.safetensors": "ab" * 32}, "cd" * 32),
        "step": 120,
        "epoch": 1.5,
        "eval_loss": 1.25,
        "metrics": {"exact_match": 0.5},
        "config": {"learning_rate": 1e-4, "lora_config": {"r": 8, "target_modules": ["q_proj"]}},
        "data": {"train": {"path": "train.jsonl", "sha256": "ef" * 32, "rows": 7}},
        "versions": {"tunesmith": "0.1.0"},
        "created": "2026-01-02T03:04:05+00:00",
        "parent": None,
        "files": files,
    }
    return Manifest(**(values | changes))


def hidden_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


@pytest.fixture
def tools() -> Any:
    """The helpers of this file, which tests cannot import as a module."""

    class Tools:
        counted = CountedOps
        unflushed = UnflushedOps()
        no_space = staticmethod(no_space)
        broken_disk = staticmethod(broken_disk)
        faults: ClassVar = {"no space left on the disk": no_space, "could not be saved": broken_disk}
        run_killed = staticmethod(run_killed)
        manifest = staticmethod(build_manifest)
        hidden_in = staticmethod(hidden_in)

    return Tools


@pytest.fixture
def as_ordinary_user() -> Iterator[Path]:
    """An empty folder of root's that all may read, seen by a user who is not root."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        if not all(parent.stat().st_mode & stat.S_IXOTH for parent in Path(folder).parents):
            pytest.skip("the folder for temporary files is closed to other users")
        yield Path(folder)
        os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; skipped where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tunesmith-test", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
