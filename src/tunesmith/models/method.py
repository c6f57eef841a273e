"""All that differs between LoRA and full-parameter training: tensors trained, tensors saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tunesmith.errors import CheckpointError
from tunesmith.models.lora import adapter_keys, attach, continue_adapter, lora_config, save_adapter

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
    """Whether every trained number is finite; of a split model, every one that this worker holds."""
    held = [
        getattr(tensor.detach(), "_local_tensor", tensor.detach()) for tensor in trainable_parameters(model)
    ]
    # By the extremes, which NaN passes on: a mask of a large embedding would be the peak of the run's memory.
    extremes = [torch.stack(tensor.aminmax()) for tensor in held if tensor.numel()]
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


def servable_tensors(model: nn.Module, kind: MethodKind) -> dict[str, torch.Tensor]:
    """What ``save_servable`` writes of the model, by name; tied weights once."""
    if kind == "lora":
        return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    tensors = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - tensors.keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def save_servable(
    model: Any,
    kind: MethodKind,
    tokenizer: Any,
    folder: Path,
    base_name: str,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Write all that serving needs: weights or adapter, tokenizer, chat template, generation settings.

    Args:
        tensors: what ``servable_tensors`` gave, whole.
    """
    if kind == "lora":
        save_adapter(model, folder, base_name, tensors)
        model.get_base_model().generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=dict(tensors))
    tokenizer.save_pretrained(folder)


def read_trained(model: nn.Module, kind: MethodKind, folder: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint, whole, by their names in the model that it was saved from.

    Raises:
        CheckpointError: it is of another model, or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    try:
        if kind == "lora":
            saved = load_file(folder / "adapter_model.safetensors")
            keys = adapter_keys(model, trained)
            found = {name: saved[keys[name]] for name in trained}
        else:
            saved = _weights(folder)
            found = {name: saved[name] for name in trained}
    except KeyError as error:
        raise CheckpointError(
            str(folder), f"has no {error.args[0]}", "use a checkpoint of this run"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            str(folder), f"cannot be read ({error})", "use an earlier checkpoint"
        ) from error
    for name, tensor in found.items():
        if tensor.shape != trained[name].shape:
            raise CheckpointError(str(folder), f"{name} has another shape", "use a checkpoint of this run")
    return found


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """By names in memory: some architectures are saved under other names, in other pieces, than they compute with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return dict(model.state_dict())


def set_generation_defaults(model: Any, stop_token_ids: list[int], stop_strings: list[str]) -> None:
    """Record where answers end, so that a saved model stops there in any program.

    The base's sampling settings stay; ids that end an answer are those it was trained to end with.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.generation_config.eos_token_id = stop_token_ids
    plain.generation_config.stop_strings = stop_strings or None
