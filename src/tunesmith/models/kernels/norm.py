"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) and its gradient.

h = n * w with n = x * r and r = (mean(x^2) + eps)^(-1/2), row by row. With dn = dh * w:
dx = r * (dn - n * mean(dn * n)) and dw = sum over rows of dh * n.
"""

import torch

from tunesmith.models.kernels.scratch import Scratch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor) -> torch.Tensor:
    """Write the normed rows of x, shape (rows, width), into ``out``; returns r, shape (rows, 1).

    As in transformers, a wider type than float32 is narrowed to it for the statistics.
    """
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
