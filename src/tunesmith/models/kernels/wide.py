"""Products whose result is wider than they are deep: x W' of gate, up and head, dy W of down.

On AMD processors MKL, which torch has, makes these at 160 to 170 GFLOP/s where a product as deep as wide reaches 190;
the compiled one makes them at 200 (2 cores, float32, 754 rows, 576 deep, 1536 wide). Elsewhere, and for other forms,
torch is used. A processor is part of what a checkpoint records, so the choice changes no bits of a resumed run.
"""

from functools import cache
from pathlib import Path

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.native import compiled, is_compiled

_DEPTH = 576  # of a part, as in native/large.h
_LEAST_DEPTH = 384  # below, laying out costs too much of the whole
_COLUMNS = 3072  # at once: the head's weights are not laid out as a whole


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def is_wide(depth: int, columns: int) -> bool:
    """Whether ``product`` computes this form by itself."""
    return columns > depth >= _LEAST_DEPTH and _is_amd() and is_compiled("training")


def work_elements(rows: int, depth: int, columns: int) -> int:
    """Elements of the buffer that a wide product takes."""
    if not is_wide(depth, columns):
        return 0
    # Rows are filled up to whole steps and columns to whole vectors, of four and sixteen at most.
    return min(depth, _DEPTH) * (-(-rows // 4) * 4 + -(-min(columns, _COLUMNS) // 16) * 16)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
    *,
    add: bool,
    scale: float = 1.0,
) -> None:
    """scale x weight into ``out``, or added to it.

    Args:
        x: shape (rows, depth); weight: (depth, columns), contiguous or the transpose of a contiguous tensor; out:
            (rows, columns). Rows of ``x`` and ``out`` are contiguous in themselves.
    """
    depth, columns = weight.shape
    native = compiled("training", "large", "pnpnnpnnnnxnp", x) if is_wide(depth, columns) else None
    if native is None or 1 not in weight.stride():
        out.addmm_(x, weight, beta=int(add), alpha=scale)
        return
    turned = weight.stride(0) == 1
    work = scratch.take("product work", (work_elements(len(x), depth, columns),), x)
    for begin in range(0, columns, _COLUMNS):
        part = slice(begin, begin + _COLUMNS)
        of_weight, of_out = weight[:, part], out[:, part]
        native(
            x, x.stride(0), of_weight, weight.stride(1 if turned else 0), int(turned), of_out, out.stride(0), len(x),
            of_out.shape[1], depth, scale, int(add), work,
        )  # fmt: skip
