"""What an adapter changes in a model of transformers, put on for a pass and taken off after it.

PEFT decides where an adapter's tensors belong (``plain_adapters.py``); its own layers do not compute here. They read
the whole weight for every token with DoRA, allow one adapter with biases a model, and cannot be added while another
thread computes. What they compute is computed here too, term for term in the same order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.serving.seam import AdapterKey


@dataclass(frozen=True)
class LinearChange:
    """y + c (x A' B' + d), or, with DoRA (Liu et al. 2024, arXiv:2402.09353), m (y + c x A' B') but for y's bias.

    ``a`` (r, in), ``b`` (out, r), ``bias`` d (out,) or None, ``scale`` c, ``factor`` m (out,): magnitude by norm.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    factor: torch.Tensor | None

    def __call__(self, module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        """A forward hook of ``module``."""
        low = F.linear(F.linear(args[0], self.a), self.b, self.bias)
        if self.factor is None:
            return out + low * self.scale
        plain = out if module.bias is None else out - module.bias
        return out + ((self.factor - 1) * plain + self.factor * low * self.scale)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.a, self.b, self.bias, self.factor) if tensor is not None]


@dataclass(frozen=True)
class EmbeddingChange:
    """As ``LinearChange`` for tokens: ``a`` (vocabulary, r), ``b`` (r, width), ``factor`` (width,) or None."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    factor: torch.Tensor | None

    def __call__(self, module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        """A forward hook of ``module``. Models that scale their embeddings scale this part too, as PEFT does."""
        low = F.embedding(args[0], self.a) @ self.b
        stretch = getattr(module, "embed_scale", None)
        low = low if stretch is None else low * stretch
        if self.factor is None:
            return out + low * self.scale
        return self.factor * out + self.factor * low * self.scale

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.a, self.b, self.factor) if tensor is not None]


Change = LinearChange | EmbeddingChange


@dataclass(frozen=True)
class Changes:
    """A loaded adapter: ``hooks`` by name of the module; ``swaps``: (module, parameter's own name, tensor)."""

    key: AdapterKey
    hooks: Mapping[str, Change]
    swaps: Sequence[tuple[str, str, torch.Tensor]]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [tensor for change in self.hooks.values() for tensor in change.tensors]
        return sum(tensor.nbytes for tensor in tensors + [tensor for _, _, tensor in self.swaps])


@contextmanager
def applied(changes: Changes | None, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model whose ``modules`` these are computes with ``changes``; for one thread at a time."""
    if changes is None:
        yield
        return
    handles, before = [], []
    try:
        for name, own, tensor in changes.swaps:
            module = modules[name]
            place = module._buffers if own in module._buffers else module._parameters
            before.append((place, own, place[own]))
            place[own] = tensor
        handles += [modules[name].register_forward_hook(change) for name, change in changes.hooks.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for place, own, tensor in reversed(before):
            place[own] = tensor
