"""What of a model decides memory and time, from its config.json and headers of safetensors; no weights are read."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from tunesmith.config.yaml_file import read_yaml_file
from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder, find_base
from tunesmith.paths import expanded

ARCHITECTURES = Path(__file__).with_name("architectures.yaml")
_GATES = ("gate_proj", "gate_up_proj", "w1", "w3")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, in numbers.

    Attributes:
        parameters: all, tied ones once.
        matrices: of the layers' linear parts, with which each token is multiplied; ``head``: with which each target is.
        width, queries, keys, inner: of a token's state, all query heads, all key heads (values as many), the MLP, or
            all the experts a token goes to, in the mean over layers.
        routed: experts that a token goes to in a layer, in the mean, rounded up; 0: of no mixture.
        is_gated: whether the MLP has a gate; ``is_rms``: whether norms are RMSNorms.
        largest: parameters of the largest part: a layer, or the embeddings.
    """

    parameters: int
    matrices: int
    head: int
    layers: int
    width: int
    queries: int
    keys: int
    inner: int
    is_gated: bool
    is_rms: bool
    vocabulary: int
    largest: int
    routed: int = 0


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, in numbers.

    Attributes:
        parameters: all that is trained.
        matrices: of those, in the layers; ``head``: in the head.
        layer_inputs, layer_ranks: widths of the adapted layers' inputs, and ranks, summed over one layer.
        dropout: its probability.
    """

    parameters: int
    matrices: int
    head: int
    layer_inputs: int
    layer_ranks: int
    dropout: float


@contextmanager
def shape_folder(model_id: str) -> Iterator[BaseFolder]:
    """The model's folder, with its config.json at least; of a shipped shape a temporary one with nothing else.

    Raises:
        ModelError: there is neither.
    """
    config = None if expanded(model_id).is_dir() else shipped_shapes().get(model_id.lower())
    if config is None:
        yield find_base(model_id, weights=False)
        return
    with TemporaryDirectory(prefix="tunesmith-plan-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield BaseFolder(model_id, Path(folder), None)


def shipped_shapes() -> Mapping[str, Mapping[str, Any]]:
    """config.json by the model's name in small letters."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, entry in read_yaml_file(ARCHITECTURES, ARCHITECTURES.name).values.items():
        for known in (name, *entry["names"]):
            found[known.lower()] = entry["config"]
    return found


def model_shape(model: Any, place: str) -> ModelShape:
    """Sizes of a model without memory, from ``skeleton``.

    Raises:
        ModelError: it is no decoder with attention, or a mixture of experts in an unknown form.
    """
    config = model.config.get_text_config(decoder=True)
    layers, head, embeddings = (
        _layers(model, config),
        model.get_output_embeddings(),
        model.get_input_embeddings(),
    )
    heads = getattr(config, "num_attention_heads", None)
    if layers is None or head is None or not isinstance(heads, int):
        fault = "has no list of layers with attention and a head"
        raise ModelError(place, fault, "plan for a decoder of transformers with attention in every layer")
    linear = {name: part for name, part in layers.named_modules() if _is_linear(part)}
    experts = _experts(layers, config, place)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelShape(
        parameters=_count(model),
        matrices=sum(part.weight.numel() for part in linear.values()) + experts.used,
        head=head.weight.numel(),
        layers=len(layers),
        width=int(config.hidden_size),
        queries=heads * size,
        keys=_largest(getattr(config, "num_key_value_heads", None) or heads) * size,
        inner=-(-experts.inner // len(layers)) if experts.routed else _inner(config, linear),
        is_gated=any(name.rpartition(".")[2] in _GATES for name in (*linear, *experts.names)),
        is_rms=any("RMSNorm" in type(part).__name__ for part in layers.modules()),
        vocabulary=head.weight.shape[0],
        largest=max(*(_count(layer) for layer in layers), embeddings.weight.numel()),
        routed=-(-experts.routed // len(layers)),
    )


@dataclass(frozen=True)
class _Experts:
    """Of all layers: ``used`` numbers that a token is multiplied with, ``inner`` widths of its MLPs, shared ones and
    those of layers without experts among them, and experts it is ``routed`` to; ``names`` of their matrices."""

    used: int = 0
    inner: int = 0
    routed: int = 0
    names: tuple[str, ...] = ()


def _experts(layers: nn.ModuleList, config: Any, place: str) -> _Experts:
    """What a token sees of mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538), whose matrices transformers
    holds as one tensor (experts, rows, columns).

    Raises:
        ModelError: it is a mixture in another form, of which no more than the size is known.
    """
    stacked = {name: p for name, p in layers.named_parameters() if p.dim() == 3 and "expert" in name}
    count = next((int(found) for name in _EXPERTS if (found := getattr(config, name, None))), 0)
    if not stacked and count < 2:
        return _Experts()
    used = next((int(found) for name in _USED if (found := getattr(config, name, None))), None)
    downs = {name: p for name, p in stacked.items() if name.endswith("down_proj")}
    if not downs or used is None:
        missing = "a form that plan does not know" if not downs else "numbers that config.json does not tell"
        fault = f"is a mixture of experts in {missing}: what a token sees of it cannot be counted"
        raise ModelError(place, fault, "plan for a dense model")
    # One side of a down projection is the state's width, the other the expert's.
    inner = sum(used * p[0].numel() // int(config.hidden_size) for p in downs.values())
    plain = [p for name, p in layers.named_modules() if name.endswith("down_proj") and _is_linear(p)]
    return _Experts(
        used=sum(used * p[0].numel() for p in stacked.values()),
        inner=inner + sum(_sides(part)[0] for part in plain),
        routed=used * len(downs),
        names=tuple(stacked),
    )


def _layers(model: Any, config: Any) -> nn.ModuleList | None:
    """The decoder's list of layers: of a model with a tower for pictures there are several lists."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    count = getattr(config, "num_hidden_layers", None)
    return max(lists, key=lambda found: (len(found) == count, len(found)), default=None)


def _inner(config: Any, linear: Mapping[str, Any]) -> int:
    told = getattr(config, "intermediate_size", None)
    return _largest(told) if told else max(_sides(part)[1] for part in linear.values())


def _largest(value: Any) -> int:
    """A size, which some models give for each layer."""
    return max(map(int, value)) if isinstance(value, list | tuple) else int(value)


def adapter_shape(model: Any, layers: int) -> Adapter:
    """Sizes of the adapter in a model of PEFT's."""
    ends = (_plain(model).get_output_embeddings(), _plain(model).get_input_embeddings())
    head = sum(p.numel() for p in ends[0].parameters() if p.requires_grad)
    embeddings = sum(p.numel() for p in ends[1].parameters() if p.requires_grad)
    inputs = ranks = 0
    dropout = 0.0
    for module in model.modules():
        for name, a in getattr(module, "lora_A", {}).items():
            if any(module is end for end in ends):
                continue
            inputs, ranks = inputs + a.weight.shape[1], ranks + a.weight.shape[0]
            dropout = max(dropout, getattr(module.lora_dropout[name], "p", 0.0))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapter(count, count - head - embeddings, head, -(-inputs // layers), -(-ranks // layers), dropout)


def without_memory(model: Any) -> Any:
    """A model on the meta device as one on the CPU in float32 that takes no memory: every tensor is one number, seen
    as many times as it has elements. Who only asks for sizes cannot tell it from a loaded one."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in known:
                numbers = torch.zeros((), dtype=torch.float32).expand(old.shape)
                known[id(old)] = nn.Parameter(numbers, requires_grad=old.requires_grad)
            module._parameters[name] = known[id(old)]
    return model


def stored_numbers(base: BaseFolder) -> int | None:
    """How many numbers the *.safetensors of a model hold, from their headers; None where there are none.

    Raises:
        ModelError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in base.weight_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ModelError(
                base.model_id, f"{file.name} cannot be read ({reason})", "copy its files again"
            ) from error
    return total if base.weight_files else None


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sides(module: Any) -> tuple[int, int]:
    """(in, out); ``Conv1D`` keeps its weight the other way round."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)
