"""Where a model comes from: back through the checkpoints that were continued, down to the base weights.

A checkpoint names its parent by the SHA-256 of the parent's manifest, which in turn names the parent's own parent
and lists the SHA-256 of its weights: no link of the chain can be exchanged without those behind it noticing.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoints.atomic import is_temporary
from tunesmith.checkpoints.locate import locate_model
from tunesmith.checkpoints.manifest import MANIFEST_NAME, BaseWeights, Manifest, Parent, identified
from tunesmith.checkpoints.store import BEST, CHECKPOINTS, FORWARDED
from tunesmith.errors import CheckpointError, ModelError

_ADAPTER_SETTING = "initial_adapter_model_ckpt_path"


@dataclass(frozen=True)
class Generation:
    """One checkpoint of a chain."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str


@dataclass(frozen=True)
class Lineage:
    """A chain of checkpoints, the asked one first, each trained on from the next.

    Attributes:
        generations: at least one.
        lost: why the chain could not be followed to its end; None: the last one was trained from ``base``.
    """

    generations: tuple[Generation, ...]
    lost: str | None

    @property
    def base(self) -> BaseWeights | None:
        """The weights at the beginning, where the chain leads there."""
        return self.generations[-1].manifest.base if self.lost is None else None

    def facts(self) -> dict[str, Any]:
        """JSON-serialisable; of the manifests all but settings and files."""
        return {
            "generations": [_facts(item) for item in self.generations],
            "base": asdict(self.base) if self.base else None,
            "lost": self.lost,
        }


def parent_of(folder: Path) -> Parent | None:
    """What a checkpoint trained on from the one in ``folder`` records of it; None where no manifest lies there.

    Raises:
        CheckpointError: the manifest cannot be read, or is not signed where it must be.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest, sha256 = identified(folder)
    return Parent(manifest.tag, manifest.run, manifest.step, sha256, str(folder.resolve()))


def trace(reference: str, output_dirs: Sequence[Path]) -> Lineage:
    """The chain of the checkpoint that ``reference`` means, see ``locate_model``.

    A parent is looked for where it lay, then in ``output_dirs`` and around both checkpoints, and taken only where
    its manifest has the recorded SHA-256. Its other files are not read; loading does that.

    Raises:
        ModelError: there is no such model.
        CheckpointError: it has no manifest that can be read, or is not signed where it must be.
    """
    folder = locate_model(reference, output_dirs)
    if folder is None:
        raise ModelError(reference, "no such trained model", "see: tunesmith models")
    generations = [Generation(folder, *identified(folder))]
    while True:
        child = generations[-1]
        parent = _parent(child.manifest)
        if not isinstance(parent, Parent):
            return Lineage(tuple(generations), parent)
        try:
            generations.append(_found(child, parent, output_dirs))
        except CheckpointError as error:
            return Lineage(tuple(generations), str(error))


def _parent(child: Manifest) -> Parent | str | None:
    """What ``child`` was trained on from; a text where that is not recorded; None: from base weights."""
    continued = child.config.get(_ADAPTER_SETTING)
    if child.parent_adapter is not None:
        return child.parent_adapter
    if continued is not None:
        return f"it continued the adapter {continued}, of which no manifest was recorded"
    if child.parent_base is None and child.parent is not None and child.code_version is None:
        return f"it continued {child.parent}, which an older tunesmith recorded by name alone"
    return child.parent_base


def _found(child: Generation, parent: Parent, output_dirs: Sequence[Path]) -> Generation:
    """The checkpoint that ``parent`` describes. Raises CheckpointError where it is gone or another."""
    recorded = Path(parent.folder)
    # A run's checkpoints lie two or three levels below its output folder.
    around = [*child.folder.resolve().parents[1:3], *recorded.parents[1:3]]
    for folder in (recorded, *_checkpoints_in([*output_dirs, *around])):
        if _sha256(folder / MANIFEST_NAME) == parent.manifest_sha256:
            found = Generation(folder, *identified(folder))
            _refuse_other_base(child.manifest, found, parent)
            return found
    what = f"{parent.tag}, step {parent.step} of {parent.run}"
    there = _sha256(recorded / MANIFEST_NAME)
    fault = (
        f"the parent ({what}) is not there any more, nor in {', '.join(map(str, output_dirs))}"
        if there is None
        else f"holds another checkpoint than the parent ({what}): its manifest's SHA-256 is {there[:12]}, "
        f"recorded was {parent.manifest_sha256[:12]}"
    )
    raise CheckpointError(parent.folder, fault, "name the folder that holds its run with --output-dir")


def _refuse_other_base(child: Manifest, found: Generation, parent: Parent) -> None:
    """Base weights are also known by content: what was loaded must be what the parent's manifest lists."""
    if parent is not child.parent_base:
        return
    listed = {name: stamp.sha256 for name, stamp in found.manifest.files.items()}
    if any(listed.get(name) != sha256 for name, sha256 in child.base.files.items()):
        fault = "its weights were other ones than its manifest lists when they were trained on"
        raise CheckpointError(str(found.folder), fault, "")


def _checkpoints_in(output_dirs: Sequence[Path]) -> Iterator[Path]:
    patterns = (f"*/{BEST}", f"*/{CHECKPOINTS}/*", f"{FORWARDED}/**")
    for output_dir in dict.fromkeys(output_dirs):
        for pattern in patterns:
            with suppress(OSError):  # what cannot be looked into has nothing to offer
                for manifest in sorted(output_dir.glob(f"{pattern}/{MANIFEST_NAME}")):
                    if not any(map(is_temporary, manifest.parents)):
                        yield manifest.parent


def _sha256(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _facts(item: Generation) -> dict[str, Any]:
    manifest = asdict(item.manifest)
    left_out = ("format", "base", "config", "files")
    facts = {key: value for key, value in manifest.items() if key not in left_out}
    return {"folder": str(item.folder), "manifest_sha256": item.manifest_sha256} | facts
