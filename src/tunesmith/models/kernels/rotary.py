"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split form, and its gradient.

With a head's two halves (a, b): a' = a c1 - b s1 and b' = b c2 + a s2. The map is linear, so the gradient is its
transpose: da = da' c1 + db' s2 and db = db' c2 - da' s1.
"""

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.native import compiled


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: Scratch) -> None:
    """Rotate in place: ``heads`` (tokens, heads, head size); ``cos`` and ``sin`` (tokens, 1, head size)."""
    if _rotated_natively(heads, cos, sin, transposed=False):
        return
    half = heads.shape[-1] // 2
    (a, b), (c1, c2), (s1, s2) = (t.split(half, -1) for t in (heads, cos, sin))
    _mix(a, b, c1, s1, c2, s2, -1, scratch)


def rotate_backward(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: Scratch) -> None:
    """Turn the gradient of rotated heads into that of the heads, in place; shapes as for ``rotate``."""
    if _rotated_natively(gradient, cos, sin, transposed=True):
        return
    half = gradient.shape[-1] // 2
    (a, b), (c1, c2), (s1, s2) = (t.split(half, -1) for t in (gradient, cos, sin))
    _mix(a, b, c1, s2, c2, s1, 1, scratch)


def _rotated_natively(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool) -> bool:
    native = compiled("training", "rotate", "pnnnppnn", heads)
    if native is None or heads.stride()[1:] != (heads.shape[2], 1):
        return False
    tokens, count, size = heads.shape
    native(heads, heads.stride(0), count, size, cos, sin, tokens, int(transposed))
    return True


def _mix(
    a: torch.Tensor, b: torch.Tensor, ca: torch.Tensor, sa: torch.Tensor, cb: torch.Tensor, sb: torch.Tensor,
    sign: int, scratch: Scratch,
) -> None:  # fmt: skip
    """a <- a ca + sign b sa and b <- b cb - sign a sb, both from the former a and b."""
    former = scratch.take("rotary", tuple(a.shape), a).copy_(a)
    a.mul_(ca).addcmul_(b, sa, value=sign)
    b.mul_(cb).addcmul_(former, sb, value=-sign)
