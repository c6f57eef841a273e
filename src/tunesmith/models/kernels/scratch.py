"""Memory for intermediate results that is used again and again.

A fresh tensor of some megabytes is mapped by the kernel page by page at first touch, which costs as much as
computing it. Buffers that live as long as the run cost that once, and their sum is the run's activation memory.
"""

import math
from collections.abc import Mapping

import torch


class Scratch:
    """Named buffers, each as large as the largest request so far.

    A buffer is valid until its name is taken again: who takes a name must be done with its former content.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of ``shape`` with the dtype and device of ``like``; its content is undefined."""
        size, key = math.prod(shape), (name, like.dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(key, None)  # freed before its successor is made
            self._buffers[key] = buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(shape)

    def reserve(self, sizes: Mapping[str, int], like: torch.Tensor) -> None:
        """Make buffers of these many elements at once, so that none need grow."""
        for name, size in sizes.items():
            self.take(name, (size,), like)

    def release(self) -> None:
        """Give the buffers' memory back; the next ``take`` makes them anew. Gradients stay."""
        self._buffers.clear()

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient of a tensor that lives as long as this, laid out as the tensor, the same each time.

        A fused optimizer walks through both in the order of memory.
        """
        found = self._gradients.get(id(parameter))
        if found is None:
            self._gradients[id(parameter)] = found = torch.empty_like(parameter)
        return found

    def elements(self) -> dict[str, int]:
        """Elements of each buffer that holds any."""
        return {name: buffer.numel() for (name, _), buffer in self._buffers.items() if buffer.numel()}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
