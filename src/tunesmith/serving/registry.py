"""Names of models and what they mean now: the base, adapters in the loading path, adapters loaded by name.

An adapter is a folder in the loading path, ``{root}/{base}:{suffix}`` or ``{root}/{name}``; a tag with slashes
lies as many folders deep. It becomes a model by being there and ceases to be one by going; nothing runs in the
background, each request looks (again after ``fresh_seconds``). What a name meant is a version: a changed folder
is a new one, and answers that run finish on the old.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.serving.chat import Voice
from tunesmith.serving.faults import Refusal, bad_request, unknown_model, unloadable_model
from tunesmith.serving.protocol import MAX_NAME, NAME
from tunesmith.serving.seam import AdapterKey, Engine, EngineError, UnknownAdapter

MAX_LISTED = 10_000
_DEEPEST = 3  # org/model:user:letters is 2
_NAME = re.compile(rf"{NAME[:-1]}\Z")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_STAMPED = (*_ADAPTER_FILES, "tunesmith.json", "tokenizer_config.json", "chat_template.jinja")

Stamp = tuple[tuple[int, int, int] | None, ...]  # (inode, bytes, nanoseconds) of each of _STAMPED
ReadVoice = Callable[[Path, str], Voice]


@dataclass(frozen=True, eq=False)
class Version:
    """What a name means for one request; ``key`` None: the base."""

    name: str
    parent: str | None
    key: AdapterKey | None
    voice: Voice


@dataclass(frozen=True)
class Listed:
    """A model as ``GET /v1/models`` shows it; ``created`` is seconds since 1970."""

    name: str
    parent: str | None
    created: int


@dataclass
class _Entry:
    """A name that has been asked for. ``version`` None: its files are no adapter of this base."""

    folder: Path
    stamp: Stamp
    version: Version | None
    looked: float
    is_pinned: bool = False  # loaded by an administrator from a folder of another name


@dataclass
class _Names:
    entries: dict[str, _Entry] = field(default_factory=dict)
    hidden: dict[str, Stamp] = field(default_factory=dict)  # unloaded, until loaded again or changed
    listing: tuple[Listed, ...] = ()
    listed_at: float | None = None
    swept_at: float | None = None


class Registry:
    """Models by name. Safe to use from several threads; loading an adapter holds up only other loads and misses.

    Args:
        base: the base's name.
        voice: the base's.
        root: the loading path; None: the base alone.
        engine: loads and unloads.
        read_voice: (folder, name) -> an adapter's voice.
        report: told in one line why an adapter could not be loaded.
        fresh_seconds: how long what was seen on disk is taken to be so.
        now: a clock in seconds.
    """

    def __init__(
        self,
        base: str,
        voice: Voice,
        root: Path | None,
        engine: Engine,
        read_voice: ReadVoice,
        *,
        report: Callable[[str], None] = lambda _: None,
        fresh_seconds: float = 1.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base = Version(base, None, None, voice)
        self._started = int(time.time())
        self._root, self._engine, self._read_voice = root, engine, read_voice
        self._report, self._fresh, self._now = report, fresh_seconds, now
        self._names = _Names()
        self._lock = threading.Lock()

    def resolve(self, name: str, *, lost: Version | None = None) -> Version:
        """What ``name`` means now; loads it if need be.

        Args:
            name: of the base; or an adapter's tag or folder name, with or without ``{base}:``.
            lost: what it meant before, which the engine has put out of memory.

        Raises:
            Refusal: 404: there is no such model, or its files are no adapter of this base.
        """
        if name == self.base.name:
            return self.base
        entry = self._names.entries.get(name)
        if entry and lost is None and self._now() - entry.looked < self._fresh:
            return _version(name, entry)
        with self._lock:
            if lost is not None and entry is not None and entry.version is lost:
                entry.version, entry.stamp = None, ()  # to be loaded anew, and nothing to be given back
            return self._looked_up(name)

    def listed(self) -> tuple[Listed, ...]:
        """The base and every adapter, by name."""
        with self._lock:
            names = self._names
            if names.listed_at is None or self._now() - names.listed_at >= self._fresh:
                self._sweep()
                names.listing, names.listed_at = tuple(self._scan()), self._now()
            return names.listing

    def folder_of(self, name: str) -> Path | None:
        """The folder of the adapter that ``name`` means now, which is not loaded; None: a base, or no model."""
        with self._lock:
            entry = self._names.entries.get(name)
            if entry and entry.is_pinned:
                return entry.folder if _is_adapter(entry.folder) and self._is_inside(entry.folder) else None
            folder = self._find(name)
            return None if folder is None or self._is_hidden(name, folder) else folder

    def load(self, name: str, path: str | None = None) -> Version:
        """Load an adapter under ``name``, as a new version if the name has one. On failure nothing changes.

        Args:
            name: by which it is asked for from now on.
            path: its folder, relative to the loading path; None: the one of that name.

        Raises:
            Refusal: 400: a path that leaves the loading path, or files that are no adapter of this base;
                404: no such folder.
        """
        if name == self.base.name:
            raise bad_request(f"lora_name: {name} is the base's name", "lora_name")
        with self._lock:
            folder = self._find(name) if path is None else self._given(path)
            if folder is None:
                raise Refusal(404, f"{path or name}: no adapter there", "adapter_not_found", "lora_path")
            stamp = _stamp(folder)
            try:
                version = self._read(name, folder)
            except (TunesmithError, EngineError, OSError, ValueError) as error:
                raise bad_request(
                    f"{name}: {self._public(error)}", "lora_path", "adapter_not_loadable"
                ) from error
            self._put(name, _Entry(folder, stamp, version, self._now(), is_pinned=path is not None))
            self._names.hidden.pop(name, None)
            self._names.listed_at = None
            return version

    def unload(self, name: str) -> None:
        """Take ``name`` away; running answers finish. Its folder is passed over until loaded again or changed.

        Raises:
            Refusal: 404: no such adapter.
        """
        with self._lock:
            entry = self._names.entries.get(name)
            folder = entry.folder if entry else self._find(name)
            if name == self.base.name or folder is None or (entry is None and self._is_hidden(name, folder)):
                raise unknown_model(name)
            if not (entry and entry.is_pinned):
                # By every name that the folder goes by.
                for other in [
                    n for n, e in self._names.entries.items() if e.folder == folder and not e.is_pinned
                ]:
                    self._drop(other)
                for alias in {name, *self._aliases(folder)}:
                    self._names.hidden[alias] = _stamp(folder)
            else:
                self._drop(name)
            self._names.listed_at = None

    # Names and folders

    def _looked_up(self, name: str) -> Version:
        self._sweep()
        entry = self._names.entries.get(name)
        folder = entry.folder if entry and entry.is_pinned else self._find(name)
        if folder is not None and not (_is_adapter(folder) and self._is_inside(folder)):
            folder = None
        if folder is None or (entry is None and self._is_hidden(name, folder)):
            self._drop(name)
            raise unknown_model(name)
        stamp = _stamp(folder)
        if entry and entry.folder == folder and entry.stamp == stamp:
            entry.looked = self._now()
            return _version(name, entry)
        version: Version | None = None
        try:
            version = self._read(name, folder)
        except (TunesmithError, EngineError, OSError, ValueError) as error:
            self._report(f"model {name} cannot be loaded: {error}")
        is_pinned = entry is not None and entry.is_pinned
        self._put(name, _Entry(folder, stamp, version, self._now(), is_pinned))
        return _version(name, self._names.entries[name])

    def _find(self, name: str) -> Path | None:
        """The adapter's folder that ``name`` means in the loading path."""
        prefix = f"{self.base.name}:"
        for form in (name, f"{prefix}{name}", name.removeprefix(prefix)):
            folder = self._inside(form)
            if folder is not None and _is_adapter(folder) and self._is_inside(folder):
                return folder
        return None

    def _inside(self, name: str) -> Path | None:
        """``{root}/{name}`` if the name is a good one; links are not yet looked at."""
        if self._root is None or len(name) > MAX_NAME or not _NAME.match(name):
            return None
        if any(part in ("", ".", "..") for part in name.split("/")):
            return None
        return self._root / name

    def _is_inside(self, folder: Path) -> bool:
        """Whether the folder and all in it lie in the loading path once links are followed."""
        if self._root is None:
            return False
        try:
            root = self._root.resolve(strict=True)
            if not folder.resolve(strict=True).is_relative_to(root):
                return False
            links = [entry.path for entry in os.scandir(folder) if entry.is_symlink()]
            return all(Path(link).resolve(strict=True).is_relative_to(root) for link in links)
        except (OSError, RuntimeError):  # a link to nowhere, or in a circle
            return False

    def _given(self, path: str) -> Path | None:
        folder = self._inside(path)
        if folder is None:
            rule = "must be a folder below the loading path, by its relative name"
            raise bad_request(f"lora_path: {rule}", "lora_path", "path_not_allowed")
        if folder.exists() and not self._is_inside(folder):
            raise bad_request("lora_path: leads out of the loading path", "lora_path", "path_not_allowed")
        return folder if _is_adapter(folder) else None

    def _aliases(self, folder: Path) -> set[str]:
        assert self._root is not None
        prefix = f"{self.base.name}:"
        name = folder.relative_to(self._root).as_posix()
        return {name, name.removeprefix(prefix), name if name.startswith(prefix) else prefix + name}

    def _is_hidden(self, name: str, folder: Path) -> bool:
        hidden = self._names.hidden.get(name)
        if hidden is not None and hidden != _stamp(folder):
            del self._names.hidden[name]
            return False
        return hidden is not None

    def _scan(self) -> Iterator[Listed]:
        yield Listed(self.base.name, None, self._started)
        found = {name: _changed(folder) for name, folder in self._folders(self._root, "", _DEEPEST)}
        found |= {n: _changed(e.folder) for n, e in self._names.entries.items() if e.is_pinned}
        for name in sorted(found):
            yield Listed(name, self.base.name, found[name])

    def _folders(self, place: Path | None, above: str, depth: int) -> Iterator[tuple[str, Path]]:
        if place is None:
            return
        try:
            with os.scandir(place) as entries:
                inside = sorted(e.name for e in entries if _NAME.match(e.name))[:MAX_LISTED]
        except OSError:  # gone, or not to be read: it has no models to offer
            return
        for entry in inside:
            folder, name = place / entry, f"{above}{entry}"
            if not _is_adapter(folder):
                if depth > 1 and not folder.is_symlink() and folder.is_dir():
                    yield from self._folders(folder, f"{name}/", depth - 1)
            elif name != self.base.name and self._is_inside(folder) and not self._is_hidden(name, folder):
                yield name, folder

    # Versions

    def _read(self, name: str, folder: Path) -> Version:
        voice = self._read_voice(folder, name)
        return Version(name, self.base.name, self._engine.load(folder), voice)

    def _put(self, name: str, entry: _Entry) -> None:
        self._drop(name)
        if len(self._names.entries) >= MAX_LISTED:
            self._drop(next(iter(self._names.entries)))
        self._names.entries[name] = entry

    def _drop(self, name: str) -> None:
        entry = self._names.entries.pop(name, None)
        if entry is None or entry.version is None or entry.version.key is None:
            return
        try:
            self._engine.unload(entry.version.key)
        except UnknownAdapter:  # the engine has put it out of memory itself
            self._report(f"model {name} was no longer in memory")

    def _sweep(self) -> None:
        """Let go of adapters whose folders are gone, at most once every ``fresh_seconds``."""
        names = self._names
        if names.swept_at is not None and self._now() - names.swept_at < self._fresh:
            return
        names.swept_at = self._now()
        for name in [name for name, entry in names.entries.items() if not _is_adapter(entry.folder)]:
            self._drop(name)

    def _public(self, error: Exception) -> str:
        text = (
            f"{error.fault}; {error.remedy}"
            if isinstance(error, TunesmithError) and error.remedy
            else str(error)
        )
        for place in {str(self._root), str(self._root.resolve())} if self._root else set():
            text = text.replace(f"{place}/", "")
        return text


def _version(name: str, entry: _Entry) -> Version:
    if entry.version is None:
        raise unloadable_model(name)
    return entry.version


def _is_adapter(folder: Path) -> bool:
    try:
        return all((folder / name).is_file() for name in _ADAPTER_FILES)
    except (OSError, ValueError):
        return False


def _stamp(folder: Path) -> Stamp:
    return tuple(_stamp_of(folder / name) for name in _STAMPED)


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _changed(folder: Path) -> int:
    try:
        return int((folder / _ADAPTER_FILES[0]).stat().st_mtime)
    except OSError:
        return 0
