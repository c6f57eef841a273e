"""A LoRA checkpoint's folder as tensors for the CPU engine, every one checked before it is believed.

Refused, naming the reason: what is damaged or of another base; tensors without a place, places without a tensor,
shapes, dtypes and numbers that cannot be; and whatever of PEFT's settings this engine would compute differently. A
setting that is not known to be harmless counts as one that is not.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.models.servable import check_base, verified_manifest
from tunesmith.serving.base_weights import EMBEDDINGS, BaseWeights
from tunesmith.serving.mixed_lora import Adapter, LowRank, adapter_of
from tunesmith.serving.seam import AdapterKey

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MOST_CONFIG_BYTES = 1 << 20
_MOST_HEADER_BYTES = 16 << 20
_MOST_RANK = 4096
_PREFIX = "base_model.model."
_DTYPES = ("F32", "F16", "BF16", "F64")
_ANOTHER = "use another checkpoint"
# Fields of LoraConfig that the engine computes, or that have no part in what a trained adapter computes.
_UNDERSTOOD = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "task_type",
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "megatron_core",
}  # fmt: skip
# These move a part of the base's weights into the adapter, so that the base is no longer the one that is served.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Place:
    """Where a low-rank pair belongs: ``a`` and ``b`` are its tensors' names, with the shapes they must have."""

    module: str
    a: str
    b: str
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]
    scale: float


def read_adapter(folder: Path, base: BaseWeights, base_folder: BaseFolder) -> Adapter:
    """Read and check the adapter in ``folder``.

    Raises:
        ModelError, CheckpointError: see the module.
    """
    manifest = verified_manifest(folder)
    if manifest is not None:
        if manifest.base.fingerprint != base.fingerprint:
            check_base(
                str(folder), manifest, base_folder
            )  # says so; returns only if the files have changed since
            raise ModelError(
                str(folder), "its base has changed on disk since it was loaded", "start the server anew"
            )
        trained = manifest.config.get("context_length")
        if isinstance(trained, int) and trained > base.context_length:
            fault = f"was trained with positions stretched to {trained} tokens"
            raise ModelError(str(folder), fault, "the CPU engine serves the base's own positions")
    config = _config(folder)
    places = list(_places(config, base, str(folder)))
    path = folder / _TENSORS
    _check_header(path, places)
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error
    _check_shapes(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, places)
    pairs = {place.module: _pair(tensors, place, path) for place in places}
    scales = json.dumps({place.module: place.scale for place in places}, sort_keys=True)
    digest = hashlib.sha256(hashlib.sha256(content).digest() + scales.encode()).hexdigest()
    return adapter_of(AdapterKey(digest), pairs, base)


def _config(folder: Path) -> Any:
    """PEFT's settings, of which every one is understood."""
    from peft import LoraConfig

    path = folder / _CONFIG
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ValueError(f"more than {_MOST_CONFIG_BYTES} bytes")
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict) or given.get("peft_type") != "LORA":
            raise ValueError("not of a LoRA adapter")
    except FileNotFoundError as error:
        raise ModelError(str(folder), f"holds no adapter (no {_CONFIG})", "name a LoRA checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    known = {field.name for field in fields(LoraConfig)}
    if strangers := sorted(name for name in given.keys() - known if given[name] not in (None, False)):
        raise _unserved(path, f"{strangers[0]} is unknown to this PEFT")
    try:
        config, plain = LoraConfig(**{k: v for k, v in given.items() if k in known}), LoraConfig()
    except (TypeError, ValueError, AttributeError, KeyError, ImportError) as error:  # from PEFT's own checks
        raise _unreadable(path, error) from error
    for name in sorted(given.keys() & known - _UNDERSTOOD):
        if getattr(config, name) != getattr(plain, name):
            raise _unserved(path, f"has {name} {str(given[name])[:60]}")
    start = str(config.init_lora_weights).lower()
    if start.startswith(_MOVES_BASE):
        raise _unserved(path, f"was begun by {start}, which changes the base's weights")
    return config


def _places(config: Any, base: BaseWeights, at: str) -> Iterator[_Place]:
    """Where the settings say that there are pairs.

    Raises:
        ModelError: a target is not in this base, or a number is out of bounds.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = {
        name: (group.width, size)
        for group in base.groups
        for name, size in zip(group.names, group.sizes, strict=True)
    }
    modules[EMBEDDINGS] = (base.embeddings.shape[0], base.embeddings.shape[1])
    targets = config.target_modules
    if targets == "all-linear":
        config.target_modules = targets = {name for name in modules if name.startswith("model.layers.")}
    if not targets:
        raise ModelError(at, f"its {_CONFIG} names no target_modules", _ANOTHER)
    if not isinstance(targets, str):
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise ModelError(
                    at, f"its target {str(target)[:80]} has no place in this base", "use its own base"
                )
    try:
        hit = {name: size for name, size in modules.items() if check_target_module_exists(config, name)}
        found = [_place(config, name, size, at) for name, size in hit.items()]
    except (TypeError, ValueError, AttributeError, re.error) as error:  # patterns that are no patterns
        raise _unreadable(Path(at) / _CONFIG, error) from error
    if not found:
        raise ModelError(at, "its target_modules match no layer of this base", "use its own base")
    yield from found


def _place(config: Any, module: str, size: tuple[int, int], at: str) -> _Place:
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
    if type(rank) is not int or not 0 < rank <= _MOST_RANK:
        raise ModelError(at, f"its rank for {module} is {str(rank)[:20]}", f"ranks are 1 to {_MOST_RANK}")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ModelError(at, f"its lora_alpha for {module} is {str(alpha)[:20]}", _ANOTHER)
    scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    name, (fan_in, fan_out) = _PREFIX + module, size
    if module == EMBEDDINGS:
        a, b = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    else:
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    return _Place(module, a, b, (rank, fan_in), (fan_out, rank), scale)


def _check_header(path: Path, places: list[_Place]) -> None:
    """Everything that can be known without taking memory for the tensors."""
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MOST_HEADER_BYTES:
            raise ValueError(f"its header has {header} bytes")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except FileNotFoundError as error:
        raise ModelError(
            str(path.parent), f"has no {_TENSORS}", "convert the adapter to safetensors"
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error
    for name, dtype in sorted(dtypes.items()):
        if dtype not in _DTYPES:
            raise ModelError(
                str(path), f"{name[:120]} is {dtype}", f"the types served are {', '.join(_DTYPES)}"
            )
    _check_shapes(path, shapes, places)


def _check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], places: list[_Place]) -> None:
    wanted = {place.a: place.a_shape for place in places} | {place.b: place.b_shape for place in places}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(str(path), f"the adapter lacks {missing[0]}", "it is damaged or of another base")
    if strangers := sorted(found.keys() - wanted.keys()):
        fault = f"{strangers[0][:120]} has no place in this base"
        raise ModelError(
            str(path), fault, "use the adapter's own base, or save it without copies of the base's layers"
        )
    for name, shape in sorted(wanted.items()):
        if found[name] != shape:
            fault = f"{name} has shape {found[name]}, this base wants {shape}"
            raise ModelError(str(path), fault, "use the adapter's own base")


def _pair(tensors: Mapping[str, torch.Tensor], place: _Place, path: Path) -> LowRank:
    a, b = (tensors[name].to(torch.float32) for name in (place.a, place.b))
    b = b * place.scale
    for name, tensor in ((place.a, a), (place.b, b)):
        low, high = tensor.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ModelError(str(path), f"{name} has numbers that are not finite", _ANOTHER)
    return LowRank(a, b.t().contiguous())


def _unreadable(path: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return ModelError(str(path), f"cannot be read ({reason})", _ANOTHER)


def _unserved(path: Path, fault: str) -> ModelError:
    return ModelError(
        str(path), f"{fault}, which the CPU engine does not serve", "merge it, or use another engine"
    )
