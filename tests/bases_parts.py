"""Several bases in one server: tiny ones, checkpoints and adapters on them, and a server that counts what it opens."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serving_parts import CONTEXT, PlainEngine, Served, running, save_adapter, service_of
from tiny_models import chatml_tokenizer, tiny_model
from tunesmith.checkpoints.manifest import (
    FORMAT,
    BaseWeights,
    Manifest,
    fingerprint_weights,
    hash_files,
    write_manifest,
)
from tunesmith.models.base import BaseFolder
from tunesmith.serving.bases import given_base
from tunesmith.serving.footprint import Measure
from tunesmith.serving.security import Keys

MEASURE = Measure(running=4, waiting=8, context_length=CONTEXT, prefix_tokens=0)
PROMPT = {"prompt": "red", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def save_other(folder: Path, seed: int) -> Path:
    """``tiny_model``'s shapes with other weights."""
    model = tiny_model(tied=False)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    chatml_tokenizer().save_pretrained(folder)
    return folder


def stamp(folder: Path, method: str, tag: str, on: Path) -> Path:
    """Make a checkpoint of tunesmith of a folder, trained on the weights in ``on``."""
    digests, fingerprint = fingerprint_weights(BaseFolder("", on, None).weight_files)
    manifest = Manifest(
        format=FORMAT, method=method, tag=tag, run="run", model_id=on.name, step=1, epoch=1.0, eval_loss=None,
        base=BaseWeights(on.name, None, digests, fingerprint), metrics={}, config={}, data={}, versions={},
        created="2026-01-02T03:04:05+00:00", parent=None, files=hash_files(folder),
    )  # type: ignore[arg-type]  # fmt: skip
    write_manifest(folder, manifest)
    return folder


@dataclass(frozen=True)
class Made:
    """Bases ``tiny`` and ``other``, a checkpoint trained from tiny, and adapters on each of the three."""

    tiny: Path
    other: Path
    full: Path
    on: dict[str, Path] = field(default_factory=dict)


def make_bases(folder: Path, tiny: Path) -> Made:
    """All of them in ``folder`` but tiny, which is there."""
    other, full = save_other(folder / "other", 7), save_other(folder / "full", 8)
    stamp(full, "full", "tiny:full:abcde", tiny)
    found = Made(tiny, other, full)
    for seed, (name, on) in enumerate((("tiny", tiny), ("other", other), ("full", full)), 11):
        found.on[name] = stamp(save_adapter(folder / f"on-{name}", seed), "lora", f"{name}:a:b", on)
    return found


class Weighed(PlainEngine):
    """PlainEngine with the weights of a folder."""

    def __init__(self, base: BaseFolder) -> None:
        super().__init__()
        from safetensors.torch import load_file

        self._model.load_state_dict(load_file(base.path / "model.safetensors"), strict=False)


@dataclass
class Several:
    """A server of several bases, and the engines it has opened."""

    server: Served
    engines: dict[str, Any]
    opened: list[str]
    gate: threading.Event

    @property
    def root(self) -> Path:
        return self.server.root


Start = Callable[..., Several]


@contextmanager
def serving(made: Made, names: Sequence[str], limit: int | None, root: Path) -> Iterator[Several]:
    """A server of the bases of these names, with an empty loading path ``root``; ``limit``: bytes of all models."""
    engines: dict[str, Any] = {}
    opened: list[str] = []
    gate = threading.Event()
    gate.set()

    def open_engine(folder: BaseFolder) -> Any:
        opened.append(folder.path.name)
        assert gate.wait(10)
        engines[folder.path.name] = engine = Weighed(folder)
        return engine

    bases = [given_base(str(getattr(made, name)), [], MEASURE, print) for name in names]
    said: list[str] = []
    root.mkdir()
    service = service_of(bases, root, open_engine, said.append, keys=Keys(admin="admin"), limit=limit)
    service.registry._fresh = 0.0
    with running(service, said, made.tiny, root) as server:
        yield Several(server, engines, opened, gate)
    gate.set()


def ask(several: Several, model: str, **more: Any) -> str:
    with several.server.client() as http:
        reply = http.post("/v1/completions", json={**PROMPT, "model": model, **more})
    if reply.status_code != 200:
        raise LookupError(f"{reply.status_code} {reply.json()['error']['code']}")
    return str(reply.json()["choices"][0]["text"])


def listed(several: Several) -> dict[str, tuple[str | None, bool]]:
    with several.server.client() as http:
        data = http.get("/v1/models").json()["data"]
    return {model["id"]: (model["parent"], model["loaded"]) for model in data}


def metric(several: Several, name: str) -> str:
    with several.server.client() as http:
        samples = dict(
            line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#")
        )
    return str(samples[name])


def sizes(made: Made) -> tuple[int, int]:
    """Of a base and of an adapter."""
    one = MEASURE.base_bytes(BaseFolder("", made.tiny, None))
    return one, sum(
        4 * 4 * (fan_in + fan_out) * 2 for fan_in, fan_out in ((32, 32), (32, 16), (64, 32))
    )  # rank 4, two layers, float32: q_proj, v_proj and down_proj
