"""Products with a thin side, the rank of an adapter: shrink x A', expand z B, and the gradient z' x.

They are bound by memory, not by arithmetic. A library for matrix products packs its operands first, which costs more
than the product; the compiled ones read each operand once. Dropout of an operand costs no pass of its own there.
"""

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.native import compiled


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    out: torch.Tensor,
    factor: float = 1.0,
    *,
    scratch: Scratch,
    dropped: torch.Tensor | None = None,
) -> None:
    """factor x a' into ``out``.

    Args:
        x: (rows, width); a: (rank, width), contiguous; out: (rows, rank). Rows of ``x`` and ``out`` are contiguous in
            themselves.
        dropped: ascending places of the flat ``x``, then contiguous, that count as 0.
    """
    if native := compiled("training", "shrink", "pnppnnnnxpn", x):
        native(x, x.stride(0), a, out, out.stride(0), *x.shape, len(a), factor, *places(dropped))
        return
    if dropped is not None:
        x = scratch.take("seen", tuple(x.shape), x).copy_(x)
        drop(x, dropped)
    out.addmm_(x, a.t(), beta=0, alpha=factor)


def expand(
    z: torch.Tensor, b: torch.Tensor, out: torch.Tensor, factor: float = 1.0, *, add: bool,
    dropped: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """factor z b into ``out``, or added to it.

    Args:
        z: (rows, rank); b: (rank, width), contiguous; out: (rows, width). Rows of ``z`` and ``out`` are contiguous in
            themselves.
        dropped: ascending places of the flat ``out``, then contiguous, that are set to 0 afterwards.
    """
    if native := compiled("training", "expand", "pnppnnnnxnpn", z):
        native(z, z.stride(0), b, out, out.stride(0), *out.shape, len(b), factor, int(add), *places(dropped))
    else:
        out.addmm_(z, b, beta=int(add), alpha=factor)
        drop(out, dropped)


def outer(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """z' x, shape (rank, width). ``z`` (rows, rank), ``x`` (rows, width); their rows are contiguous in themselves."""
    if native := compiled("training", "outer", "pnpnpnnn", x):
        out = x.new_empty(z.shape[1], x.shape[1])
        native(z, z.stride(0), x, x.stride(0), out, *x.shape, z.shape[1])
        return out
    return torch.mm(z.t(), x)


def drop(x: torch.Tensor, dropped: torch.Tensor | None) -> None:
    """Set these places of the flat ``x`` to 0."""
    if dropped is not None:
        x.view(-1).index_fill_(0, dropped, 0)


def places(dropped: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """As the compiled functions take them: where, and how many."""
    return dropped, 0 if dropped is None else len(dropped)
