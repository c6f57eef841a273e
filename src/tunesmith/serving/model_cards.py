"""``GET /v1/models/{name}``: one model, and of a trained one where it comes from and how well it does.

All of it is read from files: the checkpoint's manifest, the report of its run where that lies near, and the
manifests of the checkpoints it was trained on from. The manifest is whatever somebody put into the loading path,
so it names no path that is followed: runs and tags are looked for by name around the adapter, a file is read only
up to ``MAX_FILE_BYTES``, and no text that goes out names a place of this machine.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tunesmith.checkpoints.manifest import MANIFEST_NAME, Manifest, Parent, identified
from tunesmith.checkpoints.store import BEST, CHECKPOINTS
from tunesmith.errors import TunesmithError
from tunesmith.serving import protocol as wire
from tunesmith.serving.faults import unknown_model
from tunesmith.serving.service import Service, shown
from tunesmith.tracking import events
from tunesmith.tracking.report import read_record

MAX_FILE_BYTES = 2**20
MAX_GENERATIONS = 16
_MAX_TEXT = 256
_UPWARDS = 4  # outputs/lora_fine_tuning/org/tag: the runs lie three folders up
_REPORT = "report.json"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*\Z")  # one folder, and none above


class Score(BaseModel):
    """Quality on the held-out rows of a run; ``loss`` in nats per token, ``interval`` 95 %."""

    rows: int
    loss: float | None
    perplexity: float | None
    metric: str | None
    value: float | None
    interval: tuple[float, float] | None


class Generation(BaseModel):
    """A checkpoint that this one was trained on from."""

    tag: str
    run: str
    step: int


class Card(BaseModel):
    """A trained model's history and numbers; what is not recorded is None.

    Attributes:
        lineage: what it was trained on from, the nearest first; empty: from the base's own weights.
        is_lineage_whole: whether the lineage was followed to the base.
        before: the base's score on the held-out rows, ``after`` its own.
        note: why numbers are missing.
    """

    tag: str | None = None
    run: str | None = None
    created: str | None = None
    base: str | None = None
    base_fingerprint: str | None = None
    weights_sha256: str | None = None
    steps: int | None = None
    epochs: float | None = None
    rank: int | None = None
    seed: int | None = None
    train_rows: int | None = None
    eval_loss: float | None = None
    before: Score | None = None
    after: Score | None = None
    lineage: list[Generation] = []
    is_lineage_whole: bool = False
    note: str | None = None


class CardedModel(wire.Model):
    """``GET /v1/models/{name}``: OpenAI's fields and, of a model in the loading path, its card."""

    card: Card | None


def carded_model(service: Service, name: str) -> CardedModel:
    """The model that ``name`` means, by any of the forms in which requests may name it. Nothing is loaded.

    Raises:
        Refusal: 404: there is none.
    """
    found = service.registry.described(name)
    if found is None:
        raise unknown_model(name)
    listed, folder = found
    return CardedModel(**shown(listed).model_dump(), card=card_of(folder) if folder else None)


def card_of(folder: Path) -> Card:
    """The card of the checkpoint in ``folder``; one with a note where its manifest tells nothing."""
    if not (folder / MANIFEST_NAME).exists():
        return Card(note=f"Where it comes from is not recorded: it has no {MANIFEST_NAME}")
    found = _manifest(folder)
    if found is None:
        return Card(note=f"Where it comes from is not known: its {MANIFEST_NAME} cannot be read or trusted")
    manifest, sha256 = found
    lineage, is_whole = _lineage(folder, manifest)
    record = _record(folder, manifest, sha256)
    return Card(
        tag=_short(manifest.tag),
        run=_short(manifest.run),
        created=_short(manifest.created),
        base=_short(Path(manifest.base.source).name),
        base_fingerprint=_short(manifest.base.fingerprint),
        weights_sha256=next(
            (_short(stamp.sha256) for file, stamp in manifest.files.items() if file.endswith(".safetensors")),
            None,
        ),
        steps=manifest.step,
        epochs=_finite(manifest.epoch),
        rank=_whole(manifest.config.get("lora_config"), "r"),
        seed=manifest.seed,
        train_rows=_whole(manifest.data.get("train"), "rows"),
        eval_loss=_finite(manifest.eval_loss),
        before=_score(record.before) if record else None,
        after=_score(record.after) if record else None,
        lineage=lineage,
        is_lineage_whole=is_whole,
        note=None if record else "The report of its run does not lie near, so there are no held-out scores",
    )


def _manifest(folder: Path) -> tuple[Manifest, str] | None:
    """The manifest and its SHA-256; None where it is absent, too long, damaged or not signed as it must be."""
    try:
        return identified(folder) if _is_short(folder / MANIFEST_NAME) else None
    except (TunesmithError, OSError, ValueError):
        return None


def _lineage(folder: Path, manifest: Manifest) -> tuple[list[Generation], bool]:
    """What ``manifest`` was trained on from, and whether the chain led to base weights.

    A parent is taken only where its manifest has the recorded SHA-256, see ``checkpoints/lineage.py``.
    """
    chain: list[Generation] = []
    while (parent := manifest.parent_adapter or manifest.parent_base) is not None:
        if len(chain) == MAX_GENERATIONS:
            return chain, False
        chain.append(Generation(tag=_short(parent.tag), run=_short(parent.run), step=parent.step))
        found = next(_parents(folder, parent), None)
        if found is None:
            return chain, False
        folder, manifest = found
    return chain, manifest.parent is None


def _parents(child: Path, parent: Parent) -> Iterator[tuple[Path, Manifest]]:
    names = [parent.tag] if _is_name(parent.tag) else []
    if _RUN_NAME.match(parent.run):
        names += [f"{parent.run}/{BEST}", f"{parent.run}/{CHECKPOINTS}/step-{parent.step:06d}"]
    for place in _around(child):
        for name in names:
            found = _manifest(place / name)
            if found is not None and found[1] == parent.manifest_sha256:
                yield place / name, found[0]


def _is_name(name: str) -> bool:
    """Whether ``name`` is one that a request could give, and a path that leads only downwards."""
    is_name = re.fullmatch(wire.NAME.strip("^$"), name) is not None and len(name) <= wire.MAX_NAME
    return is_name and not any(part in ("", ".", "..") for part in name.split("/"))


def _record(folder: Path, manifest: Manifest, sha256: str) -> events.RunRecord | None:
    """The report of the run that made this checkpoint, if it speaks of this one: of its best."""
    if not _RUN_NAME.match(manifest.run):
        return None
    for run in (place / manifest.run for place in _around(folder)):
        try:
            if not (_is_short(run / _REPORT) and _is_short(run / BEST / MANIFEST_NAME)):
                continue
            best = hashlib.sha256((run / BEST / MANIFEST_NAME).read_bytes()).hexdigest()
            if best == sha256:
                return read_record(run / _REPORT)
        except (TunesmithError, OSError, ValueError, RecursionError):
            continue
    return None


def _around(folder: Path) -> list[Path]:
    """Folders in which tags and runs may lie."""
    return list(folder.absolute().parents[:_UPWARDS])


def _is_short(file: Path) -> bool:
    try:
        return file.is_file() and file.stat().st_size <= MAX_FILE_BYTES
    except (OSError, ValueError):
        return False


def _score(score: events.Score | None) -> Score | None:
    if score is None:
        return None
    low, high = map(_finite, score.interval or (None, None))
    return Score(
        rows=score.rows,
        loss=_finite(score.loss),
        perplexity=_finite(score.perplexity),
        metric=None if score.metric is None else _short(score.metric),
        value=_finite(score.value),
        interval=None if low is None or high is None else (low, high),
    )


def _finite(number: float | None) -> float | None:
    # JSON has neither NaN nor infinity.
    return number if number is not None and math.isfinite(number) else None


def _whole(facts: Any, key: str) -> int | None:
    value = facts.get(key) if isinstance(facts, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _short(text: str) -> str:
    return text[:_MAX_TEXT]
