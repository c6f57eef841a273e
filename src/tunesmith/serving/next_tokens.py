"""One new token of each of many requests through all layers: by one call of C, or layer by layer by torch.

``native/next_tokens.h`` computes what ``forward.py`` does, for such batches only, where torch's calls would take as
long as what they compute. It reads weights in the panels of ``product.py`` and adapters by ``grouped_lora.py``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.native import compiled
from tunesmith.serving.base_weights import BaseWeights, Group, LayerWeights
from tunesmith.serving.forward import NextTokens, embed, forward
from tunesmith.serving.grouped_lora import Grouped
from tunesmith.serving.kv_cache import KvCache
from tunesmith.serving.mixed_lora import Plan

_VECTOR = 16  # numbers of a vector of native/vectors.h
_KEYS = 16  # KEYS of native/next_attention.h


class NextTokenPass:
    """The layers of a base for batches of new tokens, whose keys and values go to ``cache``."""

    def __init__(self, base: BaseWeights, cache: KvCache, scratch: Scratch) -> None:
        self._base, self._cache, self._scratch = base, cache, scratch
        self._windows = {layer.shape.window for layer in base.layers}
        self._layers = _CompiledLayers.of(base, cache)

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], plan: Plan
    ) -> torch.Tensor:
        """Hidden states after the last layer, (rows, width); valid until the next pass.

        Args:
            tokens: the last token of each request.
            positions: its place in the request.
            slots: where the request's tokens before it are cached.
            plan: the rows' adapters.
        """
        if self._layers is not None and isinstance(plan, Grouped):
            x = embed(self._base, tokens, plan, self._scratch)
            starts = [slot * self._cache.capacity for slot in slots]
            self._layers(x, torch.tensor(starts), torch.tensor(positions), plan, self._scratch)
            return x
        places = torch.tensor(positions)
        attention = NextTokens(self._cache, slots, places, self._windows)
        return forward(self._base, tokens, places, attention, plan, self._scratch)


class _CompiledLayers:
    """A base's layers as the C reads them: ``decoder_layer`` and ``decoder_numbers`` of native/next_tokens.h."""

    def __init__(self, function: Callable[..., Any], base: BaseWeights, cache: KvCache) -> None:
        self._function, self._base, self._cache = function, base, cache  # kept while addresses are in use
        layers = list(zip(base.layers, cache.layers, strict=True))
        self._table = torch.tensor([_addresses(*layer) for layer in layers], dtype=torch.int64)
        self._numbers = torch.tensor(
            [
                (layer.attention_norm.epsilon, layer.mlp_norm.epsilon, layer.shape.scale)
                for layer in base.layers
            ],
            dtype=torch.float64,
        )
        groups = base.groups[:-1]
        self._widest_input = max(group.width for group in groups)
        self._widest_output = max(sum(group.sizes) for group in groups) + _VECTOR
        attention = max(_share(layer, cache.capacity) for layer in base.layers)
        self._share = max(attention, self._widest_input * _VECTOR)  # or a panel's numbers

    @staticmethod
    def of(base: BaseWeights, cache: KvCache) -> "_CompiledLayers | None":
        """None where the C was not compiled, or a weight is kept in another layout than it reads."""
        function = compiled("serving", "next_tokens", "pppnpnpnppppppppnnnn", base.embeddings)
        if function is None or any(group.product.panels is None for group in base.groups):
            return None
        return _CompiledLayers(function, base, cache)

    def __call__(
        self, x: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor, plan: Grouped, scratch: Scratch
    ) -> None:
        """``x`` (rows, width) becomes what leaves the last layer; ``starts`` and ``positions`` (rows,) int64."""
        rows, width = x.shape
        self._function(
            x,
            self._table,
            self._numbers,
            len(self._table),
            plan.table,
            len(plan.table),
            scratch.take("shrunk", (rows, plan.rank), x),
            plan.rank,
            starts,
            positions,
            self._base.cos,
            self._base.sin,
            scratch.take("next inputs", (rows, self._widest_input), x),
            scratch.take("laid out", (rows, self._widest_input), x),
            scratch.take("next outputs", (rows, self._widest_output), x),
            scratch.take("attention room", (torch.get_num_threads(), self._share), x),
            self._share,
            self._cache.capacity,
            rows,
            width,
        )


def _addresses(layer: LayerWeights, cache: torch.Tensor) -> list[int]:
    """``decoder_layer`` of native/next_tokens.h."""
    shape = layer.shape
    return [
        layer.attention_norm.weight.data_ptr(),
        *_of_group(layer.qkv),
        *_of_group(layer.output),
        layer.mlp_norm.weight.data_ptr(),
        *_of_group(layer.gate_up),
        *_of_group(layer.down),
        cache.data_ptr(),
        shape.heads,
        shape.groups,
        shape.size,
        shape.window or 0,
        layer.down.width,
    ]


def _of_group(group: Group) -> tuple[int, int, int]:
    """``decoder_linear`` of native/next_tokens.h."""
    found, bias = group.product.panels, group.product.bias
    assert found is not None
    panels, bits = found
    return panels.data_ptr(), bits, 0 if bias is None else bias.data_ptr()


def _share(layer: LayerWeights, most: int) -> int:
    """ATTENTION_SHARE of native/next_attention.h."""
    heads, size = layer.shape.heads, -(-layer.shape.size // _VECTOR) * _VECTOR
    return (2 * heads + _KEYS) * size + heads * (-(-most // _VECTOR) * _VECTOR)
