"""A model of transformers on the tensors of a base that is loaded already: nothing large is held twice.

Only for the families of ``base_weights.py``. Linear layers are read through the base's fused products, embeddings
and norms are the base's own tensors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.serving.base_weights import EMBEDDINGS, BaseWeights, Group


class _Reader:
    """A group's product, made once for its parts, which read the same input one after the other."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """What ``part`` of the group makes of ``x`` (..., in), as a view."""
        if self._last is None or self._last[0] is not x:
            out = self.group.product(x.reshape(-1, x.shape[-1]), Scratch())  # memory of its own
            self._last = (x, out.view(*x.shape[:-1], -1))
        parts = self._last[1].split(self.group.sizes, -1)
        if part == len(parts) - 1:
            self._last = None  # activations are not kept from pass to pass
        return parts[part]


class SharedLinear(nn.Module):
    """One linear layer of a group. Where ``weight`` or ``bias`` is set to another tensor, that one is computed."""

    def __init__(self, reader: _Reader, part: int) -> None:
        super().__init__()
        group = reader.group
        self._reader, self._part = reader, part
        self.in_features, self.out_features = group.width, group.sizes[part]
        self._shared_bias: torch.Tensor | None = None
        if group.product.bias is not None:
            self._shared_bias = group.product.bias.split(group.sizes)[part]
        self.register_parameter("weight", None)  # None: the group's
        self.bias = None if self._shared_bias is None else nn.Parameter(self._shared_bias, False)
        self.__dict__["_own_bias"] = self.bias  # no second parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., out) for ``x`` (..., in)."""
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        out = self._reader.read(x, self._part)
        if self.bias is None or self.bias is self._own_bias:
            return out
        return out + (self.bias - self._shared_bias)

    def dense(self) -> torch.Tensor:
        """The weight (out, in), laid out anew."""
        group = self._reader.group
        return group.product.dense().split(group.sizes)[self._part]


def shared_model(base: BaseWeights, skeleton: Any) -> Any:
    """The model that ``skeleton``, without memory of its own, describes, on the tensors of ``base``; used up."""
    body = skeleton.model
    for group in base.groups:
        reader = _Reader(group)
        for part, name in enumerate(group.names):
            skeleton.set_submodule(name, SharedLinear(reader, part))
    skeleton.get_submodule(EMBEDDINGS).weight = nn.Parameter(base.embeddings, False)
    for layer, weights in zip(body.layers, base.layers, strict=True):
        layer.input_layernorm.weight = nn.Parameter(weights.attention_norm.weight, False)
        layer.post_attention_layernorm.weight = nn.Parameter(weights.mlp_norm.weight, False)
    body.norm.weight = nn.Parameter(base.norm.weight, False)
    body.rotary_emb = type(body.rotary_emb)(config=skeleton.config)
    if any(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers())):
        raise AssertionError("a tensor of the model is none of the base's")
    return skeleton.eval()
