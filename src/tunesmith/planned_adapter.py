"""The adapter that a configuration would train, as the rules of serving engines look at it; no weights are read."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from tunesmith.config.load import LoadedConfig
from tunesmith.config.schema import LoraMethod
from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.models.lora import attach, default_targets, lora_config
from tunesmith.serving.findings import Subject, architecture_of, read_json
from tunesmith.starting_points import adapter_to_continue


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
        folder = adapter_to_continue(start, base, lora, loaded.place("lora_config"))
        lora = {
            key: value
            for key, value in read_json(folder / "adapter_config.json").items()
            if value is not None
        }
        place = _of_adapter(loaded)
    settings, adapted, linear = _on_layers(lora, model, loaded.place("lora_config"))
    generation = loaded.config.data.generation_config
    return Subject(
        settings,
        place,
        architecture_of(base),
        int(model.config.get_text_config().vocab_size),
        adapted,
        linear,
        stretched=context_length if limit is not None and context_length > limit else None,
        own_template=generation.prompt_format is not None,
        stops=tuple(generation.stopping_sequences),
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


def with_adapter(base: BaseFolder, given: Mapping[str, Any], place: str) -> Any:
    """The model with a fresh adapter, both without memory.

    Raises:
        ConfigError, ModelError: as when it would be trained.
    """
    import torch

    model = skeleton(base)
    # How an adapter is filled at the start may ask for weights, and does not change its size.
    settings = {**given, "init_lora_weights": True}
    with torch.device("meta"):
        return attach(model, lora_config(settings, model, place), 0, place)


def _on_layers(
    lora: Mapping[str, Any], model: Any, place: str
) -> tuple[dict[str, Any], frozenset[str], tuple[str, ...]]:
    """PEFT's settings in full, which of embeddings and head they reach, and the linear layers' names."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

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
