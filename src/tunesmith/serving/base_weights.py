"""The base model as the CPU engine wants it: plain tensors, layers that read the same input fused into one."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.checkpoints.manifest import fingerprint_weights
from tunesmith.models.base import BaseFolder, load_model
from tunesmith.models.kernels.arrangement import Shape
from tunesmith.models.kernels.layer import Norm
from tunesmith.models.kernels.linear import Linear
from tunesmith.models.kernels.reading import UnreadableError, read_decoder
from tunesmith.serving.adapter_files import NotServed
from tunesmith.serving.pages import HugePages
from tunesmith.serving.product import Product

# Position embeddings that do not change with the length of a request, so that one table holds them.
_STEADY_ROPE = ("default", "linear", "llama3", "yarn")
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Group:
    """Linear layers on one input of ``width``, as one product with the sum of ``sizes`` as output.

    ``number`` is the group's place in every adapter; ``names`` and ``sizes`` are of its parts.
    """

    number: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    width: int
    product: Product


@dataclass(frozen=True)
class LayerWeights:
    """A decoder layer, in the order of use."""

    attention_norm: Norm
    qkv: Group
    shape: Shape
    output: Group
    mlp_norm: Norm
    gate_up: Group
    down: Group


@dataclass(frozen=True)
class BaseWeights:
    """All of a base: ``embeddings`` (vocabulary, width); ``cos`` and ``sin`` (positions, 1, head size)."""

    embeddings: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Group
    cos: torch.Tensor
    sin: torch.Tensor
    context_length: int  # as the model was made
    fingerprint: str  # of its files

    @property
    def groups(self) -> list[Group]:
        """Every group, in the order of their numbers."""
        parts = [(x.qkv, x.output, x.gate_up, x.down) for x in self.layers]
        return [group for layer in parts for group in layer] + [self.head]


def hashed_beside(base: BaseFolder) -> "Future[str]":
    """The fingerprint of its files, which takes as long as loading them and a thread of its own meanwhile."""
    worker = ThreadPoolExecutor(1)
    found = worker.submit(lambda: fingerprint_weights(base.weight_files)[1])
    worker.shutdown(wait=False)
    return found


def load_base(
    base: BaseFolder, positions: int | None, fingerprint: "Future[str] | None" = None
) -> BaseWeights:
    """Read a base for serving.

    Args:
        base: its folder.
        positions: longest request, in tokens; None or more than the model has: what it has.
        fingerprint: from ``hashed_beside``, where that was begun before.

    Raises:
        NotServed: it is none of the kind this engine computes.
        ModelError: it cannot be loaded.
    """
    fingerprint = fingerprint or hashed_beside(base)
    try:
        model = load_model(base, dtype=torch.float32, device=torch.device("cpu"), context_length=None)
        limit = int(model.config.max_position_embeddings)
        return _read(model.eval().requires_grad_(False), min(positions or limit, limit), fingerprint)
    except UnreadableError as error:
        raise NotServed(
            base.model_id, f"the CPU engine does not serve it: {error}", "use another engine"
        ) from error


def _read(model: Any, positions: int, fingerprint: "Future[str]") -> BaseWeights:
    decoder = read_decoder(model)
    kind = getattr(decoder.rotary, "rope_type", "default")
    if kind not in _STEADY_ROPE:
        raise UnreadableError(f"its {kind} positions change with the length of a request")
    cos, sin = decoder.rotary(decoder.norm.weight, torch.arange(positions)[None])
    layers, memory = [], HugePages()
    for number, layer in enumerate(decoder.layers):
        at, first = f"model.layers.{number}", 4 * number
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        layers.append(
            LayerWeights(
                _norm(layer.attention_norm),
                _group(first, [f"{attention}.{name}_proj" for name in "qkv"], layer.qkv, memory),
                layer.shape,
                _group(first + 1, [f"{attention}.o_proj"], [layer.output], memory),
                _norm(layer.mlp_norm),
                _group(first + 2, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], layer.gate_up, memory),
                _group(first + 3, [f"{mlp}.down_proj"], [layer.down], memory),
            )
        )
    return BaseWeights(
        decoder.embeddings.weight.detach().clone(),
        tuple(layers),
        _norm(decoder.norm),
        _group(4 * len(layers), [HEAD], [decoder.head], memory),
        cos[0][:, None].contiguous(),
        sin[0][:, None].contiguous(),
        int(model.config.max_position_embeddings),
        fingerprint.result(),
    )


def _norm(norm: Norm) -> Norm:
    # A copy: the smallest tensor that still lies in the mapped file would keep all of it in memory.
    return Norm(norm.weight.detach().clone(), norm.epsilon)


def _group(number: int, names: Sequence[str], parts: Sequence[Linear], memory: HugePages) -> Group:
    sizes = tuple(len(part.weight) for part in parts)
    biases = [part.bias for part in parts]
    weights = [part.weight.detach() for part in parts]
    bias = None
    if any(b is not None for b in biases):
        zeros = [torch.zeros(size) for size in sizes]
        bias = torch.cat([z if b is None else b.detach() for z, b in zip(zeros, biases, strict=True)])
    return Group(number, tuple(names), sizes, weights[0].shape[1], Product(weights, bias, memory))
