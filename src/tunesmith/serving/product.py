"""y = x W' + c with W laid out once for the products of few rows that make tokens.

A plain matrix product of 16 rows first copies W into the blocks its kernel wants, at every call. oneDNN keeps W in
such blocks. What it saves was measured on a busy machine only: mostly time at 4 to 16 rows, nothing sure at 512.
"""

import torch


class Product:
    """A linear layer ``weight`` (out, in), ``bias`` (out,) or None, both constant from here on."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        packed = _packed(weight)
        self._is_packed = packed is not None
        self._weight = weight.t() if packed is None else packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, out) for ``x`` (rows, in), in memory of its own."""
        if self._is_packed:
            product = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            assert isinstance(product, torch.Tensor)
            return product
        if self.bias is None:
            return torch.mm(x, self._weight)
        return torch.addmm(self.bias, x, self._weight)


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """oneDNN's layout, None where this torch or processor has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        # The name is torch's own and may go; then the plain product is as right.
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return packed
