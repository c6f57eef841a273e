"""A LoRA checkpoint of any kind that the plain engine computes: DoRA, biases, whole modules, any target.

PEFT puts the adapter on a skeleton of the model without memory. Which tensors the file has to hold, their shapes and
scales are read off there, so that the settings mean exactly what they mean to PEFT.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
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
    unserved,
)
from tunesmith.serving.changes import Change, Changes, EmbeddingChange, LinearChange
from tunesmith.serving.patterns import check_patterns
from tunesmith.serving.plain_model import PlainModel
from tunesmith.serving.seam import AdapterKey

_WHO = "no engine here serves"
_UNDERSTOOD = UNDERSTOOD | {"use_dora", "bias", "lora_bias", "modules_to_save"}
_NAME = "default"  # PEFT's for an only adapter


def read_changes(folder: Path, model: PlainModel, base: BaseFolder) -> Changes:
    """Read and check the adapter in ``folder``; from any thread.

    Raises:
        NotServed: it is of a kind that is not computed here.
        ModelError, CheckpointError: it is damaged or of another base.
    """
    check_manifest(folder, base, model.fingerprint, model.limit)
    config = read_config(folder, _UNDERSTOOD, _WHO)
    _check_numbers(config, str(folder))
    check_patterns(config, model.modules, str(folder))
    peft = _on_skeleton(config, model, folder)
    layers, saved = _layers(peft, folder), _saved(peft)
    _check_hits(config, layers, saved, str(folder))
    wanted = _wanted(peft)
    swapped = _swapped(wanted, layers, saved, model)
    pairs = tuple(f"{PREFIX}{name}.lora_" for name in layers)
    if strangers := sorted(name for name in wanted if name not in swapped and not name.startswith(pairs)):
        raise unserved(folder / CONFIG, f"wants {strangers[0]}", _WHO)
    path = folder / TENSORS
    tensors, digest = read_tensors(path, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    floats = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    for name, tensor in floats.items():
        check_finite(path, name, tensor)
    swaps = [(module, own, floats[name]) for name, (module, own) in swapped.items()]
    hooks = {name: _change(name, layer, floats, model, path) for name, layer in layers.items()}
    settings = {
        name: (layer.scaling[_NAME], type(hooks[name]).__name__, _is_dora(layer))
        for name, layer in sorted(layers.items())
    }
    told = json.dumps(["plain", settings], sort_keys=True).encode()
    return Changes(AdapterKey(hashlib.sha256(digest + told).hexdigest()), hooks, swaps)


def _check_numbers(config: Any, at: str) -> None:
    ranks, alphas = (config.rank_pattern or {}), (config.alpha_pattern or {})
    for rank in (config.r, *(ranks.values() if isinstance(ranks, Mapping) else [ranks])):
        if type(rank) is not int or not 0 < rank <= MOST_RANK:
            raise ModelError(at, f"its rank {str(rank)[:20]} is none", f"ranks are 1 to {MOST_RANK}")
    for alpha in (config.lora_alpha, *(alphas.values() if isinstance(alphas, Mapping) else [alphas])):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ModelError(at, f"its lora_alpha {str(alpha)[:20]} is no number", ANOTHER)


def _on_skeleton(config: Any, model: PlainModel, folder: Path) -> Any:
    """PEFT's model around a skeleton, no tensor of which has memory."""
    from peft import get_peft_model

    config.task_type = None  # others than CAUSAL_LM would add modules of their own
    config.init_lora_weights = False  # there is nothing to be initialised
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about training
            return get_peft_model(model.skeleton(), config)
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        RuntimeError,
        NotImplementedError,
        re.error,
    ) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        fault = f"PEFT cannot put it on this base ({reason})"
        raise ModelError(str(folder / CONFIG), fault, "use its own base") from error


def _wanted(peft: Any) -> dict[str, torch.Tensor]:
    """What PEFT would save of the adapter, by the file's names."""
    from peft.utils import get_peft_model_state_dict

    wanted: dict[str, torch.Tensor] = get_peft_model_state_dict(peft, save_embedding_layers=False)
    return wanted


def _layers(peft: Any, folder: Path) -> dict[str, Any]:
    """PEFT's LoRA layers by name of the module they are around.

    Raises:
        NotServed: a layer is of another kind than those of ``changes.py``.
    """
    from peft.tuners import lora
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    found = {}
    for name, module in peft.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            kind = type(module.lora_variant.get(_NAME))
            if type(module) not in (lora.Linear, lora.Embedding) or kind not in (
                type(None),
                DoraLinearVariant,
                DoraEmbeddingVariant,
            ):
                raise unserved(
                    folder / CONFIG, f"has LoRA on {name}, a {type(module.base_layer).__name__}", _WHO
                )
            found[name] = module
    return found


def _saved(peft: Any) -> dict[str, Any]:
    """Modules that the adapter replaces, by name."""
    from peft.utils.other import ModulesToSaveWrapper

    return {
        name: module.modules_to_save[_NAME]
        for name, module in peft.base_model.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _check_hits(config: Any, layers: Iterable[str], saved: Mapping[str, Any], at: str) -> None:
    # PEFT leaves targets out that are saved whole.
    whole = [
        f"{name}.{inner}" for name, module in saved.items() for inner, _ in module.named_modules() if inner
    ]
    for what, given, names in (
        ("target", config.target_modules, [*layers, *saved, *whole]),
        ("module to save", config.modules_to_save, list(saved)),
    ):
        for wanted in [] if given is None or isinstance(given, str) else given:
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                fault = f"its {what} {str(wanted)[:80]} has no place in this base"
                raise ModelError(at, fault, "use its own base")


def _swapped(
    names: Iterable[str], layers: Mapping[str, Any], saved: Mapping[str, Any], model: PlainModel
) -> dict[str, tuple[str, str]]:
    """Which of the file's tensors replace a parameter, of a whole module or a bias: (module, parameter's own name)."""
    found = {}
    for name in names:
        module, _, own = name.removeprefix(PREFIX).rpartition(".")
        around = module.removesuffix(".base_layer")
        is_whole = any(module == whole or module.startswith(f"{whole}.") for whole in saved)
        is_bias = own == "bias" and (around in layers or module in model.modules)
        if around in model.modules and (is_whole or is_bias):
            found[name] = (around, own)
    return found


def _is_dora(layer: Any) -> bool:
    return layer.lora_variant.get(_NAME) is not None


def _change(
    name: str, layer: Any, tensors: Mapping[str, torch.Tensor], model: PlainModel, path: Path
) -> Change:
    """What the pair of one layer does. DoRA's norm is of the base's weight and the pair, and both are constant."""
    scale, at = float(layer.scaling[_NAME]), f"{PREFIX}{name}"
    is_embedding = f"{at}.lora_embedding_A" in tensors
    ending = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    a, b = (tensors[f"{at}.{end}"] for end in ending)
    factor = None
    if _is_dora(layer):
        weight = model.weight(name)
        # An embedding's norm is over the tokens, of a linear layer over what it reads.
        whole = weight + scale * (b @ a).T if is_embedding else weight + scale * (b @ a)
        factor = tensors[f"{at}.lora_magnitude_vector"] / torch.linalg.norm(
            whole, dim=0 if is_embedding else 1
        )
        check_finite(path, f"{at}.lora_magnitude_vector by its norm", factor)
    if is_embedding:
        return EmbeddingChange(a.t().contiguous(), b.t().contiguous(), scale, factor)
    return LinearChange(a, b, tensors.get(f"{at}.lora_B.bias"), scale, factor)
