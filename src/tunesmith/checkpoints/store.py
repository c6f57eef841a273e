"""The checkpoints of one run: saved whole, ranked, pruned, and handed on.

Nothing is remembered between calls: which checkpoints there are and which is best is read from the
folders each time, so a process that resumes a run sees what the one before it saw.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Literal

from tunesmith.checkpoints.atomic import (
    REAL,
    FileOps,
    remove_folder,
    remove_leftovers,
    whole_folder,
)
from tunesmith.checkpoints.disk_errors import Need, shown_error
from tunesmith.checkpoints.manifest import (
    MANIFEST_NAME,
    FileStamp,
    Manifest,
    hash_files,
    read_manifest,
    verify,
    verify_sizes,
    write_manifest,
)
from tunesmith.checkpoints.naming import random_letters
from tunesmith.checkpoints.signature import carry_signature
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.paths import expanded

CHECKPOINTS = "checkpoints"
BEST = "best"
TRAINING = "training"  # the part of a checkpoint that only going on with the run needs
FORWARDED = "lora_fine_tuning"
Mode = Literal["min", "max"]
_STEP_FOLDER = re.compile(r"^step-(\d{6,})$")


@dataclass(frozen=True)
class Standing:
    """What decides which checkpoints are kept."""

    step: int
    score: float | None
    created: datetime


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on disk."""

    path: Path
    step: int
    score: float | None
    is_best: bool
    bytes: int  # of the files that serving needs


@dataclass(frozen=True)
class SavedCheckpoint(StoredCheckpoint):
    """A checkpoint that was saved just now."""

    seconds: float  # that saving took, with flushing to the disk and pruning


def ranked(standings: Iterable[Standing], mode: Mode) -> list[Standing]:
    """Best first. Of equal scores the earlier step leads; those without a score follow, newest first."""
    sign = 1.0 if mode == "min" else -1.0

    def rank(item: Standing) -> tuple[bool, float, float]:
        if item.score is None:
            return True, -item.created.timestamp(), -item.step
        return False, sign * item.score, item.step

    return sorted(standings, key=rank)


def newest(standings: Iterable[Standing]) -> Standing | None:
    """The last one saved. By time before step: a run resumed from an early step saves lower steps later."""
    return max(standings, key=lambda item: (item.created, item.step), default=None)


def steps_to_keep(standings: Iterable[Standing], keep: int, mode: Mode) -> set[int]:
    """The steps of the best ``keep`` checkpoints and of the newest one."""
    items = list(standings)
    last = newest(items)
    return {item.step for item in ranked(items, mode)[:keep]} | ({last.step} if last else set())


def read_checkpoints(run_dir: Path) -> dict[int, tuple[Path, Manifest]]:
    """The run's checkpoints by step. A folder without a readable manifest is left out; nothing is changed."""
    found, _ = _look_through(run_dir)
    return found  # the damaged are neither ranked nor pruned, so that nothing unread is deleted


def checkpoints_newest_first(run_dir: Path, damaged: list[str]) -> list[tuple[Path, Manifest]]:
    """The run's checkpoints with readable manifests, the last saved first; why others are not goes to ``damaged``."""
    found, faults = _look_through(run_dir)
    damaged.extend(f"passed over: {fault}" for fault in faults)
    order = sorted(_standings(found), key=lambda item: (item.created, item.step), reverse=True)
    return [found[item.step] for item in order]


def _look_through(run_dir: Path) -> tuple[dict[int, tuple[Path, Manifest]], list[CheckpointError]]:
    """The checkpoints by step, and what is wrong with the others."""
    found: dict[int, tuple[Path, Manifest]] = {}
    faults: list[CheckpointError] = []
    folder = run_dir / CHECKPOINTS
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _STEP_FOLDER.match(path.name):
            try:
                found[int(match[1])] = path, _manifest_of_step(path, int(match[1]))
            except CheckpointError as error:
                faults.append(error)
    return found, faults


def _manifest_of_step(path: Path, step: int) -> Manifest:
    manifest = read_manifest(path)
    if manifest.step != step:
        raise CheckpointError(
            str(path), f"holds the checkpoint of step {manifest.step}", "put it back in its place"
        )
    return manifest


def served_part(manifest: Manifest) -> Manifest:
    """The manifest of a copy without what only training needs."""
    files = {n: stamp for n, stamp in manifest.files.items() if not n.startswith(f"{TRAINING}/")}
    return dataclasses.replace(manifest, files=files)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The folder of the checkpoint that was saved last, or None."""
    found = read_checkpoints(run_dir)
    last = newest(_standings(found))
    return found[last.step][0] if last else None


class CheckpointStore:
    """Saves into ``{run_dir}/checkpoints/step-000120/`` and keeps the best ``keep`` plus the newest.

    To be built only in the one process that saves this run's checkpoints: it clears what an earlier
    process, killed while saving, left behind, and tells a live writer by its process id.

    Args:
        run_dir: the run's folder; made when first needed.
        keep: how many of the best to keep, at least 1.
        mode: whether a lower ("min") or a higher ("max") score is better.
        fs: the file operations.
    """

    def __init__(self, run_dir: Path, keep: int, mode: Mode = "min", *, fs: FileOps = REAL) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.run_dir = run_dir
        self.keep = keep
        self.mode = mode
        self._fs = fs
        self._clear()

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        manifest_for: Callable[[Mapping[str, FileStamp]], Manifest],
        score: float | None,
    ) -> SavedCheckpoint:
        """Save the checkpoint of ``step``, replacing an earlier one of it, then prune the others.

        Args:
            step: optimizer steps done.
            write: puts the checkpoint's files into the folder it is given.
            manifest_for: the manifest of a folder with these files; its ``score`` is set here.
            score: what checkpoints are ranked by; None or a non-finite one ranks behind all others.

        Raises:
            CheckpointError, OutputError: as ``whole_folder``; the earlier checkpoints are untouched.
            ValueError: ``write`` wrote no file, or the manifest is of another step.
        """
        started = time.perf_counter()
        self._clear()
        score = score if score is not None and math.isfinite(score) else None
        path = self.run_dir / CHECKPOINTS / f"step-{step:06d}"
        sizes = [manifest.total_bytes for _, manifest in read_checkpoints(self.run_dir).values()]
        with whole_folder(path, replace=True, needs=max(sizes, default=None), fs=self._fs) as folder:
            write(folder)
            files = hash_files(folder)
            manifest = dataclasses.replace(manifest_for(files), files=files, score=score)
            if not files or manifest.step != step:
                raise ValueError(
                    f"checkpoint of step {step}: {len(files)} files, manifest of {manifest.step}"
                )
            write_manifest(folder, manifest, fs=self._fs)
        self._prune(step)
        best = self.best()
        served = served_part(manifest)
        return SavedCheckpoint(
            path=path,
            step=step,
            score=score,
            is_best=best is not None and best.step == step,
            bytes=served.total_bytes,
            seconds=time.perf_counter() - started,
        )

    def best(self) -> StoredCheckpoint | None:
        """The best checkpoint on disk: by score, or the newest where none has a score."""
        found = read_checkpoints(self.run_dir)
        first = next(iter(ranked(_standings(found), self.mode)), None)
        if first is None:
            return None
        path, manifest = found[first.step]
        return StoredCheckpoint(path, first.step, first.score, True, served_part(manifest).total_bytes)

    def publish_best(self) -> Path:
        """Copy the best checkpoint to ``{run_dir}/best``, replacing what is there, and verify the copy.

        Raises:
            CheckpointError: there is no checkpoint, the best one is damaged, or the disk failed.
            OutputError: the folder cannot be written.
        """
        best = self.best()
        target = self.run_dir / BEST
        if best is None:
            raise CheckpointError(str(self.run_dir / CHECKPOINTS), "no checkpoint in it", "save one first")
        if not _is_copy_and_whole(best.path, target):
            _copy_checkpoint(best.path, target, self._fs)
        # A process that was killed between its last save and the pruning after it has left one too many.
        self._prune(best.step)
        self._clear()  # what a disk failing for a while did not remove
        return target

    def set_aside(self, path: Path) -> Path:
        """Give the damaged checkpoint ``path`` a name that no longer counts as one; what is left of it stays.

        Raises:
            OutputError, CheckpointError: the folder cannot be written.
        """
        aside = path.with_name(f"{path.name}.damaged-{random_letters()}")
        try:
            self._fs.rename(path, aside)
        except OSError as error:
            raise (
                shown_error(error, path, aside, Need(0, is_all=False), self._fs.free_bytes) or error
            ) from error
        return aside

    def _clear(self) -> None:
        for folder in (self.run_dir, self.run_dir / CHECKPOINTS):
            remove_leftovers(folder, fs=self._fs)

    def _prune(self, just_saved: int) -> None:
        found = read_checkpoints(self.run_dir)
        kept = steps_to_keep(_standings(found), self.keep, self.mode) | {just_saved}
        for step, (path, _) in found.items():
            if step not in kept:
                try:
                    remove_folder(path, fs=self._fs)
                except OSError:
                    continue  # the new checkpoint is safe; what stays is pruned after the next save


def forward(best: Path, storage_root: str, tag: str, *, fs: FileOps = REAL) -> str:
    """Copy the checkpoint ``best`` to ``{storage_root}/lora_fine_tuning/{tag}``, replacing an earlier one.

    A local copy appears whole or not at all. At a URL (anything fsspec knows) files appear one by one;
    the manifest is removed first and written last, so where it is, the rest is complete.

    Args:
        best: a checkpoint folder.
        storage_root: a folder or a URL.
        tag: the model's tag; "/" in it makes folders.
        fs: file operations for local copies.

    Returns:
        The folder or URL of the copy.

    Raises:
        CheckpointError: ``best`` is damaged, or space ran out.
        OutputError: the tag cannot be a folder, the place cannot be written or holds something else.
    """
    parts = tag_parts(tag)
    storage_root = storage_root.removeprefix("file://")
    if "://" in storage_root:
        from tunesmith.checkpoints.remote import upload_checkpoint

        return upload_checkpoint(best, storage_root, str(PurePosixPath(FORWARDED, *parts)))
    root = expanded(storage_root) / FORWARDED
    target = root.joinpath(*parts)
    for folder in target.parents:
        if folder == root:
            break
        if (folder / MANIFEST_NAME).exists():
            raise OutputError(str(folder), "is itself a forwarded model", f"choose another tag than {tag}")
    if target.exists() and not (target / MANIFEST_NAME).exists():
        raise OutputError(str(target), "exists and is no checkpoint", "move it away or choose another tag")
    # What a process that was killed while copying left; others' names are theirs to clear.
    remove_leftovers(target.parent, of=target.name, fs=fs)
    _copy_checkpoint(best, target, fs)
    return str(target)


def tag_parts(tag: str) -> list[str]:
    """The folders that a tag stands for. Raises OutputError where it cannot be a folder."""
    parts = tag.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise OutputError(f"model tag {tag!r}", "cannot be used as a folder name", "choose another tag")
    return parts


def _standings(found: Mapping[int, tuple[Path, Manifest]]) -> list[Standing]:
    return [
        Standing(step, manifest.score, datetime.fromisoformat(manifest.created))
        for step, (_, manifest) in found.items()
    ]


def _is_copy_and_whole(source: Path, copy: Path) -> bool:
    try:
        same = read_manifest(copy) == served_part(read_manifest(source))
        if same:
            verify(copy)
    except (OSError, CheckpointError):
        return False
    return same


def _copy_checkpoint(source: Path, target: Path, fs: FileOps) -> None:
    whole = read_manifest(source)
    verify_sizes(source, whole)  # names what is missing before anything is copied
    manifest = served_part(whole)
    with whole_folder(target, replace=True, needs=manifest.total_bytes, fs=fs) as folder:
        for name in manifest.files:
            for parent in reversed(PurePosixPath(name).parents[:-1]):
                if not (folder / parent).exists():
                    fs.make_folder(folder / parent)
            fs.copy_file(source / name, folder / name)
        if manifest == whole:
            fs.copy_file(source / MANIFEST_NAME, folder / MANIFEST_NAME)
            carry_signature(source / MANIFEST_NAME, folder / MANIFEST_NAME, fs=fs)
        else:
            write_manifest(folder, manifest, fs=fs)
        try:
            verify(folder)
        except CheckpointError as error:
            verify(source)  # a damaged source is the likelier fault, and the one to name
            fault = f"the copy differs from {source}"
            raise CheckpointError(str(target), fault, "check this disk and memory") from error
