"""The gated activation a = silu(g) * u (Shazeer 2020, arXiv:2002.05202) and its gradient.

With s = silu(g): du = da * s and dg = da * u * silu'(g).
"""

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor, switched: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """silu(gate) into ``switched`` and silu(gate) * up into ``out``, which may be one; all of one shape."""
    torch.ops.aten.silu.out(gate, out=switched)
    return torch.mul(switched, up, out=out)


def swiglu_backward(da: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, switched: torch.Tensor) -> None:
    """Turn ``gate`` into its gradient and ``switched``, silu(gate), into that of ``up``; ``da`` is used up."""
    switched.mul_(da)
    da.mul_(up)
    torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=gate)
