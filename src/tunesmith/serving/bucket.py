"""A loading path at a URL: its models copied to a folder of this machine, and kept as the store has them.

The store is listed every few seconds. A new or changed model is fetched beside its place and appears by one rename of
a link, so that a request finds the old version or the new one; what is copied is never changed. A checkpoint of ours
is whole where its manifest is, and its files must have the digests in it. A folder without a manifest counts when two
looks have found it the same. While one that had a manifest has none it is being replaced, and the old one is served.
"""

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tunesmith.checkpoints.fetching import Replaced, fetch_listed, short_digest
from tunesmith.checkpoints.lock import locked
from tunesmith.checkpoints.manifest import MANIFEST_NAME
from tunesmith.errors import ConfigError, OutputError, TunesmithError
from tunesmith.models.catalog import cache_dir
from tunesmith.serving.loading_path import DEEPEST, LoadingPath, kind_of, kind_of_names
from tunesmith.storage.places import Found, Place, list_files, open_place
from tunesmith.storage.urls import is_url, shown

_SECONDS_BETWEEN = 2.0
_MOST_SECONDS = 60.0  # between two looks at a store that does not answer
_AGAIN_SECONDS = 30.0  # until a model that could not be had is tried again, as it is
_GRACE_SECONDS = 60.0  # that a version stays after its end: a load may be reading it
_SECONDS_TO_END = 1.0
_VERSIONS = ".versions"  # no model's name begins with a dot
_MOST_SERVERS = 64  # on one machine with the same URL

Say = Callable[[str], None]
Files = Mapping[str, Found]


@contextmanager
def local_root(place: str | None, say: Say) -> Iterator[Path | None]:
    """The loading path as a folder: the one it is, or the copy of a URL, kept up to date within the block.

    Raises:
        ConfigError: the URL cannot be used: no driver, no credentials, no bucket, no answer.
    """
    if place is None or not is_url(place):
        yield None if place is None else Path(place)
        return
    with _own_folder(place) as folder:
        mirror = Mirror(open_place(place, ConfigError), folder, say)
        mirror.begin()
        mirror.start()
        try:
            yield folder
        finally:
            mirror.stop()
            mirror.join(_SECONDS_TO_END)


class Mirror(threading.Thread):
    """Keeps ``folder`` as the models at ``place`` are. Nobody else may write to it.

    Args:
        place: of the loading path.
        folder: the copy.
        say: told what has come, changed, gone or cannot be had.
        seconds: between two looks.
        now: a clock in seconds.
    """

    def __init__(
        self,
        place: Place,
        folder: Path,
        say: Say,
        seconds: float = _SECONDS_BETWEEN,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(daemon=True, name="bucket of adapters")
        self._place, self._folder, self._say = place, folder, say
        self._seconds, self._now = seconds, now
        self._stopped = threading.Event()
        self._copied: dict[str, str] = {}  # name -> identity of what the folder has
        self._seen: dict[str, str] = {}  # name -> identity at the last look, of those not copied
        self._failed: dict[str, tuple[str, float]] = {}  # name -> identity, when to try again
        self._retired: dict[Path, float] = {}  # versions -> when to remove them

    def begin(self) -> None:
        """The first looks: what is there now is copied, what is left of another time removed.

        Raises:
            ConfigError: the store cannot be listed.
        """
        self.look()
        if self._seen:  # without a manifest: once more, so that they need not be waited for
            self._stopped.wait(min(1.0, self._seconds))
            self.look()
        linked = {link.resolve() for link in self._links().values()}
        for version in (self._folder / _VERSIONS).glob("*/*"):
            if version.resolve() not in linked:
                shutil.rmtree(version, ignore_errors=True)
        self._say(f"{len(self._copied)} of the models at {shown(self._place.url)} are here")

    def stop(self) -> None:
        """End, after what is being fetched."""
        self._stopped.set()

    def run(self) -> None:
        """Look again and again; a store that does not answer is told once and asked more seldom."""
        fault, wait = "", self._seconds
        while not self._stopped.wait(wait):
            try:
                self.look()
            except (TunesmithError, OSError) as error:
                if str(error) != fault:
                    self._say(f"The loading path is served as it was: {error}")
                fault, wait = str(error), min(2 * wait, _MOST_SECONDS)
                continue
            if fault:
                self._say(f"{shown(self._place.url)} answers again")
            fault, wait = "", self._seconds

    def look(self) -> None:
        """One look at the store, and all that follows from it.

        Raises:
            ConfigError: it cannot be listed.
        """
        files = list_files(self._place)
        models = models_in(files)
        for name, link in self._links().items():
            if name not in models and not self._is_being_replaced(name, link, files):
                self._remove(name, link)
        self._seen = {name: identity for name, identity in self._seen.items() if name in models}
        for name, own in models.items():
            if self._stopped.is_set():
                return
            self._look_at(name, own)
        for version in [version for version, until in self._retired.items() if self._now() >= until]:
            del self._retired[version]
            shutil.rmtree(version, ignore_errors=True)

    def _look_at(self, name: str, files: Files) -> None:
        identity = repr(sorted((file, found.size, found.tag) for file, found in files.items()))
        if self._copied.get(name) == identity and kind_of(self._folder / name):
            return
        if MANIFEST_NAME not in files:
            if self._has_manifest(name):
                return
            if self._seen.get(name) != identity:
                self._seen[name] = identity
                return
        failed, again = self._failed.get(name, ("", 0.0))
        if failed == identity and self._now() < again:
            return
        try:
            version = fetch_listed(self._place.below(name), files, self._versions_of(name))
            self._put(name, version)
        except Replaced:
            return
        except (TunesmithError, OSError) as error:
            if failed != identity:
                self._say(f"model {name} is not taken: {error}")
            self._failed[name] = identity, self._now() + _AGAIN_SECONDS
            return
        self._failed.pop(name, None)
        self._seen.pop(name, None)
        self._copied[name] = identity

    def _put(self, name: str, version: Path) -> None:
        link = self._folder / name
        before = link.resolve() if link.is_symlink() else None
        if before == version.resolve():
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
        new.symlink_to(os.path.relpath(version, link.parent))
        new.replace(link)
        self._retired.pop(version, None)
        if before is not None:
            self._retired[before] = self._now() + _GRACE_SECONDS
            self._say(f"model {name} has changed")

    def _remove(self, name: str, link: Path) -> None:
        self._retired[link.resolve()] = self._now() + _GRACE_SECONDS
        link.unlink()
        with suppress(OSError):  # not empty
            for folder in link.parents:
                if folder == self._folder:
                    break
                folder.rmdir()
        for known in (self._copied, self._failed):
            known.pop(name, None)
        self._say(f"model {name} is gone")

    def _links(self) -> dict[str, Path]:
        found = LoadingPath(self._folder).models()
        return {name: folder for name, folder, _ in found if folder.is_symlink()}

    def _is_being_replaced(self, name: str, link: Path, files: Files) -> bool:
        """Whether some of its files are still there, though it is no model now: removed ones lose all."""
        return self._has_manifest(name) and any(f"{name}/{file.name}" in files for file in link.iterdir())

    def _has_manifest(self, name: str) -> bool:
        return (self._folder / name / MANIFEST_NAME).is_file()

    def _versions_of(self, name: str) -> Path:
        return self._folder / _VERSIONS / short_digest(name)


def models_in(files: Files) -> dict[str, dict[str, Found]]:
    """The models among the files of a loading path: name -> its files by their names in its folder."""
    folders: dict[str, dict[str, Found]] = {}
    for name, found in files.items():
        for parent in _parents(name):
            folders.setdefault(parent, {})[name.removeprefix(f"{parent}/")] = found
    path = LoadingPath(Path())
    models = {name: own for name, own in folders.items() if path.at(name) and kind_of_names(own)}
    # As in a local loading path nothing is looked for inside a model.
    return {
        name: own for name, own in models.items() if not any(parent in models for parent in _parents(name))
    }


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, min(len(parts), DEEPEST + 1))]


@contextmanager
def _own_folder(url: str) -> Iterator[Path]:
    """The first folder of this URL in the cache that no other server uses."""
    with ExitStack() as stack:
        for number in range(_MOST_SERVERS):
            folder = cache_dir() / "serving" / f"{short_digest(url)}-{number}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
            except OSError as error:
                raise OutputError(
                    str(folder), f"cannot be made ({error.strerror})", "set TUNESMITH_CACHE"
                ) from error
            except OutputError as error:
                if "is in use" not in error.fault:
                    raise
                continue
            yield folder
            return
        raise ConfigError(shown(url), f"{_MOST_SERVERS} servers here have it as loading path", "stop one")
