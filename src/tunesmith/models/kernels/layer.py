"""One decoder layer of the Llama family, forward and backward by hand.

x -> x + o(attention(rotate(q, k), v)), with q, k, v = projections of norm(x)
  -> y = x2 + down(silu(gate) * up), with gate, up = projections of norm(x2)

Saved for the backward pass, in floats a token: x, x2 (width each), q, k, v, attention, gate and up, and the
probabilities of attention where rows are short. All else is computed again from these by cheap passes over memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tunesmith.models.kernels.arrangement import Arrangement, Shape
from tunesmith.models.kernels.attention import attend_rows, attend_rows_backward
from tunesmith.models.kernels.dropout import draw_dropped
from tunesmith.models.kernels.linear import AdapterState, Linear, adapter_dropout, project, project_backward
from tunesmith.models.kernels.norm import normed, rms_norm, rms_norm_backward
from tunesmith.models.kernels.rotary import rotate, rotate_backward
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.segments import Segments, attend, attend_backward
from tunesmith.models.kernels.swiglu import swiglu, swiglu_backward
from tunesmith.models.kernels.thin import drop


@dataclass(frozen=True)
class Norm:
    """``weight`` (width,)."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """Weights of a layer, in the order of their use."""

    attention_norm: Norm
    qkv: tuple[Linear, Linear, Linear]
    shape: Shape
    output: Linear
    mlp_norm: Norm
    gate_up: tuple[Linear, Linear]
    down: Linear


@dataclass(frozen=True)
class Dropped:
    """Places that fall from the inputs of a layer's adapters; None: no dropout."""

    qkv: torch.Tensor | None = None
    output: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """What a layer must know of the flat list: its rows, for each shape of attention, and cos and sin of positions,
    (tokens, 1, head size)."""

    rows: Mapping[Shape, Segments | Arrangement]
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Saved:
    """What the backward pass of a layer reads: see the module."""

    x: torch.Tensor
    kept: torch.Tensor | None
    inverse: torch.Tensor
    qkv: torch.Tensor
    qkv_adapter: AdapterState
    probabilities: torch.Tensor | None
    attention: torch.Tensor
    output_adapter: AdapterState
    x2: torch.Tensor
    inverse2: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    gate_up_adapter: AdapterState
    down_adapter: AdapterState


def saves_probabilities(layer: Layer, scores: int, tokens: int) -> bool:
    """Whether they are no larger than gate and up: what is saved of a token does not grow with the length of rows."""
    return scores <= 2 * tokens * int(layer.down.weight.shape[1])


def draw_layer(layer: Layer, tokens: int, kept: int) -> Dropped:
    """Draw what falls from the adapters' inputs; ``kept`` tokens leave the attention."""

    def draw(group: Sequence[Linear], rows: int) -> torch.Tensor | None:
        rate = adapter_dropout(group)
        return draw_dropped(rows * group[0].weight.shape[1], rate) if rate else None

    return Dropped(
        draw(layer.qkv, tokens),
        draw([layer.output], kept),
        draw(layer.gate_up, kept),
        draw([layer.down], kept),
    )


def layer_forward(
    x: torch.Tensor, y: torch.Tensor, layer: Layer, tokens: Tokens, kept: torch.Tensor | None, dropped: Dropped,
    slot: int, scratch: Scratch,
) -> Saved:  # fmt: skip
    """Write the layer's output for ``x``, shape (tokens, width), into ``y``.

    Args:
        kept: places whose output is wanted, for the last layer: attention needs the keys of all tokens, the rest of
            the layer only these. None: all.
        slot: whose buffers in ``scratch`` hold what is saved: a layer's own, until its backward pass.
    """
    count, width = x.shape
    hidden = scratch.take("hidden", (count, width), x)
    inverse = rms_norm(x, layer.attention_norm.weight.detach(), layer.attention_norm.epsilon, hidden)
    sizes = [len(part.weight) for part in layer.qkv]
    qkv = scratch.take(f"qkv {slot}", (count, sum(sizes)), x)
    qkv_adapter = project(hidden, layer.qkv, qkv.split(sizes, 1), dropped.qkv, scratch)
    rotate(_rotated(qkv, layer.shape), tokens.cos, tokens.sin, scratch)
    attention = scratch.take("attention" if kept is not None else f"attention {slot}", (count, sizes[0]), x)
    probabilities = _attend(qkv, tokens.rows[layer.shape], layer, attention, slot, scratch)
    x2 = scratch.take(f"x2 {slot}", (len(y), width), x)
    if kept is None:
        x2.copy_(x)
    else:
        torch.index_select(x, 0, kept, out=x2)
        shape = (len(kept), attention.shape[1])
        attention = torch.index_select(attention, 0, kept, out=scratch.take(f"attention {slot}", shape, x))
    output_adapter = project(attention, [layer.output], [x2], dropped.output, scratch, add=True)
    hidden = scratch.take("hidden", tuple(x2.shape), x)
    inverse2 = rms_norm(x2, layer.mlp_norm.weight.detach(), layer.mlp_norm.epsilon, hidden)
    gate, up = (
        scratch.take(f"{name} {slot}", (len(x2), len(part.weight)), x)
        for name, part in zip(("gate", "up"), layer.gate_up, strict=True)
    )
    gate_up_adapter = project(hidden, layer.gate_up, (gate, up), dropped.gate_up, scratch)
    active = scratch.take("active", tuple(gate.shape), x)
    swiglu(gate, up, active)
    y.copy_(x2)
    down_adapter = project(active, [layer.down], [y], dropped.down, scratch, add=True)
    return Saved(
        x, kept, inverse, qkv, qkv_adapter, probabilities, attention, output_adapter, x2, inverse2, gate, up,
        gate_up_adapter, down_adapter,
    )  # fmt: skip


def layer_backward(
    dy: torch.Tensor, saved: Saved, layer: Layer, tokens: Tokens, scratch: Scratch, *, input_gradient: bool
) -> torch.Tensor | None:
    """The gradient of the layer's input, from that of its output; gradients of what is trained go to ``.grad``.

    ``dy`` and the saved gate and attention are used up. The result stands in ``dy``'s memory, but for a last layer with
    ``kept``, where it has a buffer of its own. ``input_gradient``: whether anything before the layer is trained.
    """
    x2, gate, up = saved.x2, saved.gate, saved.up
    active, dup, dactive = (
        scratch.take(name, tuple(gate.shape), dy) for name in ("active", "dup", "dactive")
    )
    swiglu(gate, up, active, saved.down_adapter.dropped)
    project_backward([dy], active, [layer.down], saved.down_adapter, scratch, dactive)
    swiglu_backward(dactive, gate, up, dup)
    dhidden = scratch.take("dhidden", tuple(x2.shape), dy)
    project_backward(
        (gate, dup), _normed(x2, saved.inverse2, layer.mlp_norm, saved.gate_up_adapter, scratch), layer.gate_up,
        saved.gate_up_adapter, scratch, dhidden,
    )  # fmt: skip
    rms_norm_backward(dhidden, x2, saved.inverse2, layer.mlp_norm.weight, dy, scratch)
    dattention = scratch.take("dattention", tuple(saved.attention.shape), dy)
    drop(saved.attention, saved.output_adapter.dropped)
    project_backward([dy], saved.attention, [layer.output], saved.output_adapter, scratch, dattention)
    count, sizes = len(saved.x), [len(part.weight) for part in layer.qkv]
    if saved.kept is not None:
        dattention = _spread(dattention, saved.kept, count, "dattention of all", scratch)
        dy = _spread(dy, saved.kept, count, "dx of all", scratch)
    dqkv = scratch.take("dqkv", tuple(saved.qkv.shape), dy)
    rows = tokens.rows[layer.shape]
    if isinstance(rows, Segments):
        attend_backward(dattention, saved.qkv, rows, layer.shape, dqkv, scratch)
    else:
        attend_rows_backward(dattention, saved.qkv, rows, layer.shape, dqkv, saved.probabilities, scratch)
    rotate_backward(_rotated(dqkv, layer.shape), tokens.cos, tokens.sin, scratch)
    norm_trained = layer.attention_norm.weight.requires_grad
    dhidden = scratch.take("dhidden", tuple(saved.x.shape), dy) if input_gradient or norm_trained else None
    project_backward(
        dqkv.split(sizes, 1), _normed(saved.x, saved.inverse, layer.attention_norm, saved.qkv_adapter, scratch),
        layer.qkv, saved.qkv_adapter, scratch, dhidden,
    )  # fmt: skip
    if dhidden is None:
        return None
    rms_norm_backward(dhidden, saved.x, saved.inverse, layer.attention_norm.weight, dy, scratch)
    return dy


def _attend(
    qkv: torch.Tensor,
    rows: Segments | Arrangement,
    layer: Layer,
    out: torch.Tensor,
    slot: int,
    scratch: Scratch,
) -> torch.Tensor | None:
    """Attention into ``out``; the probabilities where they are saved."""
    if isinstance(rows, Segments):
        attend(qkv, rows, layer.shape, out, scratch)
        return None
    probabilities = None
    if saves_probabilities(layer, rows.scores, len(qkv)):
        probabilities = scratch.take(f"probabilities {slot}", (rows.scores,), qkv)
    attend_rows(qkv, rows, layer.shape, out, probabilities, scratch)
    return probabilities


def _rotated(qkv: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A view of the queries and keys, shape (tokens, heads + groups, size)."""
    return qkv.view(-1, shape.vectors, shape.size)[:, : shape.heads + shape.groups]


def _normed(
    x: torch.Tensor, inverse: torch.Tensor, norm: Norm, adapter: AdapterState, scratch: Scratch
) -> torch.Tensor:
    """The normed rows as the adapters saw them."""
    return normed(
        x, inverse, norm.weight.detach(), scratch.take("hidden", tuple(x.shape), x), adapter.dropped
    )


def _spread(
    rows: torch.Tensor, places: torch.Tensor, count: int, name: str, scratch: Scratch
) -> torch.Tensor:
    """Rows put back to their places among ``count``, the others 0; a place named twice gets the sum."""
    out = scratch.take(name, (count, rows.shape[1]), rows).zero_()
    return out.index_add_(0, places, rows)
