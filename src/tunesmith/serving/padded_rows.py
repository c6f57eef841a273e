"""Keys and values of several requests as rows of one cache of transformers, padded on the left.

Attention masks what is padding. A step copies the whole cache in any case (``DynamicCache`` grows by concatenation),
so that a row that comes or goes costs about a step's copying once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Rows:
    """``cache``: transformers' own, as wide as the longest row; ``lengths``: tokens of each row in it."""

    cache: Any
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        return max(self.lengths)


def kept(rows: Rows, places: Sequence[int]) -> Rows:
    """The rows at ``places``, in this order, without padding that none of them needs."""
    if list(places) == list(range(len(rows.lengths))):
        return rows
    chosen = torch.tensor(places)
    lengths = tuple(rows.lengths[place] for place in places)
    width = max(lengths)
    return Rows(
        _cache([tuple(part[chosen][:, :, -width:] for part in pair) for pair in _pairs(rows)]), lengths
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """All rows as one batch."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.width for part in parts)
    padded = [
        [tuple(F.pad(tensor, (0, 0, width - part.width, 0)) for tensor in pair) for pair in _pairs(part)]
        for part in parts
    ]
    layers = [
        tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        for pairs in zip(*padded, strict=True)
    ]
    return Rows(_cache(layers), tuple(length for part in parts for length in part.lengths))


def _pairs(rows: Rows) -> list[tuple[torch.Tensor, ...]]:
    """Keys and values of each layer, (rows, heads, tokens, size)."""
    return [(layer.keys, layer.values) for layer in rows.cache.layers]


def _cache(layers: Sequence[tuple[torch.Tensor, ...]]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache
