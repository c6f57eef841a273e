"""Products whose result is wider than they are deep: x W' of gate, up and head, dy W of down.

On AMD processors MKL, which torch has, makes these at 160 to 170 GFLOP/s where a product as deep as wide reaches 190;
the compiled one makes them at 200 (2 cores, float32, 754 rows, 576 deep, 1536 wide). Elsewhere, and for other forms,
torch is used. A processor is part of what a checkpoint records, so the choice changes no bits of a resumed run.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.thin import expand
from tunesmith.native import compiled, is_compiled

_DEPTH = 576  # of a part, as in native/large.h
_LEAST_DEPTH = 384  # below, laying out costs too much of the whole
_COLUMNS = 3072  # at once: the head's weights are not laid out as a whole


@dataclass(frozen=True)
class LowRank:
    """factor z b: ``z`` (rows, rank), rows contiguous in themselves; ``b`` (rank, columns), contiguous."""

    z: torch.Tensor
    b: torch.Tensor
    factor: float


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def is_wide(depth: int, columns: int) -> bool:
    """Whether ``product`` computes this form by itself."""
    return columns > depth >= _LEAST_DEPTH and _is_amd() and is_compiled("training")


def work_elements(rows: int, depth: int, columns: int, rank: int = 0) -> int:
    """Elements of the buffer that a wide product takes, ``rank`` that of what goes along."""
    if not is_wide(depth, columns):
        return 0
    # Rows are filled up to whole steps and columns to whole vectors, of four and sixteen at most.
    return (min(depth, _DEPTH) + rank) * (-(-rows // 4) * 4 + -(-min(columns, _COLUMNS) // 16) * 16)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
    *,
    add: bool,
    scale: float = 1.0,
    low: LowRank | None = None,
) -> None:
    """scale (x weight + low) into ``out``, or added to it.

    Args:
        x: shape (rows, depth); weight: (depth, columns), contiguous or the transpose of a contiguous tensor; out:
            (rows, columns). Rows of ``x`` and ``out`` are contiguous in themselves.
    """
    depth, columns = weight.shape
    native = compiled("training", "large", "pnpnnpnnnnxnpnpnnxp", x) if is_wide(depth, columns) else None
    if native is None or 1 not in weight.stride():
        out.addmm_(x, weight, beta=int(add), alpha=scale)
        if low is not None:
            expand(low.z, low.b, out, scale * low.factor, add=True)
        return
    turned = weight.stride(0) == 1
    rank = 0 if low is None else len(low.b)
    work = scratch.take("product work", (work_elements(len(x), depth, columns, rank),), x)
    for begin in range(0, columns, _COLUMNS):
        part = slice(begin, begin + _COLUMNS)
        of_weight, of_out = weight[:, part], out[:, part]
        native(
            x, x.stride(0), of_weight, weight.stride(1 if turned else 0), int(turned), of_out, out.stride(0), len(x),
            of_out.shape[1], depth, scale, int(add), *_going_along(low, part), work,
        )  # fmt: skip


def _going_along(
    low: LowRank | None, part: slice
) -> tuple[torch.Tensor | None, int, torch.Tensor | None, int, int, float]:
    """z and b of these columns, each with its stride, the rank and the factor."""
    if low is None:
        return None, 0, None, 0, 0, 0.0
    return low.z, low.z.stride(0), low.b[:, part], low.b.stride(0), len(low.b), low.factor
