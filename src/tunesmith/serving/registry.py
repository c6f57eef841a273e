"""Names of models and what they mean now: bases, adapters in the loading path, adapters loaded by name.

A folder of the loading path becomes a model by being there and ceases to be one by going; nothing runs in the
background, each request looks (again after ``fresh_seconds``). What a name meant is a version: a changed folder
is a new one, and answers that run finish on the old. Which of them are in memory is ``memory.py``'s affair.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunesmith.errors import ModelError, TunesmithError
from tunesmith.serving.bases import base_of
from tunesmith.serving.faults import (
    RETRY_SECONDS,
    Refusal,
    bad_request,
    is_stopping,
    unknown_model,
    unloadable_model,
)
from tunesmith.serving.footprint import adapter_bytes
from tunesmith.serving.loading_path import MAX_LISTED, LoadingPath, Stamp, changed, kind_of, stamp_of
from tunesmith.serving.memory import (
    LOAD_FAULTS,
    Adapter,
    Base,
    Claim,
    Closed,
    Gone,
    Memory,
    NoRoom,
    Resident,
    Unloadable,
    is_passing,
)
from tunesmith.serving.memory import Version as Version

_ATTEMPTS = 3  # a version may be replaced between look-up and claim


@dataclass(frozen=True)
class Listed:
    """A model as ``GET /v1/models`` shows it; ``created`` is seconds since 1970."""

    name: str
    parent: str | None
    created: int
    context_length: int
    is_loaded: bool


@dataclass
class _Entry:
    """A name that has been asked for. ``item`` None: it was found to be no model, for the reason in ``fault``."""

    folder: Path
    stamp: Stamp
    item: Resident | None
    looked: float
    fault: str | None = None
    is_pinned: bool = False  # loaded by an administrator from a folder of another name


@dataclass(frozen=True)
class _Checkpoint:
    """A full-parameter checkpoint in the loading path; ``base`` None: it cannot be served, ``fault`` says why."""

    stamp: Stamp
    base: Base | None
    fault: str = ""


@dataclass
class _Names:
    entries: dict[str, _Entry] = field(default_factory=dict)
    hidden: dict[str, Stamp] = field(default_factory=dict)  # unloaded, until loaded again or changed
    checkpoints: dict[Path, _Checkpoint] = field(default_factory=dict)
    discovered_at: float | None = None
    parents: dict[Path, tuple[Stamp, Base]] = field(default_factory=dict)
    listing: tuple[tuple[Listed, Path | None], ...] = ()
    listed_at: float | None = None
    swept_at: float | None = None


class Registry:
    """Models by name. Safe to use from several threads; nothing waits for a load but ``load``.

    Args:
        bases: those of the command line.
        root: the loading path; None: the bases alone.
        memory: loads and holds them.
        checkpoint: (name, folder) -> a full-parameter checkpoint of the loading path as a base.
        report: told in one line why a model could not be served.
        fresh_seconds: how long what was seen on disk is taken to be so.
        now: a clock in seconds.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        root: Path | None,
        memory: Memory,
        checkpoint: Callable[[str, Path], Base],
        *,
        report: Callable[[str], None] = lambda _: None,
        fresh_seconds: float = 1.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bases = tuple(bases)
        self._given = {base.name: base for base in bases}
        self._started = int(time.time())
        self._path, self._memory, self._checkpoint = LoadingPath(root), memory, checkpoint
        self._report, self._fresh, self._now = report, fresh_seconds, now
        self._names = _Names()
        self._lock = threading.Lock()

    def hold(self, name: str, claim: Claim, lost: Version | None = None) -> "Future[Version]":
        """Keep what ``name`` means now for as long as the claim lasts; loads it if need be, without waiting.

        Args:
            name: of a base; or an adapter's or checkpoint's tag or folder name, with or without ``{base}:``.
            claim: of the request.
            lost: what it meant before, which the engine has put out of memory by itself.

        Returns:
            It, once it is loaded; else what ``refused`` makes a refusal of.

        Raises:
            Refusal: 404: there is no such model, or its files are none.
        """
        for _ in range(_ATTEMPTS):
            item = self._given.get(name) or self._meaning(name, lost)
            try:
                return claim.hold(item)
            except Unloadable:
                raise unloadable_model(name) from None
            except Gone:  # replaced at this very moment
                if claim.is_closed:
                    break
                entry = self._names.entries.get(name)
                if entry is not None and entry.item is item:
                    entry.looked = float("-inf")
        raise is_stopping() if name in self._given else unknown_model(name)

    def listed(self) -> tuple[Listed, ...]:
        """The bases and everything in the loading path, by name."""
        with self._lock:
            names = self._names
            if names.listed_at is None or self._now() - names.listed_at >= self._fresh:
                self._sweep()
                names.listing, names.listed_at = tuple(self._scan()), self._now()
            loaded = self._loaded()
            return tuple(
                replace(item, is_loaded=self._is_loaded(item.name, folder, loaded))
                for item, folder in names.listing
            )

    def described(self, name: str) -> tuple[Listed, Path | None] | None:
        """What a request for ``name`` gets, under the name it is listed by; nothing is loaded for it.

        Returns:
            Its folder beside it, None for a base of the command line; None: there is no such model.

        Raises:
            Refusal: 404: the name may mean several.
        """
        with self._lock:
            if name in self._given:
                listed, folder = self._of_base(self._given[name]), None
            else:
                entry = self._names.entries.get(name)
                is_pinned = entry is not None and entry.is_pinned
                folder = entry.folder if entry is not None and is_pinned else self._find(name)
                if folder is None or not (kind_of(folder) and self._path.holds(folder)):
                    return None
                if entry is None and self._is_hidden(name, folder):
                    return None
                self._discover()
                own = self._path.name_of(folder)
                is_own = not (is_pinned or self._is_pinned(own) or own in self._given)
                found = self._in_path(own if is_own else name, folder)
                if found is None:
                    return None
                listed = found
            is_loaded = self._is_loaded(listed.name, folder, self._loaded())
            return replace(listed, is_loaded=is_loaded), folder

    def load(self, name: str, path: str | None = None) -> Version:
        """Load an adapter under ``name``, as a new version if the name has one. On failure nothing changes.

        Args:
            name: by which it is asked for from now on.
            path: its folder, relative to the loading path; None: the one of that name.

        Raises:
            Refusal: 400: a path that leaves the loading path, or files that are no adapter of a base here;
                404: no such folder; 503: there is no memory for it now.
        """
        with self._lock:
            if self._is_base(name):
                raise bad_request(f"lora_name: {name} is a base's name", "lora_name")
            folder = self._find(name) if path is None else self._given_folder(path)
            if folder is None or kind_of(folder) != "adapter":
                raise Refusal(404, f"{path or name}: no adapter there", "adapter_not_found", "lora_path")
            stamp = stamp_of(folder)
        with self._memory.claim() as claim:
            try:
                with self._lock:
                    item = self._adapter(name, folder)
                version = claim.hold(item).result()
            except NoRoom as error:
                raise no_room(error) from None
            except Gone:
                raise is_stopping() from None
            except LOAD_FAULTS as error:
                if is_passing(error):
                    raise _not_now(name) from error
                raise bad_request(
                    f"{name}: {self._public(error)}", "lora_path", "adapter_not_loadable"
                ) from error
            with self._lock:
                self._put(name, _Entry(folder, stamp, item, self._now(), is_pinned=path is not None))
                for alias in {name, *(self._aliases(folder) if path is None else ())}:
                    self._names.hidden.pop(alias, None)
                self._names.listed_at = None
        return version

    def unload(self, name: str) -> None:
        """Take an adapter away; running answers finish. Its folder is passed over until loaded again or changed.

        Raises:
            Refusal: 404: no such adapter.
        """
        with self._lock:
            entry = self._names.entries.get(name)
            folder = entry.folder if entry else self._find(name)
            if name in self._given or folder is None or kind_of(folder) == "base":
                raise unknown_model(name)
            if entry is None and self._is_hidden(name, folder):
                raise unknown_model(name)
            if not (entry and entry.is_pinned):
                # By every name that the folder goes by.
                for other in [
                    n for n, e in self._names.entries.items() if e.folder == folder and not e.is_pinned
                ]:
                    self._drop(other)
                for alias in {name, *self._aliases(folder)}:
                    self._names.hidden[alias] = stamp_of(folder)
            else:
                self._drop(name)
            self._names.listed_at = None

    # Names and folders

    def _meaning(self, name: str, lost: Version | None) -> Resident:
        entry = self._names.entries.get(name)
        if entry is None or lost is not None or self._now() - entry.looked >= self._fresh:
            with self._lock:
                entry = self._names.entries.get(name)
                if lost is not None and entry is not None and entry.item is not None:
                    self._memory.lose(lost, entry.item)
                entry = self._looked_up(name)
        if entry.item is None:
            raise unloadable_model(name)
        return entry.item

    def _looked_up(self, name: str) -> _Entry:
        self._sweep()
        entry = self._names.entries.get(name)
        folder = entry.folder if entry and entry.is_pinned else self._find(name)
        if folder is not None and not (kind_of(folder) and self._path.holds(folder)):
            folder = None
        if folder is None or (entry is None and self._is_hidden(name, folder)):
            self._drop(name)
            raise unknown_model(name)
        stamp = stamp_of(folder)
        if entry and entry.folder == folder and entry.stamp == stamp and _is_lasting(entry):
            entry.looked = self._now()
            return entry
        item, fault = self._item(name, folder)
        if fault is not None and not (entry and entry.fault == fault):
            self._report(f"model {name} cannot be loaded: {fault}")
        is_pinned = entry is not None and entry.is_pinned
        found = _Entry(folder, stamp, item, self._now(), fault, is_pinned)
        self._put(name, found)
        return found

    def _item(self, name: str, folder: Path) -> tuple[Resident | None, str | None]:
        """What the folder is, or why it is nothing."""
        try:
            if kind_of(folder) == "base":
                return self._checkpoint_at(folder), None
            return self._adapter(name, folder), None
        except (TunesmithError, OSError, ValueError) as error:
            return None, str(error)

    def _adapter(self, name: str, folder: Path) -> Adapter:
        return Adapter(name, adapter_bytes(folder), folder, self._base_of(folder))

    def _find(self, name: str) -> Path | None:
        """The folder that ``name`` means in the loading path."""
        if (exact := self._path.find(name)) is not None:
            return exact
        longer = {f for base in self._given if (f := self._path.find(f"{base}:{name}")) is not None}
        if len(longer) > 1:
            forms = " or ".join(sorted(self._path.name_of(folder) for folder in longer))
            raise Refusal(404, f"The model `{name}` may be {forms}: ask for one", "model_ambiguous", "model")
        return next(iter(longer), None) or self._find_shorter(name)

    def _find_shorter(self, name: str) -> Path | None:
        """``{base}:{name}`` for an adapter's folder ``{name}``: only by the base that it belongs to."""
        for place, letter in enumerate(name):
            folder = self._path.find(name[place + 1 :]) if letter == ":" else None
            if folder is not None and kind_of(folder) == "adapter":
                base, own = name[:place], self._parent(folder)
                if own is not None and own.name == base:
                    return folder
        return None

    def _given_folder(self, path: str) -> Path | None:
        folder = self._path.at(path)
        if folder is None:
            rule = "must be a folder below the loading path, by its relative name"
            raise bad_request(f"lora_path: {rule}", "lora_path", "path_not_allowed")
        if folder.exists() and not self._path.holds(folder):
            raise bad_request("lora_path: leads out of the loading path", "lora_path", "path_not_allowed")
        return folder

    def _aliases(self, folder: Path) -> set[str]:
        name = self._path.name_of(folder)
        aliases = {name}
        for base in self._names_of_bases():
            prefix = f"{base}:"
            aliases |= {name.removeprefix(prefix), name if name.startswith(prefix) else prefix + name}
        return aliases

    def _is_hidden(self, name: str, folder: Path) -> bool:
        hidden = self._names.hidden.get(name)
        if hidden is not None and hidden != stamp_of(folder):
            del self._names.hidden[name]
            return False
        return hidden is not None

    def _is_pinned(self, name: str) -> bool:
        entry = self._names.entries.get(name)
        return entry is not None and entry.is_pinned

    def _scan(self) -> Iterator[tuple[Listed, Path | None]]:
        for base in self.bases:
            yield self._of_base(base), None
        found: dict[str, Path] = {}
        for name, folder, _ in self._path.models():
            if name not in self._given and not self._is_hidden(name, folder):
                found[name] = folder
        self._discover()
        found |= {n: e.folder for n, e in self._names.entries.items() if e.is_pinned}
        for name in sorted(found):
            folder = found[name]
            if (listed := self._in_path(name, folder)) is not None:
                yield listed, folder

    def _of_base(self, base: Base) -> Listed:
        return Listed(base.name, None, self._started, base.context_length, False)

    def _in_path(self, name: str, folder: Path) -> Listed | None:
        """A folder as a model called ``name``; None where it is none that can be served."""
        if kind_of(folder) == "base":
            known = self._names.checkpoints.get(folder)
            base, parent = known.base if known is not None else None, None
        else:
            base = self._parent(folder)
            parent = base.name if base is not None else None
        return None if base is None else Listed(name, parent, changed(folder), base.context_length, False)

    def _loaded(self) -> set[Path]:
        """The folders of which something is in memory."""
        entries, checkpoints = self._names.entries.values(), self._names.checkpoints.items()
        loaded = {e.folder for e in entries if e.item is not None and self._memory.is_loaded(e.item)}
        return loaded | {
            folder for folder, known in checkpoints if known.base and self._memory.is_loaded(known.base)
        }

    def _is_loaded(self, name: str, folder: Path | None, loaded: set[Path]) -> bool:
        if folder is None:
            return self._memory.is_loaded(self._given[name])
        entry = self._names.entries.get(name)
        # A name that an administrator has given means another folder than the one that is called so.
        return (entry.folder if entry is not None and entry.is_pinned else folder) in loaded

    # Bases

    def _is_base(self, name: str) -> bool:
        return name in self._given or (
            (folder := self._path.find(name)) is not None and kind_of(folder) == "base"
        )

    def _names_of_bases(self) -> list[str]:
        found = [known.base.name for known in self._names.checkpoints.values() if known.base is not None]
        return [*self._given, *found]

    def _base_of(self, folder: Path) -> Base:
        """The base of an adapter; ModelError where it has none here."""
        name = self._path.name_of(folder)
        try:
            return base_of(folder, name, self.bases, self._others)
        except ModelError:
            self._names.discovered_at = None  # it may have come this very second
            return base_of(folder, name, self.bases, self._others)

    def _parent(self, folder: Path) -> Base | None:
        """``_base_of`` for listing, remembered for as long as neither has changed; None where there is none."""
        stamp, parents = stamp_of(folder), self._names.parents
        known = parents.get(folder)
        if known is not None and known[0] == stamp and not known[1].is_gone:
            return known[1]
        try:
            base = base_of(folder, self._path.name_of(folder), self.bases, self._others)
        except (TunesmithError, OSError, ValueError):
            return None
        if len(parents) >= MAX_LISTED:
            parents.clear()
        parents[folder] = stamp, base
        return base

    def _others(self) -> list[Base]:
        self._discover()
        return [known.base for known in self._names.checkpoints.values() if known.base is not None]

    def _discover(self) -> None:
        """Look for checkpoints in the loading path, at most once every ``fresh_seconds``."""
        names = self._names
        if names.discovered_at is not None and self._now() - names.discovered_at < self._fresh:
            return
        names.discovered_at = self._now()
        for name, folder, kind in self._path.models():
            if kind == "base" and name not in self._given:
                self._look_at(name, folder)

    def _checkpoint_at(self, folder: Path) -> Base:
        found = self._look_at(self._path.name_of(folder), folder)
        if found.base is None:
            raise ModelError("", found.fault)
        return found.base

    def _look_at(self, name: str, folder: Path) -> _Checkpoint:
        """The checkpoint there: with the same base for as long as its files are the same."""
        stamp, known = stamp_of(folder), self._names.checkpoints.get(folder)
        if known is not None and known.stamp == stamp:
            return known
        try:
            found = _Checkpoint(stamp, self._checkpoint(name, folder))
        except (TunesmithError, OSError, ValueError) as error:
            found = _Checkpoint(stamp, None, str(error))
        if known is not None and known.base is not None:
            self._memory.retire(known.base)
        self._names.checkpoints[folder] = found
        return found

    # Versions

    def _put(self, name: str, entry: _Entry) -> None:
        self._drop(name, but=entry.item)
        entries = self._names.entries
        if len(entries) >= MAX_LISTED:
            # A name that an administrator has given is known nowhere else.
            self._drop(next((n for n, e in entries.items() if not e.is_pinned), next(iter(entries))))
        entries[name] = entry

    def _drop(self, name: str, but: Resident | None = None) -> None:
        """Forget what a name means. Bases have several names: ``_sweep`` and ``_look_at`` retire them."""
        entry = self._names.entries.pop(name, None)
        if entry is not None and isinstance(entry.item, Adapter) and entry.item is not but:
            self._memory.retire(entry.item)

    def _sweep(self) -> None:
        """Let go of models whose folders are gone, at most once every ``fresh_seconds``."""
        names = self._names
        if names.swept_at is not None and self._now() - names.swept_at < self._fresh:
            return
        names.swept_at = self._now()
        for name in [name for name, entry in names.entries.items() if not kind_of(entry.folder)]:
            self._drop(name)
        for folder in [folder for folder in names.checkpoints if kind_of(folder) != "base"]:
            known = names.checkpoints.pop(folder)
            if known.base is not None:
                self._memory.retire(known.base)

    def _public(self, error: Exception) -> str:
        text = (
            f"{error.fault}; {error.remedy}"
            if isinstance(error, TunesmithError) and error.remedy
            else str(error)
        )
        root = self._path.root
        for place in {str(root), str(root.resolve())} if root else set():
            text = text.replace(f"{place}/", "")
        return text


def _is_lasting(entry: _Entry) -> bool:
    """Whether the same files mean the same as when they were looked at: not where a base has come or gone."""
    if entry.item is None:
        return False
    base = entry.item.base if isinstance(entry.item, Adapter) else entry.item
    return not (base.is_gone or entry.item.is_gone)


def no_room(error: NoRoom) -> Refusal:
    """503: with a time to come again where that may help."""
    if error.is_final:
        return Refusal(503, f"{error}; the server was started with too little --max-memory", "no_memory")
    return Refusal(503, f"{error}; try again", "no_memory", headers={"Retry-After": str(RETRY_SECONDS)})


def _not_now(name: str) -> Refusal:
    """503: the machine lacked something."""
    message = f"The model `{name}` cannot be loaded now; try again"
    return Refusal(503, message, "load_failed", "model", {"Retry-After": str(RETRY_SECONDS)})


def refused(error: BaseException, name: str) -> Refusal | None:
    """What a load that failed means for the request that waited for it; None: a fault of the server."""
    if isinstance(error, NoRoom):
        return no_room(error)
    if isinstance(error, Closed):
        return is_stopping()
    if is_passing(error):
        return _not_now(name)
    return unloadable_model(name) if isinstance(error, LOAD_FAULTS) else None
