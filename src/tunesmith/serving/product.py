"""y = x W' + c with W laid out once for the products of few rows that make tokens.

A plain matrix product of 16 rows first copies W into the blocks its kernel wants, at every call. Here W is kept in the
order in which it is read, in one of three layouts: that of ``native/product.h`` where it could be compiled, else
oneDNN's, else as it is. Of 100 GFLOP/s that a core of an AMD EPYC gives to large products the first reaches 96 at 16
rows (oneDNN 81, a plain product 48) and 75 at 8 (53, 31); of one row it reads 26 GB/s (14, 12).
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.native import compiled
from tunesmith.serving.pages import HugePages

_PANEL = 16  # columns of a panel in native/product.h


class _Layout(Protocol):
    """A weight in the order in which it is read."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor: ...

    def add_to(
        self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch
    ) -> None: ...

    def dense(self) -> torch.Tensor: ...


class Product:
    """Linear layers on one input as one: ``weights``, each (out, in), and ``bias`` (summed out,) or None, all constant
    from here on; ``memory`` is where they are laid out."""

    def __init__(
        self, weights: Sequence[torch.Tensor], bias: torch.Tensor | None, memory: HugePages | None = None
    ) -> None:
        self.bias = bias
        self._layout: _Layout = (
            _panels(weights, memory or HugePages()) or _packed(_stacked(weights)) or _Plain(_stacked(weights))
        )

    def __call__(self, x: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """(rows, out) for ``x`` (rows, in); valid until the next product with the same ``scratch``."""
        return self._layout.multiply(x, self.bias, scratch)

    def add_to(self, out: torch.Tensor, x: torch.Tensor, scratch: Scratch) -> None:
        """Add it to ``out`` (rows, out)."""
        self._layout.add_to(out, x, self.bias, scratch)

    @property
    def panels(self) -> torch.Tensor | None:
        """The weight as native/product.h reads it, (panels, in, 16); None where it is kept otherwise."""
        return self._layout.panels if isinstance(self._layout, _Panels) else None

    def dense(self) -> torch.Tensor:
        """The weight (out, in), laid out anew where it is kept otherwise."""
        return self._layout.dense()


class _Panels:
    def __init__(self, weights: Sequence[torch.Tensor], memory: HugePages) -> None:
        if any(len(weight) % _PANEL for weight in weights[:-1]):
            weights = [_stacked(weights)]
        self._columns, self._width = sum(map(len, weights)), weights[0].shape[1]
        self.panels = memory.empty(-(-self._columns // _PANEL), self._width, _PANEL)
        lay_out = compiled("serving", "lay_out_panels", "pnpnn", self.panels)
        multiply = compiled("serving", "product", "pnpppnpnnnn", self.panels)
        assert lay_out is not None
        assert multiply is not None
        self._multiply = multiply
        begin = 0
        for weight in weights:
            part = self.panels[begin // _PANEL :]
            lay_out(weight.contiguous(), self._width, part, len(weight), self._width)
            begin += len(weight)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        out = scratch.take("product", (len(x), self._columns), x)
        self._into(out, x, bias, scratch, add=False)
        return out

    def add_to(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        self._into(out, x, bias, scratch, add=True)

    def dense(self) -> torch.Tensor:
        return self.panels.transpose(1, 2).reshape(-1, self._width)[: self._columns]

    def _into(
        self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch, *, add: bool
    ) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        laid, rows = scratch.take("laid out", (x.numel(),), x), len(x)
        self._multiply(
            x,
            x.stride(0),
            self.panels,
            bias,
            out,
            out.stride(0),
            laid,
            rows,
            self._width,
            self._columns,
            add,
        )


class _Packed:
    def __init__(self, packed: torch.Tensor) -> None:
        self._packed = packed

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        product = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        assert isinstance(product, torch.Tensor)
        return product

    def add_to(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        out.add_(self.multiply(x, bias, scratch))

    def dense(self) -> torch.Tensor:
        return self._packed.to_dense()


class _Plain:
    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.t()

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        if bias is None:
            return torch.mm(x, self._weight)
        return torch.addmm(bias, x, self._weight)

    def add_to(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        out.add_(self.multiply(x, bias, scratch))

    def dense(self) -> torch.Tensor:
        return self._weight.t()


def _stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _panels(weights: Sequence[torch.Tensor], memory: HugePages) -> _Layout | None:
    """The layout of native/product.h, None where it was not compiled."""
    like = weights[0]
    if like.dtype != torch.float32 or compiled("serving", "product", "pnpppnpnnnn", like) is None:
        return None
    return _Panels(weights, memory)


def _packed(weight: torch.Tensor) -> _Layout | None:
    """oneDNN's layout, None where this torch or processor has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        # The name is torch's own and may go; then the plain product is as right.
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return _Packed(packed)
