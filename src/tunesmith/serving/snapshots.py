"""Copies of adapters by their content, which stay as they are while answers are made by them.

An adapter in the loading path may be replaced at any moment, and a process that loads it later would find another one
under its name. What is given to other processes is therefore a copy that is named by the hash of all in it.
"""

import hashlib
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path

from tunesmith.checkpoints.manifest import MANIFEST_NAME

_PLAIN_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")


class Snapshots:
    """Copies in a folder of its own, which goes with ``close``.

    Args:
        parent: where that folder is made; None: among the temporary files. Every process that reads the copies has
            to find them by the same path.
    """

    def __init__(self, parent: Path | None = None) -> None:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix="tunesmith-adapters-", dir=parent)).resolve()
        self._lock = threading.Lock()
        self._uses: Counter[str] = Counter()

    def take(self, folder: Path) -> str:
        """Copy the adapter in ``folder``; the name of its copy, which is equal for equal content. Wants a ``drop``.

        OSError where it cannot be read. Whether it is an adapter is for its readers to say.
        """
        new = Path(tempfile.mkdtemp(prefix="new-", dir=self.root))
        try:
            _copy(folder, new)
            name = _digest(new)
            with self._lock:
                if not self._uses[name]:
                    new.rename(self.root / name)
                self._uses[name] += 1
            return name
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def drop(self, name: str) -> None:
        """Take back one ``take``; the copy goes with the last."""
        with self._lock:
            self._uses[name] -= 1
            if not self._uses[name]:
                shutil.rmtree(self.root / name, ignore_errors=True)

    def close(self) -> None:
        """Remove all."""
        shutil.rmtree(self.root, ignore_errors=True)


def _copy(folder: Path, new: Path) -> None:
    if (folder / MANIFEST_NAME).is_file():
        # Whole and with its links as they are: the manifest is verified in the copy, and refuses links.
        shutil.copytree(folder, new, symlinks=True, dirs_exist_ok=True)
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _PLAIN_SUFFIXES:  # not what a trainer may have left beside it
            shutil.copyfile(file, new / file.name)


def _digest(folder: Path) -> str:
    """64 hex digits: of every file's name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{content}  {path.relative_to(folder).as_posix()!r}\n".encode())
    return digest.hexdigest()
