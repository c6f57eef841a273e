"""All layouts of a linear layer compute the definition; in the compiled one, rows know nothing of each other."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
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


QUANTISED = {4: gguf.GGMLQuantizationType.Q4_1, 8: gguf.GGMLQuantizationType.Q8_0}


def weight_of(bits: int, columns: int, width: int, seed: int = 0) -> torch.Tensor:
    """A weight as a checkpoint of so many bits gives it: by llama.cpp's own quantisation, or from bfloat16."""
    weight = np.random.default_rng(seed).normal(size=(columns, width)).astype(np.float32) * 0.1
    if bits in QUANTISED:
        return torch.from_numpy(dequantize(quantize(weight, QUANTISED[bits]), QUANTISED[bits]))
    return torch.from_numpy(weight).bfloat16().float() if bits == 16 else torch.from_numpy(weight)


def in_full(monkeypatch: pytest.MonkeyPatch, *given: object) -> Product:
    """A product whose weight is kept in 32 bits, whatever it is."""
    with monkeypatch.context() as patch:
        patch.setattr("tunesmith.serving.product._bits", lambda _: 32)
        return Product(*given)  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_a_weight_is_kept_in_the_fewest_bits_that_give_its_numbers(level, bits):
    weight = weight_of(bits, 83, 96)
    product = Product([weight], None)
    assert product.panels is not None
    assert product.panels[1] == bits
    # Codes, and for 4 and 8 bits a step and an offset for each 32 numbers; 83 columns are 6 panels of 16.
    assert product.panels[0].nbytes == 6 * 16 * (96 * bits // 8 + (96 // 32 * 8 if bits < 16 else 0))
    assert torch.equal(product.dense(), weight)


@compiled
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 16, 28, 29, 70, 200])
def test_a_product_is_the_same_to_the_last_bit_in_fewer_bits(level, monkeypatch, bits, rows):
    weight, x = weight_of(bits, 83, 96), torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
    bias = torch.linspace(-1, 1, 83)
    found, wanted = Product([weight], bias), in_full(monkeypatch, [weight], bias)
    assert torch.equal(found(x, Scratch()), wanted(x, Scratch()))
    sums = torch.ones(rows, 83)
    found.add_to(sums, x, Scratch())
    others = torch.ones(rows, 83)
    wanted.add_to(others, x, Scratch())
    assert torch.equal(sums, others)


@compiled
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("other", [0.012345678, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (40, 33), (82, 95)])
def test_one_number_of_another_kind_is_kept_exactly_too(bits, other, place):
    weight = weight_of(bits, 83, 96)
    weight[place] = other
    product = Product([weight], None)
    assert product.panels is not None
    # Infinity and NaN have lower halves of zeros, and so may be bfloat16 numbers.
    assert product.panels[1] == (16 if bits == 16 and other != 0.012345678 else 32)
    assert torch.equal(product.dense().nan_to_num(7.0), weight.nan_to_num(7.0))


@compiled
def test_weights_that_are_stacked_have_as_many_bits_as_the_one_that_needs_most():
    weights = [weight_of(bits, 16, 64) for bits in (4, 16, 4)]
    product = Product(weights, None)
    assert product.panels is not None
    assert product.panels[1] == 32  # a number of 4 bits, with its step and offset, is none of bfloat16
    assert torch.equal(product.dense(), torch.cat(weights))


@compiled
def test_a_width_of_no_whole_blocks_is_kept_in_full():
    weight = weight_of(16, 20, 48)
    product = Product([weight], None)
    assert product.panels is not None
    assert product.panels[1] == 32
    assert torch.equal(product.dense(), weight)


@compiled
@given(
    seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([4, 8, 16]), scale=st.floats(1e-30, 1e30),
    columns=st.integers(1, 40), blocks=st.integers(1, 3),
)  # fmt: skip
def test_no_number_is_changed(seed, bits, scale, columns, blocks):
    weight = (weight_of(bits, columns, 32 * blocks, seed) * scale).clamp(-3e38, 3e38)
    assert torch.equal(Product([weight], None).dense(), weight)


@compiled
def test_blocks_of_equal_numbers_and_of_zeros():
    weight = weight_of(4, 16, 64)
    weight[3, :32], weight[5, 32:], weight[7] = 0.25, 0.0, -0.5
    product = Product([weight], None)
    assert product.panels is not None
    assert product.panels[1] == 4
    assert torch.equal(product.dense(), weight)
