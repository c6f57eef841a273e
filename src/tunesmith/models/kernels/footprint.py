"""How much memory a micro-batch takes: the buffers taken from ``Scratch`` by the passes of ``decoder``, counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tunesmith.data.packing import Layout
from tunesmith.models.kernels.arrangement import query_blocks, row_batches
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.head import chunk_size
from tunesmith.models.kernels.layer import Layer, saves_probabilities
from tunesmith.models.kernels.linear import Linear, adapter_dropout
from tunesmith.models.kernels.segments import most_keys, prefix_sums, workspace
from tunesmith.models.kernels.wide import work_elements
from tunesmith.native import is_compiled

# What the compiled functions keep in registers.
_BY_TORCH_ONLY = ("normed", "norm product", "rotary", "seen")
# What only the backward pass and dropout take.
_BACKWARD = frozenset(
    (
        "dx", "dx of all", "dhidden", "dup", "dactive", "dattention", "dattention of all", "dqkv", "dgathered",
        "prefix sums", "seen", "normed", "norm product",
    )
)  # fmt: skip


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch without its tokens: ``trained`` of the flat list's tokens are predicted.

    ``is_trained``: False: only losses are taken of it.
    """

    layout: Layout
    trained: int
    is_trained: bool = True

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
    need("logits", chunk_size(kept) * len(decoder.head.weight))
    need(
        "product work", work_elements(chunk_size(kept), width, len(decoder.head.weight), _rank(decoder.head))
    )
    need("seen", chunk_size(kept) * width if adapter_dropout([decoder.head]) else 0)
    for number, layer in enumerate(decoder.layers):
        slot = number if decoder.saves_activations else 0
        if number < last:
            need(f"x {number + 1}", count * width)
        for name, size in _layer_buffers(layer, count, kept if number == last else count, slot).items():
            need(name, size)
        for name, size in _attention_buffers(layer, shape, slot).items():
            need(name, size)
    if is_compiled("training"):
        for name in _BY_TORCH_ONLY:
            found.pop(name, None)
    queries = len(decoder.layers[last].qkv[0].weight)
    need("attention", count * queries)
    need("dattention of all", count * queries)
    need("dx of all", count * width)
    return found


def evaluation_buffers(decoder: Decoder, shape: BatchShape) -> dict[str, int]:
    """Elements of each buffer that ``token_losses`` takes for a micro-batch of this shape: one layer's at a time."""
    last = len(decoder.layers) - 1
    found = training_buffers(replace(decoder, saves_activations=False), shape)
    states = {f"x {number}" for number in range(1, last + 1)}
    taken = {name: size for name, size in found.items() if name not in _BACKWARD | states}
    size = shape.tokens * decoder.embeddings.weight.shape[1]
    return taken | {f"x {number}": size for number in range(min(last, 2))}


def _layer_buffers(layer: Layer, count: int, kept: int, slot: int) -> dict[str, int]:
    width, queries = layer.qkv[0].weight.shape[1], len(layer.qkv[0].weight)
    qkv, inner = sum(len(part.weight) for part in layer.qkv), layer.down.weight.shape[1]
    most = max(count, kept) * width
    found = {
        f"qkv {slot}": count * qkv, f"attention {slot}": kept * queries, f"x2 {slot}": kept * width,
        f"gate {slot}": kept * inner, f"up {slot}": kept * inner, "hidden": most, "active": kept * inner,
        "dup": kept * inner, "dactive": kept * inner, "dhidden": most, "normed": most, "norm product": most,
        "dattention": kept * queries, "dqkv": count * qkv,
        "rotary": count * layer.shape.size * (layer.shape.heads + layer.shape.groups) // 2,
    }  # fmt: skip
    products = [(count, part) for part in layer.qkv]
    products += [(kept, part) for part in (layer.output, *layer.gate_up, layer.down)]
    forms = [(rows, *part.weight.shape, _rank(part)) for rows, part in products]
    # Forward, and backward to the input.
    found["product work"] = max(
        max(work_elements(rows, inner, outer, rank), work_elements(rows, outer, inner))
        for rows, outer, inner, rank in forms
    )
    inputs = ((layer.qkv, count), ([layer.output], kept), (layer.gate_up, kept), ([layer.down], kept))
    found["seen"] = max(
        rows * group[0].weight.shape[1] if adapter_dropout(group) else 0 for group, rows in inputs
    )
    return found


def _rank(linear: Linear) -> int:
    return len(linear.adapter.a) if linear.adapter else 0


def _attention_buffers(layer: Layer, shape: BatchShape, slot: int) -> dict[str, int]:
    form = layer.shape
    if is_compiled("training"):
        threads = torch.get_num_threads()
        return {
            "attention work": threads
            * workspace(most_keys(shape.layout), form, layer.down.weight.element_size()),
            "prefix sums": threads * prefix_sums(shape.layout.prefix, form),
        }
    queries, keys, largest, scores = 0, 0, 0, 0
    for batch in row_batches(shape.layout, form):
        rows, length = len(batch.spans), batch.longest
        queries += rows * length * form.heads
        keys += rows * (batch.prefix + length) * form.groups
        for begin, end in query_blocks(length):
            block = rows * form.heads * (end - begin) * (batch.prefix + end)
            largest, scores = max(largest, block), scores + block
    found = dict.fromkeys(("gathered", "dgathered"), (queries + 2 * keys) * form.size)
    saves = saves_probabilities(layer, scores, shape.tokens)
    probabilities = {f"probabilities {slot}": scores} if saves else {"probabilities": largest}
    return found | {"outputs": queries * form.size, "scores": largest} | probabilities


def largest_buffers(decoder: Decoder, shapes: Sequence[BatchShape]) -> dict[str, int]:
    """Elements of each buffer after micro-batches of all these shapes."""
    largest: dict[str, int] = {}
    for shape in shapes:
        counted = training_buffers if shape.is_trained else evaluation_buffers
        for name, size in counted(decoder, shape).items():
            largest[name] = max(largest.get(name, 0), size)
    return largest


def training_bytes(decoder: Decoder, shapes: Sequence[BatchShape]) -> int:
    """Bytes of all buffers after micro-batches of these shapes, and of what a micro-batch saves beside them."""
    trained = (shape for shape in shapes if shape.is_trained)
    beside = max(sum(_saved_beside(layer, shape.tokens) for layer in decoder.layers) for shape in trained)
    element: int = decoder.norm.weight.element_size()
    return sum(largest_buffers(decoder, shapes).values()) * element + beside


def _saved_beside(layer: Layer, tokens: int) -> int:
    """Dropped places (int64) as many as expected, and the adapters' low products, in bytes."""
    total = 0.0
    for group in (layer.qkv, [layer.output], layer.gate_up, [layer.down]):
        total += 8 * adapter_dropout(group) * tokens * group[0].weight.shape[1]
        ranks = sum(len(part.adapter.a) for part in group if part.adapter)
        total += group[0].weight.element_size() * ranks * tokens
    return int(total)
