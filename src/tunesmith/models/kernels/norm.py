"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) and its gradient.

h = n * w with n = x * r and r = (mean(x^2) + eps)^(-1/2), row by row. With dn = dh * w:
dx = r * (dn - n * mean(dn * n)) and dw = sum over rows of dh * n.
"""

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.thin import drop, places
from tunesmith.native import compiled


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor) -> torch.Tensor:
    """Write the normed rows of x, shape (rows, width), into ``out``; returns r, shape (rows, 1).

    As in transformers, a wider type than float32 is narrowed to it for the statistics.
    """
    if native := compiled("training", "rms_norm", "ppxppnn", x):
        inverse = torch.empty(len(x), 1)
        native(x, weight, epsilon, out, inverse, *x.shape)
        return inverse
    exact = x.to(torch.float32)
    # By the norm: a product of rows by themselves would be a tensor of its own.
    squares = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
    if exact.dtype == out.dtype:
        torch.mul(exact, inverse, out=out)
    else:
        out.copy_(exact * inverse)
    out.mul_(weight)
    return inverse


def normed(
    x: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    dropped: torch.Tensor | None,
) -> torch.Tensor:
    """The normed rows again, into ``out``, from what ``rms_norm`` returned; 0 at the ``dropped`` places."""
    if native := compiled("training", "normed", "ppppnnpn", x):
        native(x, weight, inverse, out, *x.shape, *places(dropped))
        return out
    torch.mul(x, inverse.to(x.dtype), out=out).mul_(weight)
    drop(out, dropped)
    return out


def rms_norm_backward(
    dh: torch.Tensor,
    x: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    scratch: Scratch,
) -> None:
    """Add the gradient of x to ``dx``, and that of ``weight`` to ``weight.grad`` where it is trained.

    ``dh``, shape (rows, width), is used up.
    """
    if native := compiled("training", "rms_norm_backward", "pppppnn", x):
        if weight.requires_grad:
            gradient = torch.empty_like(weight)
            of_weight = compiled("training", "rms_norm_weight_gradient", "ppppnn", x)
            assert of_weight is not None
            of_weight(dh, x, inverse, gradient, *x.shape)
            add_gradient(weight, gradient)
        native(dh, x, inverse, weight, dx, *x.shape)
        return
    inverse = inverse.to(x.dtype)
    normed = torch.mul(x, inverse, out=scratch.take("normed", tuple(x.shape), x))
    product = torch.mul(dh, normed, out=scratch.take("norm product", tuple(x.shape), x))
    if weight.requires_grad:
        add_gradient(weight, product.sum(0))
    dh.mul_(weight.detach())
    mean = torch.mv(product, weight.detach())[:, None].div_(x.shape[-1])
    dx.addcmul_(dh, inverse).addcmul_(normed, mean.mul_(inverse), value=-1)


def add_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add to ``parameter.grad``, which begins as absent."""
    if parameter.grad is None:
        # In the parameter's own layout: a fused optimizer walks through both in the order of memory.
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad.add_(gradient)
