"""Linear layers that read the same input, with LoRA, as products on flat lists of tokens.

y_i = x W_i' + c_i (m * x) A_i' B_i' for each layer i of a group (Hu et al. 2021, arXiv:2106.09685), m a dropout mask
and c_i = alpha / (r (1 - p)). Layers of a group share the product with their stacked A, and so one mask m, where PEFT
draws one for each: every layer sees the same distribution. Gradients, with dz_i = c_i dy_i B_i:

dx = sum dy_i W_i + m * (dz A),  dA = dz' (m * x),  dB_i = c_i dy_i' z_i,  dW_i = dy_i' x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.models.kernels.norm import add_gradient
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.thin import expand, outer, shrink
from tunesmith.models.kernels.wide import LowRank, product


@dataclass(frozen=True)
class Adapter:
    """``a`` (r, in), ``b`` (out, r); ``scale`` alpha / r; ``dropout`` the probability to fall."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: float


@dataclass(frozen=True)
class Linear:
    """``weight`` (out, in), ``bias`` (out,)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True)
class AdapterState:
    """What the backward pass needs: ``dropped`` places of the flat input; ``z`` (tokens, sum of r)."""

    dropped: torch.Tensor | None
    z: torch.Tensor | None


def adapter_dropout(group: Sequence[Linear]) -> float:
    """The dropout probability of the group's adapters; 0 without any."""
    return max((layer.adapter.dropout for layer in group if layer.adapter), default=0.0)


def project(
    x: torch.Tensor, group: Sequence[Linear], outs: Sequence[torch.Tensor], dropped: torch.Tensor | None,
    scratch: Scratch, *, add: bool = False,
) -> AdapterState:  # fmt: skip
    """Write each layer's output into its ``out``, or add it to what is there.

    Args:
        x: shape (tokens, in), contiguous.
        outs: one a layer, shape (tokens, out), rows contiguous in themselves.
        dropped: places of the flat ``x`` that the adapters do not see, from ``draw_dropped``. None: no dropout.
        add: add to ``outs``, as for a residual.
    """
    adapters = [layer.adapter for layer in group if layer.adapter]
    z = None
    if adapters:
        stacked = _stack(adapters)
        z = x.new_empty(len(x), len(stacked))
        shrink(x, stacked, z, scratch=scratch, dropped=dropped)
    parts = iter(() if z is None else _parts(z, adapters))
    for layer, out in zip(group, outs, strict=True):
        adapter = layer.adapter
        low = LowRank(next(parts), _turned(adapter.b), _factor(adapter, dropped)) if adapter else None
        product(x, layer.weight.detach().t(), out, scratch, add=add, low=low)
        if layer.bias is not None:
            out.add_(layer.bias.detach())
    return AdapterState(dropped, z)


def project_backward(
    dys: Sequence[torch.Tensor], x: torch.Tensor, group: Sequence[Linear], state: AdapterState, scratch: Scratch,
    dx: torch.Tensor | None, *, scale: float = 1.0,
) -> None:  # fmt: skip
    """Write the gradient of ``x`` into ``dx`` (None: not wanted) and add to ``.grad`` of what is trained.

    ``scale`` multiplies the outputs' gradients ``dys``, which are left as they are. ``x`` is what the adapters saw: 0
    where it was dropped, so that weights of a group with dropout must be constant.
    """
    for layer, dy in zip(group, dys, strict=True):
        if layer.weight.requires_grad:
            add_product(layer.weight, dy.t(), x, scale, scratch)
        if layer.bias is not None and layer.bias.requires_grad:
            add_gradient(layer.bias, dy.sum(0).mul_(scale))
    begun = _adapters_backward(dys, x, group, state, scratch, dx, scale)
    if dx is None:
        return
    for layer, dy in zip(group, dys, strict=True):
        product(dy, layer.weight.detach(), dx, scratch, add=begun, scale=scale)
        begun = True


def _adapters_backward(
    dys: Sequence[torch.Tensor], x: torch.Tensor, group: Sequence[Linear], state: AdapterState, scratch: Scratch,
    dx: torch.Tensor | None, scale: float,
) -> bool:  # fmt: skip
    """The adapters' part of ``project_backward``; whether it has written to ``dx``, to which the rest is added."""
    adapted = [(layer.adapter, dy) for layer, dy in zip(group, dys, strict=True) if layer.adapter]
    if state.z is None or not adapted:
        return False
    dz = torch.empty_like(state.z)
    adapters = [adapter for adapter, _ in adapted]
    for (adapter, dy), z, out in zip(adapted, _parts(state.z, adapters), _parts(dz, adapters), strict=True):
        factor = scale * _factor(adapter, state.dropped)
        shrink(dy, _turned(adapter.b), out, factor, scratch=scratch)
        if adapter.b.requires_grad:
            add_gradient(adapter.b, outer(z, dy).mul_(factor).t())
    if adapters[0].a.requires_grad:
        gradient = outer(dz, x)
        for adapter, rows in zip(adapters, gradient.split([len(a.a) for a in adapters]), strict=True):
            add_gradient(adapter.a, rows)
    if dx is None:
        return False
    # Before the other products: the mask must not touch theirs.
    expand(dz, _stack(adapters), dx, add=False, dropped=state.dropped)
    return True


def add_product(
    parameter: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, scratch: Scratch
) -> None:
    """Add alpha a b to ``parameter.grad`` without a copy of its own."""
    if parameter.grad is None:
        parameter.grad = scratch.gradient(parameter)
        parameter.grad.addmm_(a, b, beta=0, alpha=alpha)
    else:
        parameter.grad.addmm_(a, b, alpha=alpha)


def _factor(adapter: Adapter, dropped: torch.Tensor | None) -> float:
    if dropped is None:
        return adapter.scale
    return adapter.scale / (1 - adapter.dropout) if adapter.dropout < 1 else 0.0


def _stack(adapters: Sequence[Adapter]) -> torch.Tensor:
    return torch.cat([adapter.a.detach() for adapter in adapters])


def _turned(b: torch.Tensor) -> torch.Tensor:
    """``b`` (out, r) as (r, out): thin products are fast in this layout."""
    return b.detach().t().contiguous()


def _parts(z: torch.Tensor, adapters: Sequence[Adapter]) -> Sequence[torch.Tensor]:
    parts: tuple[torch.Tensor, ...] = z.split([len(adapter.a) for adapter in adapters], dim=1)
    return parts
