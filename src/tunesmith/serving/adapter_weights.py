"""A LoRA checkpoint's folder as tensors for the CPU engine, every one checked before it is believed."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.adapter_files import (
    ANOTHER,
    CONFIG,
    MOST_RANK,
    PREFIX,
    TENSORS,
    UNDERSTOOD,
    check_finite,
    check_manifest,
    read_config,
    read_tensors,
    unreadable,
)
from tunesmith.serving.base_weights import EMBEDDINGS, BaseWeights
from tunesmith.serving.mixed_lora import Adapter, LowRank, adapter_of
from tunesmith.serving.patterns import check_patterns
from tunesmith.serving.seam import AdapterKey

_WHO = "the CPU engine does not serve"


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
        NotServed: it is of a kind that this engine does not compute.
        ModelError, CheckpointError: it is damaged or of another base.
    """
    check_manifest(folder, base_folder, base.fingerprint, base.context_length)
    places = list(_places(read_config(folder, UNDERSTOOD, _WHO), base, str(folder)))
    path = folder / TENSORS
    wanted = {place.a: place.a_shape for place in places} | {place.b: place.b_shape for place in places}
    tensors, digest = read_tensors(path, wanted)
    pairs = {place.module: _pair(tensors, place, path) for place in places}
    scales = json.dumps({place.module: place.scale for place in places}, sort_keys=True)
    key = AdapterKey(hashlib.sha256(digest + scales.encode()).hexdigest())
    return adapter_of(key, pairs, base)


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
    check_patterns(config, modules, at)
    targets = config.target_modules
    if targets == "all-linear":
        config.target_modules = targets = {name for name in modules if name.startswith("model.layers.")}
    if not targets:
        raise ModelError(at, f"its {CONFIG} names no target_modules", ANOTHER)
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
        raise unreadable(Path(at) / CONFIG, error) from error
    if not found:
        raise ModelError(at, "its target_modules match no layer of this base", "use its own base")
    yield from found


def _place(config: Any, module: str, size: tuple[int, int], at: str) -> _Place:
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
    if type(rank) is not int or not 0 < rank <= MOST_RANK:
        raise ModelError(at, f"its rank for {module} is {str(rank)[:20]}", f"ranks are 1 to {MOST_RANK}")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ModelError(at, f"its lora_alpha for {module} is {str(alpha)[:20]}", ANOTHER)
    scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    name, (fan_in, fan_out) = PREFIX + module, size
    if module == EMBEDDINGS:
        a, b = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    else:
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    return _Place(module, a, b, (rank, fan_in), (fan_out, rank), scale)


def _pair(tensors: dict[str, torch.Tensor], place: _Place, path: Path) -> LowRank:
    a, b = (tensors[name].to(torch.float32) for name in (place.a, place.b))
    b = b * place.scale
    check_finite(path, place.a, a)
    check_finite(path, place.b, b)
    return LowRank(a, b.t().contiguous())
