"""The gated activation a = silu(g) * u (Shazeer 2020, arXiv:2002.05202) and its gradient.

With s = silu(g): du = da * s and dg = da * u * silu'(g).
"""

import torch

from tunesmith.models.kernels.thin import drop, places
from tunesmith.native import compiled


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, dropped: torch.Tensor | None = None
) -> None:
    """silu(gate) * up into ``out``, contiguous; all of shape (rows, width), gate and up with the same strides.

    ``dropped``: ascending places of the flat ``out`` that become 0.
    """
    if native := compiled("training", "swiglu", "ppnpnnpn", gate):
        native(gate, up, gate.stride(0), out, *gate.shape, *places(dropped))
        return
    torch.ops.aten.silu.out(gate, out=out).mul_(up)
    drop(out, dropped)


def swiglu_backward(da: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dup: torch.Tensor) -> None:
    """Turn ``gate`` into its gradient and write that of ``up`` into ``dup``; ``da`` is used up. All are contiguous."""
    if native := compiled("training", "swiglu_backward", "ppppn", gate):
        native(da, gate, up, dup, gate.numel())
        return
    torch.ops.aten.silu.out(gate, out=dup).mul_(da)
    da.mul_(up)
    torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=gate)
