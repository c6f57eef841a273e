"""The gated activation a = silu(g) * u (Shazeer 2020, arXiv:2002.05202) and its gradient.

With s = silu(g): du = da * s and dg = da * u * silu'(g).
"""

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up into ``out``; all of one shape."""
    torch.ops.aten.silu.out(gate, out=out)
    return out.mul_(up)


def swiglu_backward(da: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scratch: torch.Tensor) -> None:
    """Turn ``gate`` and ``up`` into their gradients, in place; ``da`` is used up."""
    torch.ops.aten.silu.out(gate, out=scratch)
    scratch.mul_(da)  # du
    da.mul_(up)
    torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=gate)
    up.copy_(scratch)
