"""How much memory a micro-batch takes: the buffers taken from ``Scratch`` by the passes of ``decoder``, counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.data.packing import Layout
from tunesmith.models.kernels import head as head_kernel
from tunesmith.models.kernels.attention import RowGroup, query_blocks, row_groups
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.layer import Layer
from tunesmith.models.kernels.linear import adapter_dropout


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch without its tokens: ``trained`` of the flat list's tokens are predicted."""

    layout: Layout
    trained: int

    @property
    def tokens(self) -> int:
        return self.layout.prefix + sum(self.layout.suffixes)


def training_buffers(decoder: Decoder, shape: BatchShape) -> dict[str, int]:
    """Elements of each buffer that ``loss_and_gradients`` takes for a micro-batch of this shape."""
    count, kept, last = shape.tokens, shape.trained, len(decoder.layers) - 1
    found: dict[str, int] = {}

    def need(name: str, size: int) -> None:
        found[name] = max(found.get(name, 0), size)

    width = decoder.embeddings.weight.shape[1]
    for name, rows in (("x in", count), ("x kept", kept), ("final", kept), ("dx", kept), ("dhidden", kept)):
        need(name, rows * width)
    need("normed", kept * width)
    need("logits", min(kept, head_kernel.CHUNK) * len(decoder.head.weight))
    if adapter_dropout([decoder.head]):
        need("seen", min(kept, head_kernel.CHUNK) * width)
    groups = row_groups(shape.layout, torch.device("cpu"))
    for number, layer in enumerate(decoder.layers):
        slot = number if decoder.saves_activations else 0
        if number < last:
            need(f"x {number + 1}", count * width)
        for name, size in _layer_buffers(layer, count, kept if number == last else count, slot).items():
            need(name, size)
        for name, size in _attention_buffers(layer, groups, shape.layout.prefix).items():
            need(name, size)
    queries = len(decoder.layers[last].qkv[0].weight)
    need("attention", count * queries)
    need("dattention of all", count * queries)
    need("dx of all", count * width)
    return found


def _layer_buffers(layer: Layer, count: int, kept: int, slot: int) -> dict[str, int]:
    width, queries = layer.qkv[0].weight.shape[1], len(layer.qkv[0].weight)
    qkv, inner = sum(len(part.weight) for part in layer.qkv), layer.down.weight.shape[1]
    found = {
        f"qkv {slot}": count * qkv, f"attention {slot}": kept * queries, f"x2 {slot}": kept * width,
        f"gate {slot}": kept * inner, f"up {slot}": kept * inner, "hidden": max(count, kept) * width,
        "active": kept * inner, "dactive": kept * inner, "dhidden": max(count, kept) * width,
        "normed": max(count, kept) * width, "dattention": kept * queries, "dqkv": count * qkv,
        "rotary": count * queries // 2,
    }  # fmt: skip
    seen = (
        (layer.qkv, count * width), ([layer.output], kept * queries), (layer.gate_up, kept * width),
        ([layer.down], kept * inner),
    )  # fmt: skip
    dropping = [size for group, size in seen if adapter_dropout(group)]
    return found | ({"seen": max(dropping)} if dropping else {})


def _attention_buffers(layer: Layer, groups: Sequence[RowGroup], prefix: int) -> dict[str, int]:
    form = layer.shape
    found = dict.fromkeys(("dk prefix", "dv prefix"), form.groups * prefix * form.size)
    for group in groups:
        own = group.rows * group.length
        keys = group.rows * form.groups * (group.prefix + group.length) * form.size
        scores = max(
            group.rows * form.heads * (end - begin) * (group.prefix + end)
            for begin, end in query_blocks(group.length)
        )
        sizes = dict.fromkeys(("keys", "values", "dkeys", "dvalues"), keys)
        sizes |= dict.fromkeys(("queries", "outputs", "douts", "dqueries"), own * form.heads * form.size)
        sizes |= {"own": own * form.groups * form.size, "scores": scores, "probabilities": scores}
        for name, size in sizes.items():
            found[name] = max(found.get(name, 0), size)
    return found


def training_bytes(decoder: Decoder, shapes: Sequence[BatchShape]) -> int:
    """Bytes of all buffers after micro-batches of these shapes, and of what a micro-batch saves beside them."""
    largest: dict[str, int] = {}
    beside = 0
    for shape in shapes:
        for name, size in training_buffers(decoder, shape).items():
            largest[name] = max(largest.get(name, 0), size)
        beside = max(beside, sum(_saved_beside(layer, shape.tokens) for layer in decoder.layers))
    element: int = decoder.norm.weight.element_size()
    return sum(largest.values()) * element + beside


def _saved_beside(layer: Layer, tokens: int) -> int:
    """Dropped places (int64) as many as expected, and the adapters' low products, in bytes."""
    total = 0.0
    for group in (layer.qkv, [layer.output], layer.gate_up, [layer.down]):
        total += 8 * adapter_dropout(group) * tokens * group[0].weight.shape[1]
        ranks = sum(len(part.adapter.a) for part in group if part.adapter)
        total += group[0].weight.element_size() * ranks * tokens
    return int(total)
