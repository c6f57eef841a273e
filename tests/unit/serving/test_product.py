"""Both layouts of a linear layer compute the definition."""

import pytest
import torch

from tunesmith.serving.product import Product


@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_is_x_times_the_weight_plus_the_bias(monkeypatch, layout, rows, has_bias):
    if layout == "plain":
        monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    torch.manual_seed(0)
    weight, x = torch.randn(37, 24), torch.randn(rows, 48)[:, ::2]
    bias = torch.randn(37) if has_bias else None
    wanted = torch.einsum("ri,oi->ro", x.double(), weight.double())
    if bias is not None:
        wanted += bias
    found = Product(weight, bias)(x)
    assert (found - wanted).abs().max() < 1e-5
    found.add_(1.0)  # its memory is its own
    assert (Product(weight, bias)(x) - wanted).abs().max() < 1e-5
