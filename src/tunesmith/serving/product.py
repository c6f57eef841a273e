"""y = x W' + c with W laid out once for the products of few rows that make tokens.

A plain matrix product of 16 rows first copies W into the blocks its kernel wants, at every call. Here W is kept in the
order in which it is read, in one of three layouts: that of ``native/panels.h`` where it could be compiled, in as few
bits as give its numbers, else oneDNN's, else as it is. Of the 116 GFLOP/s of a core of an AMD EPYC the first reaches
84 to 100 at 16 rows, the call included (``benchmarks/serving_products.py``); oneDNN 81, a plain product 48.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from tunesmith.models.kernels.scratch import Scratch
from tunesmith.native import compiled
from tunesmith.serving.pages import HugePages

# Of native/panels.h: columns of a panel, and numbers of one with a step and an offset.
_PANEL, _BLOCK = 16, 32
_SIGNATURE = "pnpnppnpnnnn"  # of product


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
    def panels(self) -> tuple[torch.Tensor, int] | None:
        """The weight as native/panels.h has it, and in how many bits; None where it is kept otherwise."""
        return (self._layout.panels, self._layout.bits) if isinstance(self._layout, _Panels) else None

    def dense(self) -> torch.Tensor:
        """The weight (out, in), laid out anew where it is kept otherwise."""
        return self._layout.dense()


class _Panels:
    def __init__(self, weights: Sequence[torch.Tensor], memory: HugePages) -> None:
        if any(len(weight) % _PANEL for weight in weights[:-1]):
            weights = [_stacked(weights)]
        weights = [weight.contiguous() for weight in weights]
        self._columns, self._width = sum(map(len, weights)), weights[0].shape[1]
        self.bits = _bits(weights)
        self.panels = memory.empty(-(-self._columns // _PANEL), _panel_numbers(self._width, self.bits))
        multiply = compiled("serving", "product", _SIGNATURE, self.panels)
        assert multiply is not None
        self._multiply = multiply
        lay_out = _function("lay_out_panels", "pnnpnn")
        begin = 0
        for weight in weights:
            part = self.panels[begin // _PANEL :]
            lay_out(weight, self._width, self.bits, part, len(weight), self._width)
            begin += len(weight)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        out = scratch.take("product", (len(x), self._columns), x)
        self._into(out, x, bias, scratch, add=False)
        return out

    def add_to(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        self._into(out, x, bias, scratch, add=True)

    def dense(self) -> torch.Tensor:
        numbers = self.panels.new_empty(len(self.panels), self._width, _PANEL)
        _function("read_panels", "pnnnp")(self.panels, self.bits, len(self.panels), self._width, numbers)
        return numbers.transpose(1, 2).reshape(-1, self._width)[: self._columns]

    def _into(
        self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch, *, add: bool
    ) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        room = (torch.get_num_threads() * _PANEL + len(x)) * self._width
        self._multiply(
            x,
            x.stride(0),
            self.panels,
            self.bits,
            bias,
            out,
            out.stride(0),
            scratch.take("room of a product", (room,), x),
            len(x),
            self._width,
            self._columns,
            add,
        )


def _bits(weights: Sequence[torch.Tensor]) -> int:
    """The fewest that give the weights' numbers again."""
    width = weights[0].shape[1]
    if width % _BLOCK:
        return 32
    fit = _function("panels_fit", "pnnnnp")
    fits = torch.zeros(1, dtype=torch.int64)

    def has(bits: int, weight: torch.Tensor) -> bool:
        fit(weight, width, bits, len(weight), width, fits)
        return bool(fits)

    return next((bits for bits in (4, 8, 16) if all(has(bits, weight) for weight in weights)), 32)


def _panel_numbers(width: int, bits: int) -> int:
    """The room that a panel takes: ``panel_bytes`` of native/panels.h, in numbers of 32 bits."""
    steps = width // _BLOCK * 2 if bits < 16 else 0
    return _PANEL * (width * bits // 32 + steps)


def _function(name: str, kinds: str) -> Callable[..., Any]:
    function = compiled("serving", f"{name}_float", kinds)
    assert function is not None
    return function


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
    """The layout of native/panels.h, None where it was not compiled."""
    like = weights[0]
    if like.dtype != torch.float32 or compiled("serving", "product", _SIGNATURE, like) is None:
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
