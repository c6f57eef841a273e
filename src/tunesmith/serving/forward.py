"""One pass of a decoder of the Llama family over a flat list of tokens of many requests.

Linear layers, norms and activations see the list as it is; only attention knows whose tokens they are. There are two
ways to attend: stretches of prompts, one request after the other, and one token of every running request at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from tunesmith.data.packing import Layout
from tunesmith.models.kernels.arrangement import Shape
from tunesmith.models.kernels.layer import Norm
from tunesmith.models.kernels.norm import rms_norm
from tunesmith.models.kernels.rotary import rotate
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.segments import Segments, attend, segments
from tunesmith.models.kernels.swiglu import swiglu
from tunesmith.native import is_compiled
from tunesmith.serving.base_weights import BaseWeights, Group, LayerWeights
from tunesmith.serving.kv_cache import KvCache
from tunesmith.serving.mixed_lora import Plan


class Attention(Protocol):
    """Writes keys and values to the cache and attends."""

    def __call__(self, number: int, layer: LayerWeights, qkv: torch.Tensor, out: torch.Tensor) -> None:
        """``qkv`` (tokens, heads and twice groups times size), rotated; ``out`` (tokens, heads times size)."""
        ...


@dataclass(frozen=True)
class Wanted:
    """Rows whose hidden states are wanted, int64, and the plan for these alone."""

    rows: torch.Tensor
    plan: Plan


def forward(
    base: BaseWeights, tokens: Sequence[int], positions: torch.Tensor, attention: Attention, plan: Plan,
    scratch: Scratch, wanted: Wanted | None = None,
) -> torch.Tensor:  # fmt: skip
    """Hidden states after the last layer, (tokens, width), or (wanted rows, width); valid until the next pass.

    In the last layer nobody else needs what a row becomes once its keys and values are kept.
    """
    x = embed(base, tokens, plan, scratch)

    def take(name: str, width: int) -> torch.Tensor:
        return scratch.take(name, (len(x), width), base.embeddings)

    cos, sin = base.cos.index_select(0, positions), base.sin.index_select(0, positions)
    for number, layer in enumerate(base.layers):
        shape = layer.shape
        hidden = _norm(x, layer.attention_norm, take("hidden", x.shape[1]))
        qkv = _project(hidden, layer.qkv, plan, scratch)
        rotated = (shape.heads + shape.groups) * shape.size
        rotate(qkv[:, :rotated].view(len(x), -1, shape.size), cos, sin, scratch)
        attended = take("attended", layer.qkv.sizes[0])
        attention(number, layer, qkv, attended)
        if wanted is not None and number + 1 == len(base.layers):
            x, attended = x.index_select(0, wanted.rows), attended.index_select(0, wanted.rows)
            plan = wanted.plan
        _project_onto(attended, layer.output, plan, x, scratch)
        hidden = _norm(x, layer.mlp_norm, take("hidden", x.shape[1]))
        gate_up = _project(hidden, layer.gate_up, plan, scratch)
        gate, up = gate_up.split(layer.gate_up.sizes, 1)
        active = take("active", layer.gate_up.sizes[0])
        swiglu(gate, up, active)
        _project_onto(active, layer.down, plan, x, scratch)
    return x


def embed(base: BaseWeights, tokens: Sequence[int], plan: Plan, scratch: Scratch) -> torch.Tensor:
    """What enters the first layer, (tokens, width); valid until the next pass."""
    ids = torch.tensor(tokens)
    x = scratch.take("x", (len(tokens), base.embeddings.shape[1]), base.embeddings)
    torch.index_select(base.embeddings, 0, ids, out=x)
    plan.embed(ids, x)
    return x


def logits(base: BaseWeights, hidden: torch.Tensor, plan: Plan, scratch: Scratch) -> torch.Tensor:
    """Logits (rows, vocabulary) of hidden states; valid until the next pass."""
    normed = _norm(hidden, base.norm, scratch.take("normed rows", tuple(hidden.shape), hidden))
    return _project(normed, base.head, plan, scratch)


def _norm(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    rms_norm(x, norm.weight, norm.epsilon, out)
    return out


def _project(x: torch.Tensor, group: Group, plan: Plan, scratch: Scratch) -> torch.Tensor:
    """Valid until the next."""
    out = group.product(x, scratch)
    plan.add(group.number, x, out)
    return out


def _project_onto(x: torch.Tensor, group: Group, plan: Plan, out: torch.Tensor, scratch: Scratch) -> None:
    """Add the group's output to ``out``, the residual stream."""
    group.product.add_to(out, x, scratch)
    plan.add(group.number, x, out)


class Stretches:
    """Attention of stretches of prompts: (slot, first position, length) in the order of the tokens.

    Where all are beginnings, nothing but their own tokens is seen: then the compiled attention of training takes them
    by one call, where there is one.
    """

    def __init__(self, cache: KvCache, stretches: Sequence[tuple[int, int, int]], scratch: Scratch) -> None:
        self._cache, self._stretches, self._scratch = cache, stretches, scratch
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}  # for all layers
        self._segments: dict[Shape, Segments] = {}
        self._are_beginnings = is_compiled("training") and not any(start for _, start, _ in stretches)

    def __call__(self, number: int, layer: LayerWeights, qkv: torch.Tensor, out: torch.Tensor) -> None:
        width, row = layer.qkv.sizes[0], 0
        for slot, start, length in self._stretches:
            place = slot * self._cache.capacity + start
            self._cache.layers[number][place : place + length] = qkv[row : row + length, width:]
            row += length
        if self._are_beginnings:
            self._attend_beginnings(layer.shape, qkv, out)
        else:
            self._attend_each(number, layer, qkv, out)

    def _attend_beginnings(self, shape: Shape, qkv: torch.Tensor, out: torch.Tensor) -> None:
        if shape not in self._segments:
            lengths = tuple(length for _, _, length in self._stretches)
            self._segments[shape] = segments(Layout(0, lengths), shape)
        attend(qkv, self._segments[shape], shape, out, self._scratch)

    def _attend_each(self, number: int, layer: LayerWeights, qkv: torch.Tensor, out: torch.Tensor) -> None:
        shape, width, row = layer.shape, layer.qkv.sizes[0], 0
        for slot, start, length in self._stretches:
            rows = slice(row, row + length)
            keys, values = self._cache.view(number, slot, 1, start + length)
            query = qkv[rows, :width].view(1, length, shape.heads, shape.size).transpose(1, 2)
            is_plain = start == 0 and shape.window is None
            attended = F.scaled_dot_product_attention(
                query, keys, values, scale=shape.scale, enable_gqa=shape.heads != shape.groups,
                is_causal=is_plain, attn_mask=None if is_plain else self._mask(start, length, shape.window),
            )  # fmt: skip
            out[rows].view(1, length, shape.heads, shape.size).copy_(attended.transpose(1, 2))
            row += length

    def _mask(self, start: int, length: int, window: int | None) -> torch.Tensor:
        """Bool (length, start + length): what each query sees."""
        key = (start, length, window)
        if key not in self._masks:
            distance = torch.arange(start, start + length)[:, None] - torch.arange(start + length)[None]
            self._masks[key] = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return self._masks[key]


class NextTokens:
    """Attention of one token each of many requests, all heads and rows in one call on padded keys and values.

    The heads that share keys and values go as the rows of one query, so that these are read once. Slots between the
    first and the last in use take part and are left out of the result.
    """

    def __init__(
        self, cache: KvCache, slots: Sequence[int], positions: torch.Tensor, windows: set[int | None]
    ) -> None:
        self._cache = cache
        chosen = torch.tensor(slots)
        self._first = int(chosen.min())
        self._count, self._tokens = int(chosen.max()) + 1 - self._first, int(positions.max()) + 1
        self._places = chosen * cache.capacity + positions
        self._rows = chosen - self._first
        self._is_whole = self._rows.tolist() == list(range(self._count))
        lengths = torch.ones(self._count, dtype=torch.int64).index_copy_(0, self._rows, positions + 1)
        self._masks = {window: self._mask(lengths[:, None], window) for window in windows}

    def _mask(self, lengths: torch.Tensor, window: int | None) -> torch.Tensor:
        """Float (slots, 1, 1, tokens): 0 where a slot's token is seen, else -inf."""
        place = torch.arange(self._tokens)[None]
        seen = place < lengths
        if window is not None:
            seen &= place >= lengths - window
        return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None]

    def __call__(self, number: int, layer: LayerWeights, qkv: torch.Tensor, out: torch.Tensor) -> None:
        shape, width = layer.shape, layer.qkv.sizes[0]
        self._cache.layers[number].index_copy_(0, self._places, qkv[:, width:])
        query = qkv[:, :width]
        if not self._is_whole:
            query = query.new_zeros(self._count, width).index_copy_(0, self._rows, query)
        keys, values = self._cache.view(number, self._first, self._count, self._tokens)
        attended = F.scaled_dot_product_attention(
            query.view(self._count, shape.groups, -1, shape.size), keys, values,
            attn_mask=self._masks[shape.window], scale=shape.scale,
        ).reshape(self._count, width)  # fmt: skip
        if self._is_whole:
            out.copy_(attended)
        else:
            torch.index_select(attended, 0, self._rows, out=out)
