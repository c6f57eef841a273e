"""All that differs between LoRA and full-parameter training: tensors trained, tensors saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tunesmith.models.lora import attach, continue_adapter, lora_config, save_adapter

MethodKind = Literal["lora", "full"]


def prepare_lora(
    model: Any, given: Mapping[str, Any], *, seed: int, place: str, continue_from: Path | None
) -> Any:
    """The base with a trainable adapter: fresh, or continued from a LoRA checkpoint's folder.

    Raises:
        ConfigError, ModelError: the configuration or the adapter does not fit the model.
    """
    if continue_from is not None:
        return continue_adapter(model, continue_from, trainable=True)
    return attach(model, lora_config(given, model, place), seed, place)


def prepare_full(model: Any) -> Any:
    """The base with every weight trainable."""
    return model.requires_grad_(True)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The tensors that are trained, in the model's order, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def is_finite(model: nn.Module) -> bool:
    """Whether every trained number is finite."""
    # By the extremes, which NaN passes on: a mask of a large embedding would be the peak of the run's memory.
    extremes = [torch.stack(tensor.detach().aminmax()) for tensor in trainable_parameters(model)]
    return all(bool(pair.isfinite().all()) for pair in extremes)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied weights count once."""
    return sum(p.numel() for p in trainable_parameters(model)), sum(p.numel() for p in model.parameters())


def base_is_without_adapter(model: Any) -> bool:
    """Whether a model with its fresh adapter switched off is the base.

    It is not with PiSSA and its kin, which move a part of the base's weights into the adapter.
    """
    if not hasattr(model, "peft_config"):
        return False
    init = str(model.peft_config[model.active_adapter].init_lora_weights).lower()
    return not init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def save_servable(model: Any, kind: MethodKind, tokenizer: Any, folder: Path, base_name: str) -> None:
    """Write all that serving needs: weights or adapter, tokenizer, chat template, generation settings."""
    if kind == "lora":
        save_adapter(model, folder, base_name)
        model.get_base_model().generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore(model: Any, kind: MethodKind, folder: Path) -> None:
    """Put the trained tensors of a checkpoint back into the model it was saved from."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if kind == "lora":
        set_peft_model_state_dict(model, tensors)
    else:
        # Tied weights are saved once; the other name is the same tensor.
        model.load_state_dict(tensors, strict=False)


def set_generation_defaults(model: Any, stop_token_ids: list[int], stop_strings: list[str]) -> None:
    """Record where answers end, so that a saved model stops there in any program.

    The base's sampling settings stay; ids that end an answer are those it was trained to end with.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.generation_config.eos_token_id = stop_token_ids
    plain.generation_config.stop_strings = stop_strings or None
