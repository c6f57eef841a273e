"""The plain engine: any decoder of transformers with any kind of LoRA adapter, batched per adapter.

Each round reads stretches of prompts, bounded in tokens so that answers under way never wait long, and then makes one
token of every running request: those of one adapter in one pass, the adapters one after the other, so that none waits
for more than one pass of each other. A prompt is read by itself, in passes of its own: what a request gets depends on
others only through the rounding of products that have more rows, and not even so with ``is_exact``.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.models.base import BaseFolder
from tunesmith.serving.changes import Changes
from tunesmith.serving.desk import Desk, Places, Request
from tunesmith.serving.desk_engine import DeskEngine
from tunesmith.serving.engine import EngineSettings
from tunesmith.serving.padded_rows import Rows, joined, kept
from tunesmith.serving.plain_adapters import read_changes
from tunesmith.serving.plain_model import PlainModel, load_plain
from tunesmith.serving.seam import AdapterKey, EngineFacts, EngineLimits

_Request = Request[Changes]


@dataclass(frozen=True)
class _Group:
    """Requests that share passes, and their rows in order."""

    members: tuple[_Request, ...]
    rows: Rows


class PlainEngine(DeskEngine[Changes]):
    """``Engine`` of seam.py for whatever transformers computes in float32 on the CPU."""

    def __init__(
        self,
        base: BaseFolder,
        settings: EngineSettings | None = None,
        *,
        model: PlainModel | None = None,
        places: Places | None = None,
        is_exact: bool = False,
        fingerprint: "Future[str] | None" = None,
    ) -> None:
        """Load the base, unless ``model`` is it, and start the thread.

        Args:
            base: its files.
            settings: bounds; there is no prefix cache.
            model: of these files.
            places: of requests at work, where another engine on the same weights shares them.
            is_exact: every request in passes of its own, so that its answer is the same to the last bit whatever
                else runs; several times slower when many run.
            fingerprint: as of ``load_base``.

        Raises:
            ModelError: the base cannot be loaded.
        """
        settings = settings or EngineSettings()
        self._base = base
        self._model = model or load_plain(base, fingerprint)
        length = min(settings.context_length, self._model.limit or settings.context_length)
        limits = EngineLimits(length, self._model.vocabulary, settings.running, settings.waiting)
        self._is_together = self._model.way == "together" and not is_exact
        # Caches of another kind may take a prompt in one piece only.
        self._prompt_pass = settings.prompt_pass if self._model.way == "together" else length
        self._prompts: deque[_Request] = deque()
        self._own: dict[_Request, Rows] = {}  # of requests that are in no group yet
        self._groups: dict[str, _Group] = {}
        super().__init__(Desk(limits, places), "plain engine")

    # What callers use, from any thread; the rest is DeskEngine's.

    def load(self, folder: Path) -> AdapterKey:
        """See ``Engine``. Files are read in the caller's thread; answers go on meanwhile."""
        return self._desk.add(read_changes(folder, self._model, self._base))

    def facts(self) -> EngineFacts:
        """See ``Engine``."""
        return self._desk.facts(self.limits.running * self.limits.context_length)

    # What the engine's thread does.

    def _work(self) -> None:
        with torch.inference_mode():
            while (begun := self._desk.wait()) is not None:
                self._prompts.extend(begun)
                self._read_prompts()
                for name, members in self._ready().items():
                    self._desk.drop_cancelled()
                    self._make_tokens(name, [request for request in members if not request.is_over])
                self._forget()
        self._desk.end_all()
        self._prompts.clear()
        self._own.clear()
        self._groups.clear()

    def _read_prompts(self) -> None:
        """Read as much as one round may, the prompts by turns, the last token of each with its answer's first."""
        room = self._prompt_pass
        while room > 0 and self._prompts:
            self._desk.drop_cancelled()
            request = self._prompts.popleft()
            if request.is_over:
                continue
            end = min(request.prompt_length, request.cached + room)
            room -= end - request.cached
            with self._guarded([request]):
                self._read(request, end)
            if not request.is_over and end < request.prompt_length:
                self._prompts.append(request)

    def _read(self, request: _Request, end: int) -> None:
        rows = self._own.pop(request, None)
        logits, rows = self._model.read([request.tokens[:end]], rows, request.adapter)
        request.cached = end
        self._own[request] = rows
        if end == request.prompt_length:
            self._desk.emit([request], logits)

    def _ready(self) -> dict[str, list[_Request]]:
        """Requests that make a token this round, by the group they share passes with."""
        found: dict[str, list[_Request]] = {}
        for request in self._desk.running:
            if request.is_read:
                name = request.key if self._is_together else f"{request.key} {request.ticket.number}"
                found.setdefault(name, []).append(request)
        return found

    def _make_tokens(self, name: str, requests: list[_Request]) -> None:
        if requests:
            with self._guarded(requests):
                self._step(name, requests)

    def _step(self, name: str, requests: list[_Request]) -> None:
        group = self._regrouped(self._groups.pop(name, None), requests)
        adapter = group.members[0].adapter
        logits, rows = self._model.read([request.tokens for request in group.members], group.rows, adapter)
        for request in group.members:
            request.cached = len(request.tokens)
        self._groups[name] = _Group(group.members, rows)
        self._desk.emit(group.members, logits)

    def _regrouped(self, group: _Group | None, requests: list[_Request]) -> _Group:
        """The group without those that have ended, and with those that are new."""
        parts, members = [], []
        if group is not None:
            places = [place for place, request in enumerate(group.members) if not request.is_over]
            if places:
                parts.append(kept(group.rows, places))
                members += [group.members[place] for place in places]
        for request in requests:
            if request in self._own:
                parts.append(self._own.pop(request))
                members.append(request)
        return _Group(tuple(members), joined(parts))

    def _forget(self) -> None:
        """Give the memory of requests that have ended back."""
        self._groups = {
            name: group
            for name, group in self._groups.items()
            if not all(request.is_over for request in group.members)
        }
        self._own = {request: rows for request, rows in self._own.items() if not request.is_over}
