"""What rules of an engine say of an adapter, planned or on disk."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunesmith.config.load import LoadedConfig
from tunesmith.config.schema import LoraMethod
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


def planned(loaded: LoadedConfig, base: BaseFolder, context_length: int, limit: int | None) -> Subject | None:
    """The adapter that a configuration would train; None: it trains every weight, so there will be none.

    Args:
        loaded: the configuration.
        base: its base; weights are not read.
        context_length: as it would train.
        limit: the longest context that the base was made for.

    Raises:
        ConfigError: PEFT refuses ``lora_config``.
        ModelError: the base is none that transformers knows.
    """
    method = loaded.config.method
    if not isinstance(method, LoraMethod):
        return None
    model = skeleton(base)
    lora: dict[str, Any] = dict(method.lora_config)
    place = _in_file(loaded)
    start = loaded.config.model.initial_adapter_model_ckpt_path
    if start is not None:
        from tunesmith.starting_points import adapter_to_continue

        folder = adapter_to_continue(start, base, lora, loaded.place("lora_config"))
        lora = {
            key: value for key, value in _json(folder / "adapter_config.json").items() if value is not None
        }
        place = _of_adapter(loaded)
    settings, adapted, linear = _on_layers(lora, model, loaded.place("lora_config"))
    generation = loaded.config.data.generation_config
    return Subject(
        settings,
        place,
        _architecture(base),
        int(model.config.get_text_config().vocab_size),
        adapted,
        linear,
        stretched=context_length if limit is not None and context_length > limit else None,
        own_template=generation.prompt_format is not None,
        stops=tuple(generation.stopping_sequences),
    )


def on_disk(folder: Path, base: BaseFolder) -> Subject:
    """The adapter in ``folder``. Its tensors' names are read, not what is in them.

    Raises:
        ModelError: its files cannot be read.
    """
    settings = _json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ModelError(str(folder), "holds no LoRA adapter", "name a LoRA checkpoint")
    names, rows = _tensor_names(folder / "adapter_model.safetensors")
    config = _json(base.path / "config.json")
    text = config.get("text_config", config)
    owners = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    return Subject(
        settings,
        _always(str(folder)),
        _architecture(base),
        int(text.get("vocab_size") or 0),
        frozenset(owners & {"embed_tokens", "wte", "embed_in", "lm_head", "embed_out"}),
        embedding_rows=rows,
        stretched=_stretched(folder, text),
    )


def skeleton(base: BaseFolder) -> Any:
    """The base's layers without weights or memory.

    Raises:
        ModelError: transformers does not know it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    except Exception as error:  # foreign files, and a library with exceptions of a kind of its own
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(base.model_id, f"cannot be built ({reason})", "check its config.json") from error


def _on_layers(
    lora: Mapping[str, Any], model: Any, place: str
) -> tuple[dict[str, Any], frozenset[str], tuple[str, ...]]:
    """PEFT's settings in full, which of embeddings and head they reach, and the linear layers' names."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from tunesmith.models.lora import default_targets, lora_config

    known = {field.name for field in fields(LoraConfig)}
    config = lora_config({k: v for k, v in lora.items() if k in known}, model, place)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    is_linear_alone = config.target_modules in ("all-linear", None)  # PEFT leaves the head out of the former
    hit = [] if is_linear_alone else [name for name in names if check_target_module_exists(config, name)]
    ends_named = {name.rpartition(".")[2] for name in names}
    linear = tuple(name for name in default_targets(model) if name not in ends_named)
    return config.to_dict(), frozenset(name.rpartition(".")[2] for name in hit), linear


def _in_file(loaded: LoadedConfig) -> Callable[[str], str]:
    """Where a setting stands, or else the first one below it: of a group only these have lines."""

    def place(key: str) -> str:
        below = (s.key for s in loaded.settings if s.key.startswith(f"{key}.") and s.origin != "default")
        return loaded.place(key if key in {s.key for s in loaded.settings} else next(below, key))

    return place


def _of_adapter(loaded: LoadedConfig) -> Callable[[str], str]:
    """Settings of an adapter that is continued stand in its own file, so what names the adapter is the place."""
    start = loaded.place("initial_adapter_model_ckpt_path")
    return lambda key: start if key.startswith("lora_config") else loaded.place(key)


def _architecture(base: BaseFolder) -> str:
    found = _json(base.path / "config.json").get("architectures") or [""]
    return str(found[0])


def _stretched(folder: Path, text_config: Mapping[str, Any]) -> int | None:
    manifest = folder / "tunesmith.json"
    if not manifest.is_file():
        return None
    trained = (_json(manifest).get("config") or {}).get("context_length")
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


def _json(path: Path) -> dict[str, Any]:
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
