"""What rules of an engine say of an adapter, planned or on disk."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder


@dataclass(frozen=True)
class Finding:
    """One thing that an engine would not do as trained.

    Attributes:
        place: file, line and setting, or a checkpoint's folder.
        fault: what the engine does there.
        remedy: what to change.
        source: where the rule was read, with the version.
        is_fatal: the adapter is refused, or would answer otherwise than it was trained to; False: good to know.
    """

    place: str
    fault: str
    remedy: str
    source: str
    is_fatal: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.fault}; {self.remedy} ({self.source})"

    def facts(self) -> dict[str, Any]:
        """The same, JSON-serialisable."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """An adapter as rules look at it.

    Attributes:
        lora: PEFT's settings by name, defaults included.
        place: a setting's full name, such as lora_config.r -> where it stands, for people.
        architecture: the base's, as its config.json names it.
        vocabulary: the base's, in tokens.
        adapted: last names of the embedding layer and the head, as far as they have adapters.
        linear: last names of the linear layers, as far as they are known.
        embedding_rows: tokens that an adapter on the embeddings was made for; None: it has none, or is not made yet.
        stretched: the context in tokens, where it is longer than the base was made for.
        own_template, stops: whether it brings a chat template of its own; its stop texts.
    """

    lora: Mapping[str, Any]
    place: Callable[[str], str]
    architecture: str
    vocabulary: int
    adapted: frozenset[str]
    linear: tuple[str, ...] = ()
    embedding_rows: int | None = None
    stretched: int | None = None
    own_template: bool = False
    stops: tuple[str, ...] = ()

    @property
    def ranks(self) -> list[int]:
        """Every rank that a layer of it may have."""
        return [int(self.lora.get("r", 8)), *map(int, (self.lora.get("rank_pattern") or {}).values())]


def on_disk(folder: Path, base: BaseFolder) -> Subject:
    """The adapter in ``folder``. Its tensors' names are read, not what is in them.

    Raises:
        ModelError: its files cannot be read.
    """
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ModelError(str(folder), "holds no LoRA adapter", "name a LoRA checkpoint")
    names, rows = _tensor_names(folder / "adapter_model.safetensors")
    config = read_json(base.path / "config.json")
    text = config.get("text_config", config)
    owners = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    return Subject(
        settings,
        _always(str(folder)),
        architecture_of(base),
        int(text.get("vocab_size") or 0),
        frozenset(owners & {"embed_tokens", "wte", "embed_in", "lm_head", "embed_out"}),
        embedding_rows=rows,
        stretched=_stretched(folder, text),
    )


def architecture_of(base: BaseFolder) -> str:
    """As the base's config.json names it; empty where it does not.

    Raises:
        ModelError: it cannot be read.
    """
    found = read_json(base.path / "config.json").get("architectures") or [""]
    return str(found[0])


def _stretched(folder: Path, text_config: Mapping[str, Any]) -> int | None:
    manifest = folder / "tunesmith.json"
    if not manifest.is_file():
        return None
    trained = (read_json(manifest).get("config") or {}).get("context_length")
    limit = text_config.get("max_position_embeddings")
    return trained if isinstance(trained, int) and isinstance(limit, int) and trained > limit else None


def _tensor_names(path: Path) -> tuple[list[str], int | None]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            sizes = [file.get_slice(n).get_shape()[1] for n in names if n.endswith("lora_embedding_A")]
    except (OSError, SafetensorError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(str(path), f"cannot be read ({reason})", "use another checkpoint") from error
    return names, (sizes[0] if sizes else None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small file.

    Raises:
        ModelError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(str(path), f"cannot be read ({reason})", "use another checkpoint") from error
    if not isinstance(found, dict):
        raise ModelError(str(path), "is no JSON object", "use another checkpoint")
    return found


def _always(place: str) -> Callable[[str], str]:
    return lambda _: place
