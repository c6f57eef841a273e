"""A decoder of the Llama family as data, and its losses and gradients on packed rows, by hand.

The weights stay where they are, in the modules of transformers and PEFT: what is here reads them at each call, so
whatever trains, restores, merges or switches off an adapter there holds here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tunesmith.data.packing import PackedBatch
from tunesmith.models.kernels.arrangement import Arrangement, Shape, arrange
from tunesmith.models.kernels.head import head_losses
from tunesmith.models.kernels.layer import (
    Dropped,
    Layer,
    Norm,
    Saved,
    Tokens,
    draw_layer,
    layer_backward,
    layer_forward,
)
from tunesmith.models.kernels.linear import Linear
from tunesmith.models.kernels.norm import add_gradient, rms_norm, rms_norm_backward
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.segments import Segments, segments
from tunesmith.native import compiled

Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Decoder:
    """Embeddings, layers, norm and head; ``rotary`` gives cos and sin of positions.

    ``embeddings`` holds ``weight`` (vocabulary, width), and as adapter ``a`` (r, vocabulary), ``b`` (width, r).
    ``untrained_token``: torch's ``padding_idx``: as an input, this token gives its embedding no gradient.
    ``saves_activations``: False computes each layer again in the backward pass (Chen et al. 2016, arXiv:1604.06174).
    """

    embeddings: Linear
    untrained_token: int | None
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    rotary: Rotary
    saves_activations: bool


def token_losses(
    decoder: Decoder, batch: PackedBatch, scratch: Scratch, check: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """-log p of every trained token, shape (trained tokens,), as the model in evaluation mode gives them.

    ``check`` is called before each layer; what it raises ends the pass.
    """
    tokens = _tokens(decoder, batch)
    x = _embed(decoder, batch, scratch)
    for number, layer in enumerate(decoder.layers):
        check()
        kept = batch.sources if layer is decoder.layers[-1] else None
        y = _state(number + 1, number % 2, kept, x, scratch)
        layer_forward(x, y, layer, tokens, kept, Dropped(), 0, scratch)
        x = y
    hidden = scratch.take("final", tuple(x.shape), x)
    rms_norm(x, decoder.norm.weight.detach(), decoder.norm.epsilon, hidden)
    return head_losses(hidden, batch.targets, decoder.head, scratch, gradient_scale=None)[0]


def loss_and_gradients(
    decoder: Decoder, batch: PackedBatch, scale: float, scratch: Scratch, check: Callable[[], None] = lambda: None
) -> torch.Tensor:  # fmt: skip
    """Token losses in training mode, and the gradients of ``scale`` times their sum added to ``.grad``.

    ``check`` is called before each layer in either direction; what it raises leaves gradients half made.
    """
    with torch.no_grad():
        tokens = _tokens(decoder, batch)
        x = _embed(decoder, batch, scratch)
        saved: list[Callable[[], Saved]] = []
        for number, layer in enumerate(decoder.layers):
            check()
            kept = batch.sources if layer is decoder.layers[-1] else None
            y = _state(number + 1, number + 1, kept, x, scratch)
            forward = _forward(x, y, layer, tokens, kept, number if decoder.saves_activations else 0, scratch)
            state = forward()
            saved.append(_constant(state) if decoder.saves_activations else forward)
            x = y
        hidden = scratch.take("final", tuple(x.shape), x)
        inverse = rms_norm(x, decoder.norm.weight.detach(), decoder.norm.epsilon, hidden)
        losses, dhidden = head_losses(hidden, batch.targets, decoder.head, scratch, gradient_scale=scale)
        dx: torch.Tensor | None = scratch.take("dx", tuple(x.shape), x).zero_()
        assert dhidden is not None
        assert dx is not None
        rms_norm_backward(dhidden, x, inverse, decoder.norm.weight, dx, scratch)
        first = _first_trained(decoder)
        for number in reversed(range(first, len(decoder.layers))):
            check()
            assert dx is not None
            dx = layer_backward(
                dx, saved.pop()(), decoder.layers[number], tokens, scratch,
                input_gradient=number > first or _is_trained(decoder.embeddings),
            )  # fmt: skip
        if dx is not None and first == 0:
            _embed_backward(decoder, batch, dx, scratch)
    return losses


def _forward(
    x: torch.Tensor, y: torch.Tensor, layer: Layer, tokens: Tokens, kept: torch.Tensor | None, slot: int,
    scratch: Scratch,
) -> Callable[[], Saved]:  # fmt: skip
    dropped = draw_layer(layer, len(x), len(y))
    return lambda: layer_forward(x, y, layer, tokens, kept, dropped, slot, scratch)


def _constant(state: Saved) -> Callable[[], Saved]:
    return lambda: state


def _state(
    number: int, slot: int, kept: torch.Tensor | None, x: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    count = len(x) if kept is None else len(kept)
    return scratch.take(f"x {slot}" if kept is None else "x kept", (count, x.shape[1]), x)


def _tokens(decoder: Decoder, batch: PackedBatch) -> Tokens:
    cos, sin = decoder.rotary(decoder.norm.weight, batch.position_ids[None])
    shapes = {layer.shape for layer in decoder.layers}
    if compiled("training", "attend", "ppppppnnnnnnxpn", decoder.norm.weight):
        rows: Mapping[Shape, Segments | Arrangement] = {
            shape: segments(batch.layout, shape) for shape in shapes
        }
    else:
        rows = {shape: arrange(batch.layout, shape, batch.input_ids.device) for shape in shapes}
    return Tokens(rows, cos[0][:, None], sin[0][:, None])


def _embed(decoder: Decoder, batch: PackedBatch, scratch: Scratch) -> torch.Tensor:
    weight, adapter = decoder.embeddings.weight.detach(), decoder.embeddings.adapter
    out = scratch.take("x in", (len(batch.input_ids), weight.shape[1]), weight)
    torch.index_select(weight, 0, batch.input_ids, out=out)
    if adapter is not None:
        a = adapter.a.detach().index_select(1, batch.input_ids)
        out.addmm_(a.t(), adapter.b.detach().t(), alpha=adapter.scale)
    return out


def _embed_backward(decoder: Decoder, batch: PackedBatch, dx: torch.Tensor, scratch: Scratch) -> None:
    weight, adapter = decoder.embeddings.weight, decoder.embeddings.adapter
    whole = dx
    if decoder.untrained_token is not None:
        whole = dx.clone() if adapter is not None else dx
        dx[batch.input_ids == decoder.untrained_token] = 0
    if weight.requires_grad:
        if weight.grad is None:
            weight.grad = scratch.gradient(weight).zero_()
        weight.grad.index_add_(0, batch.input_ids, dx)
    if adapter is not None and adapter.a.requires_grad:
        a = adapter.a.detach().index_select(1, batch.input_ids)
        add_gradient(adapter.b, torch.mm(a, whole).mul_(adapter.scale).t())
        da = torch.mm(dx, adapter.b.detach()).mul_(adapter.scale)
        if adapter.a.grad is None:
            adapter.a.grad = scratch.gradient(adapter.a).zero_()
        adapter.a.grad.index_add_(1, batch.input_ids, da.t().contiguous())


def _first_trained(decoder: Decoder) -> int:
    """The first layer whose backward pass reaches something that is trained."""
    if _is_trained(decoder.embeddings):
        return 0
    for number, layer in enumerate(decoder.layers):
        linears = (*layer.qkv, layer.output, *layer.gate_up, layer.down)
        norms = (layer.attention_norm, layer.mlp_norm)
        if any(map(_is_trained, linears)) or any(norm.weight.requires_grad for norm in norms):
            return number
    return len(decoder.layers)


def _is_trained(linear: Linear) -> bool:
    tensors = [linear.weight, linear.bias]
    if linear.adapter is not None:
        tensors += [linear.adapter.a, linear.adapter.b]
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
