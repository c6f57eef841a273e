"""All layouts of a linear layer compute the definition; in the compiled one, rows know nothing of each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith import native
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.serving.product import Product

compiled = pytest.mark.skipif(not native.is_compiled("serving"), reason="serving.c was not compiled")


@pytest.fixture(params=[pytest.param("panels", marks=compiled), "packed", "plain"])
def layout(request, monkeypatch) -> str:
    if request.param != "panels":
        monkeypatch.setattr("tunesmith.serving.product.compiled", lambda *_: None)
    if request.param == "plain":
        monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    return str(request.param)


def case(rows: int, width: int, columns: int, *, has_bias: bool = False) -> tuple[torch.Tensor, ...]:
    """x, weight, bias and the result in float64."""
    generator = torch.Generator().manual_seed(rows * 1000 + width * 10 + columns)
    x = torch.randn(rows, 2 * width, generator=generator)[:, :width]
    weight = torch.randn(columns, width, generator=generator)
    bias = torch.randn(columns, generator=generator) if has_bias else None
    wanted = torch.einsum("ri,oi->ro", x.double(), weight.double())
    return x, weight, bias, wanted if bias is None else wanted + bias


@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_is_x_times_the_weight_plus_the_bias(layout, rows, has_bias):
    x, weight, bias, wanted = case(rows, 24, 37, has_bias=has_bias)
    product = Product([weight], bias)
    found = product(x, Scratch())
    assert (found - wanted).abs().max() < 1e-5
    found.add_(1.0)
    assert (product(x, Scratch()) - wanted).abs().max() < 1e-5
    product.add_to(found, x, Scratch())
    assert (found - 2 * wanted - 1).abs().max() < 2e-5
    assert torch.equal(product.dense(), weight)


@pytest.mark.parametrize("sizes", [(16, 32, 5), (5, 16, 3)])
def test_weights_are_stacked(layout, sizes):
    x, weight, bias, wanted = case(3, 24, sum(sizes), has_bias=True)
    product = Product(weight.split(sizes), bias)
    assert (product(x, Scratch()) - wanted).abs().max() < 1e-5
    assert torch.equal(product.dense(), weight)


@pytest.mark.parametrize("layout", ["panels"], indirect=True)
def test_columns_of_x_that_do_not_lie_together_are_read_as_they_are(layout):
    x, weight, _, _ = case(5, 24, 37)
    assert torch.equal(
        Product([weight[:, :12]], None)(x[:, ::2], Scratch()),
        Product([weight[:, :12]], None)(x[:, ::2].clone(), Scratch()),
    )


@compiled
@given(rows=st.integers(1, 40), width=st.integers(1, 70), columns=st.integers(1, 70), has_bias=st.booleans())
def test_any_size_is_right(rows, width, columns, has_bias):
    x, weight, bias, wanted = case(rows, width, columns, has_bias=has_bias)
    # Rounding: a sum of n products in order is off by at most n half units of the sum of their sizes.
    most = (width + 1) * 2.0**-24 * (x.abs().double() @ weight.abs().double().t() + 4)
    assert ((Product([weight], bias)(x, Scratch()) - wanted).abs() <= most).all()


@compiled
@pytest.mark.parametrize("rows", range(1, 41))
def test_every_count_of_rows_is_right_at_every_level_and_a_row_is_the_same_in_each(level, rows):
    x, weight, bias, wanted = case(40, 45, 83, has_bias=True)
    product = Product([weight], bias)
    found = product(x[:rows], Scratch())
    assert (found - wanted[:rows]).abs().max() < 1e-4
    assert torch.equal(found, product(x, Scratch())[:rows])
