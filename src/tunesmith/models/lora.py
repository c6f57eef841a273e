"""LoRA through PEFT: defaults, targets, attaching, continuing, merging.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds B·A·x·alpha/r to frozen linear layers. Every setting of PEFT's
``LoraConfig`` is passed through; an adapter saved here loads in plain PEFT with equal logits.
"""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.config.lora_keys import LORA_DEFAULTS
from tunesmith.errors import ConfigError, ModelError


def lora_config(given: Mapping[str, Any], model: Any, place: str) -> Any:
    """PEFT's ``LoraConfig`` from the file's ``lora_config`` group and the documented defaults.

    Args:
        given: keys as in the file.
        model: the base model, whose layers are the default targets: all linear layers, the input embeddings
            and the head.
        place: where the group stands, for errors.

    Raises:
        ConfigError: PEFT refuses a value, or a target matches no layer of the model.
    """
    from peft import LoraConfig

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **LORA_DEFAULTS, **given}
    if settings["task_type"] != "CAUSAL_LM":
        raise ConfigError(
            f"{place}.task_type", f"is {settings['task_type']}", "leave it out, or set CAUSAL_LM"
        )
    if settings.get("target_modules") == []:
        raise ConfigError(f"{place}.target_modules", "is empty", "leave it out for all layers, or name some")
    if settings.get("target_modules") is None and not settings.get("target_parameters"):
        settings["target_modules"] = default_targets(model)
    targets = settings.get("target_modules")
    if isinstance(targets, list | tuple):
        settings["target_modules"] = list(targets)
        _check_targets(model, targets, place)
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            place, f"PEFT refuses this lora_config ({reason})", "see PEFT's LoraConfig"
        ) from error


def default_targets(model: Any) -> list[str]:
    """Last names of all linear layers, the input embeddings and the head, in the model's order."""
    embeddings = model.get_input_embeddings()
    return list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or module is embeddings or type(module).__name__ == "Conv1D"
        )
    )


def _check_targets(model: Any, targets: Sequence[Any], place: str) -> None:
    known = [name for name, _ in model.named_modules() if name]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in known):
            continue
        have = default_targets(model)
        near = difflib.get_close_matches(str(target), have, 1)
        hint = f"closest is {near[0]}; it has" if near else "it has"
        raise ConfigError(
            f"{place}.target_modules",
            f"no layer of this model is called {target}",
            f"{hint} {', '.join(have)}",
        )


def attach(model: Any, config: Any, seed: int, place: str) -> Any:
    """A PEFT model around ``model`` with a fresh adapter; the base is frozen.

    Raises:
        ConfigError: PEFT cannot apply the configuration to this model.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        with _quiet():
            return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            place, f"PEFT cannot apply this lora_config ({reason})", "see PEFT's LoraConfig"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Adapters on tied embeddings: `merge` unties them first, which is what the warning is about.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # PEFT calls by an old name what transformers has renamed.
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@contextmanager
def without_fresh_adapter(model: Any, *, is_fresh: bool) -> Iterator[None]:
    """Within the block a fresh adapter, which adds exactly 0, is not computed. Of use before training."""
    if is_fresh and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def continue_adapter(model: Any, folder: Path, *, trainable: bool) -> Any:
    """A PEFT model with the adapter of ``folder``, to go on training or to use.

    Raises:
        ModelError: the folder holds no adapter, or one that does not fit this base in every tensor.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(str(folder), "holds no adapter (no adapter_config.json)", "name a LoRA checkpoint")
    if not (folder / "adapter_model.safetensors").is_file():
        # PEFT would go on to an older, pickled file.
        raise ModelError(
            str(folder), "has no adapter_model.safetensors", "convert the adapter to safetensors"
        )
    try:
        with _quiet():
            tuned = PeftModel.from_pretrained(model, folder, is_trainable=trainable, local_files_only=True)
    except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            str(folder), f"the adapter does not fit this base ({reason})", "use its own base"
        ) from error
    _check_every_tensor_landed(tuned, folder)
    return tuned


def _check_every_tensor_landed(tuned: Any, folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            str(folder), f"its adapter cannot be read ({error})", "use another checkpoint"
        ) from error
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    if missing := sorted(wanted - saved):
        raise ModelError(str(folder), f"the adapter lacks {missing[0]}", "it is damaged or of another base")
    strangers = sorted(key for key in saved - wanted if not key.endswith((".weight",)) or "lora_" in key)
    if strangers:
        raise ModelError(
            str(folder), f"{strangers[0]} has no place in this base", "use the adapter's own base"
        )


def adapter_keys(model: Any, trained: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The name of each trained tensor in ``adapter_model.safetensors``, by its name in the model."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
    names = {id(tensor): name for name, tensor in trained.items()}
    return {names[id(tensor)]: key for key, tensor in saved.items() if id(tensor) in names}


def save_adapter(
    model: Any, folder: Path, base_name: str, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    PEFT would add whole copies of embedding layers that are mere targets; they are the base's and left out.
    ``base_name`` is recorded as the base: the name the user gave, not a path of this machine. ``tensors``, by their
    names in the model, are written in place of the model's own, which may be split.
    """
    config = model.peft_config[model.active_adapter]
    loaded_from, config.base_model_name_or_path = config.base_model_name_or_path, base_name
    try:
        model.save_pretrained(
            folder,
            save_embedding_layers=False,
            safe_serialization=True,
            state_dict=dict(tensors) if tensors is not None else None,
        )
    finally:
        config.base_model_name_or_path = loaded_from
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card says nothing


def merge(model: Any) -> Any:
    """The base with the adapter folded into its weights: W + B·A·alpha/r.

    Where the base ties embeddings and head and one of them is adapted, the two are untied first: each then
    has weights of its own, and the merged model computes what the unmerged one did.
    """
    base = model.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = hasattr(head, "base_layer") or hasattr(embeddings, "base_layer")
    if getattr(base.config, "tie_word_embeddings", False) and head is not None and adapted:
        plain_head = getattr(head, "base_layer", head)
        plain_head.weight = nn.Parameter(plain_head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
    return model.merge_and_unload(safe_merge=True)
