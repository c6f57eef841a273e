"""Memory straight from the operating system, in pages of the size that fits its use.

Finding where a page lies takes a processor time of its own, in a virtual machine twice. A bare loop reads weights 1.2
to 1.8 times as fast from pages of 2 MB as from those of 4 KB (two cores of an AMD EPYC, by turns); products of a row
are 1.1 to 1.3 times as fast (``benchmarks/serving_products.py``). What is mostly empty must have small ones.
"""

import math
import mmap
from contextlib import suppress

import torch

_FLOAT32 = 4
_HUGE = 2 << 20
_CHUNK = 32 * _HUGE
_LINE = 64  # bytes; every tensor begins with one


def small_pages(*shape: int) -> torch.Tensor:
    """Zeros in float32, which take memory where they are written to, 4 KB at a time."""
    # The system's zero pages: torch would write the zeros, and so take all the memory at once. numpy asks for huge
    # ones, and a cache whose first tokens are used would take 2 MB a slot and layer (0.9 GB were seen for 0.05).
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape)
    return torch.frombuffer(_mapping(_FLOAT32 * count, "MADV_NOHUGEPAGE"), dtype=torch.float32).view(shape)


class HugePages:
    """Room for tensors that are used whole, one behind the other in huge pages where the system has them.

    A mapping lives as long as a tensor in it.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised numbers in float32."""
        size = _FLOAT32 * math.prod(shape)
        taken = -(-size // _LINE) * _LINE
        if taken > len(self._free):
            self._free = _huge_mapping(max(taken, _CHUNK))
        found, self._free = self._free[:size], self._free[taken:]
        return found.view(torch.float32).view(shape)


def _huge_mapping(size: int) -> torch.Tensor:
    """At least ``size`` bytes that begin with a huge page."""
    whole = -(-size // _HUGE) * _HUGE
    pages = torch.frombuffer(_mapping(whole + _HUGE, "MADV_HUGEPAGE"), dtype=torch.uint8)
    return pages[-pages.data_ptr() % _HUGE :][:whole]


def _mapping(size: int, advice: str) -> mmap.mmap:
    # Private: what processes share has huge pages by other rules.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, size, **private)
    if hasattr(mmap, advice):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(getattr(mmap, advice))
    return pages
