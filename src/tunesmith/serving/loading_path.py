"""Folders of the loading path as models: which there are, of what kind, whether they have changed.

A model is a folder ``{root}/{base}:{suffix}`` or ``{root}/{name}``; a name with slashes lies as many folders deep.
Nothing outside the path is ever reached, through links neither.
"""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from tunesmith.checkpoints.manifest import MANIFEST_NAME
from tunesmith.serving.memory import Kind
from tunesmith.serving.protocol import MAX_NAME, NAME

MAX_LISTED = 10_000
DEEPEST = 3  # org/model:user:letters is 2
_NAME = re.compile(rf"{NAME[:-1]}\Z")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_BASE_FILES = ("config.json", MANIFEST_NAME)
# Also what decides how a model speaks, see ``chat.py``.
_STAMPED = (
    *_ADAPTER_FILES, *_BASE_FILES, "tokenizer_config.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json",
)  # fmt: skip

FileStamp = tuple[int, int, int] | None  # inode, bytes, nanoseconds
Stamp = tuple[FileStamp, ...]  # of each of _STAMPED, and of a base's weights


class LoadingPath:
    """The folder of models; ``root`` None: there is none, and nothing is found."""

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def at(self, name: str) -> Path | None:
        """``{root}/{name}`` if the name is a good one; links and contents are not yet looked at."""
        if self.root is None or len(name) > MAX_NAME or not _NAME.match(name):
            return None
        if any(part in ("", ".", "..") for part in name.split("/")):
            return None
        return self.root / name

    def find(self, name: str) -> Path | None:
        """The model's folder of exactly this name."""
        folder = self.at(name)
        return folder if folder is not None and kind_of(folder) and self.holds(folder) else None

    def holds(self, folder: Path) -> bool:
        """Whether the folder and all in it lie in the loading path once links are followed."""
        if self.root is None:
            return False
        try:
            root = self.root.resolve(strict=True)
            if not folder.resolve(strict=True).is_relative_to(root):
                return False
            links = [entry.path for entry in os.scandir(folder) if entry.is_symlink()]
            return all(Path(link).resolve(strict=True).is_relative_to(root) for link in links)
        except (OSError, RuntimeError):  # a link to nowhere, or in a circle
            return False

    def name_of(self, folder: Path) -> str:
        """By which ``find`` finds it."""
        assert self.root is not None
        return folder.relative_to(self.root).as_posix()

    def models(self) -> Iterator[tuple[str, Path, Kind]]:
        """Every model: its name, folder and kind."""
        yield from self._below(self.root, "", DEEPEST)

    def _below(self, place: Path | None, above: str, depth: int) -> Iterator[tuple[str, Path, Kind]]:
        if place is None:
            return
        try:
            with os.scandir(place) as entries:
                inside = sorted(e.name for e in entries if _NAME.match(e.name))[:MAX_LISTED]
        except OSError:  # gone, or not to be read: it has no models to offer
            return
        for entry in inside:
            folder, name = place / entry, f"{above}{entry}"
            kind = kind_of(folder)
            if kind is None:
                if depth > 1 and not folder.is_symlink() and folder.is_dir():
                    yield from self._below(folder, f"{name}/", depth - 1)
            elif self.holds(folder):
                yield name, folder, kind


def kind_of_names(names: Collection[str]) -> Kind | None:
    """What a folder with files of these names is, where they are but names; see ``kind_of``."""
    if all(name in names for name in _ADAPTER_FILES):
        return "adapter"
    weights = any(_is_base_weights(name) for name in names if "/" not in name)
    return "base" if weights and all(name in names for name in _BASE_FILES) else None


def kind_of(folder: Path) -> Kind | None:
    """What lies there: an adapter, or a full-parameter checkpoint of ours, which is a base; None: no model."""
    try:
        if all((folder / name).is_file() for name in _ADAPTER_FILES):
            return "adapter"
        has_weights = any(_is_base_weights(file.name) for file in folder.glob("*.safetensors"))
        if has_weights and all((folder / name).is_file() for name in _BASE_FILES):
            return "base"
    except (OSError, ValueError):
        return None
    return None


def _is_base_weights(name: str) -> bool:
    # Half an adapter beside a config.json is no base.
    return name.endswith(".safetensors") and name not in _ADAPTER_FILES


def stamp_of(folder: Path) -> Stamp:
    """Differs where the model's files do; reads none of them."""
    weights = sorted(folder.glob("*.safetensors")) if kind_of(folder) == "base" else []
    return tuple(_stamp(file) for file in [*(folder / name for name in _STAMPED), *weights])


def changed(folder: Path) -> int:
    """When the model was made, in seconds since 1970."""
    for name in (_ADAPTER_FILES[0], _BASE_FILES[0]):
        found = _stamp(folder / name)
        if found is not None:
            return found[2] // 10**9
    return 0


def _stamp(file: Path) -> FileStamp:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
