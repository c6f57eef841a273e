"""The compiled functions against the formulas in float64, for each level of processor that this one has."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith import native
from tunesmith.models.kernels import wide
from tunesmith.models.kernels.norm import normed
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.swiglu import swiglu, swiglu_backward
from tunesmith.models.kernels.thin import expand, outer, shrink

# A level's instructions are those of the levels below it too.
LEVELS = {"AVX512": ("AVX512", "AVX2"), "AVX2": ("AVX2",)}
CAPABILITY = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(params=LEVELS.get(CAPABILITY, (CAPABILITY,)), autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    for found in (native._library, native._function):
        found.cache_clear()
    if not native.is_compiled("training"):
        pytest.skip("no C compiler was at hand when tunesmith was installed")
    yield request.param
    for found in (native._library, native._function):
        found.cache_clear()


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor, *, terms: int = 1) -> bool:
    """Within what ``terms`` roundings of the type can do."""
    unit = torch.finfo(found.dtype).eps * (4 + terms)
    return bool(((found.double() - wanted).abs() <= unit * (1 + wanted.abs())).all())


sizes = {
    "rows": st.integers(1, 40),
    "width": st.integers(1, 150),
    "rank": st.integers(1, 21),
    "beside": st.integers(0, 3),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
}
anew = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places_of(size: int) -> st.SearchStrategy[torch.Tensor]:
    """Ascending places in ``range(size)``."""
    return st.sets(st.integers(0, size - 1), max_size=50).map(
        lambda found: torch.tensor(sorted(found), dtype=torch.int64)
    )


@anew
@given(**sizes)
def test_shrink(rows: int, width: int, rank: int, beside: int, dtype: torch.dtype):
    # Rows that stand further apart than they are long, as parts of a wider tensor do.
    x, a = (
        random(rows, width + beside, seed=1, dtype=dtype)[:, :width],
        random(rank, width, seed=2, dtype=dtype),
    )
    out = torch.full((rows, rank + beside), 7.0, dtype=dtype)
    shrink(x, a, out[:, :rank], 0.5, scratch=Scratch())
    assert close(out[:, :rank], 0.5 * x.double() @ a.double().t(), terms=4 * width)
    assert bool((out[:, rank:] == 7).all())


@anew
@given(**sizes, data=st.data())
def test_shrink_without_what_is_dropped(
    rows: int, width: int, rank: int, beside: int, dtype: torch.dtype, data: st.DataObject
):
    x, a = random(rows, width, seed=1, dtype=dtype), random(rank, width, seed=2, dtype=dtype)
    before = x.clone()
    dropped = data.draw(places_of(rows * width))
    out = torch.full((rows, rank + beside), 7.0, dtype=dtype)
    shrink(x, a, out[:, :rank], 0.5, scratch=Scratch(), dropped=dropped)
    seen = x.double().reshape(-1).index_fill(0, dropped, 0).view(rows, width)
    assert close(out[:, :rank], 0.5 * seen @ a.double().t(), terms=4 * width)
    assert bool((out[:, rank:] == 7).all())
    assert torch.equal(x, before)


@anew
@given(rows=sizes["rows"], width=sizes["width"], dtype=sizes["dtype"], data=st.data())
def test_what_is_computed_again_lacks_what_was_dropped(
    rows: int, width: int, dtype: torch.dtype, data: st.DataObject
):
    x, up = random(rows, width, seed=1, dtype=dtype), random(rows, width, seed=2, dtype=dtype)
    weight, inverse = random(width, seed=3, dtype=dtype), random(rows, 1, seed=4, dtype=torch.float32)
    dropped = data.draw(places_of(rows * width))
    found = normed(x, inverse, weight, torch.empty_like(x), dropped)
    wanted = x.double() * inverse.double() * weight.double()
    assert close(found, wanted.reshape(-1).index_fill(0, dropped, 0).view(rows, width), terms=8)
    out = torch.empty_like(x)
    swiglu(x, up, out, dropped)
    wanted = torch.nn.functional.silu(x.double()) * up.double()
    assert close(out, wanted.reshape(-1).index_fill(0, dropped, 0).view(rows, width), terms=16)


@anew
@given(**sizes, add=st.booleans())
def test_expand(rows: int, width: int, rank: int, beside: int, dtype: torch.dtype, add: bool):
    z, b = (
        random(rows, rank + beside, seed=1, dtype=dtype)[:, :rank],
        random(rank, width, seed=2, dtype=dtype),
    )
    out = random(rows, width + beside, seed=3, dtype=dtype)
    before = out.clone()
    expand(z, b, out[:, :width], 0.5, add=add)
    wanted = 0.5 * z.double() @ b.double() + (before[:, :width].double() if add else 0)
    assert close(out[:, :width], wanted, terms=4 * rank)
    assert torch.equal(out[:, width:], before[:, width:])


@anew
@given(**sizes)
def test_outer(rows: int, width: int, rank: int, beside: int, dtype: torch.dtype):
    z = random(rows, rank + beside, seed=1, dtype=dtype)[:, :rank]
    x = random(rows, width + beside, seed=2, dtype=dtype)[:, :width]
    assert close(outer(z, x), z.double().t() @ x.double(), terms=4 * rows)


@anew
@given(
    rows=st.integers(1, 70),
    depth=st.integers(1, 40),
    columns=st.integers(1, 90),
    most=st.sampled_from([16, 48, 3072]),
    dtype=sizes["dtype"],
    turned=st.booleans(),
    add=st.booleans(),
    rank=st.integers(0, 9),
)
def test_wide_products(
    rows: int, depth: int, columns: int, most: int, dtype: torch.dtype, turned: bool, add: bool, rank: int
):
    x = random(rows, depth + 1, seed=1, dtype=dtype)[:, :depth]
    weight = (
        random(columns, depth, seed=2, dtype=dtype).t()
        if turned
        else random(depth, columns, seed=2, dtype=dtype)
    )
    out = random(rows, columns + 2, seed=3, dtype=dtype)
    before, scratch = out.clone(), Scratch()
    z, b = random(rows, rank + 3, seed=4, dtype=dtype)[:, :rank], random(rank, columns, seed=5, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide, "is_wide", lambda _depth, _columns: True)
        patch.setattr(wide, "_COLUMNS", most)
        counted = wide.work_elements(rows, depth, columns, rank)
        low = wide.LowRank(z, b, 0.25) if rank else None
        wide.product(x, weight, out[:, :columns], scratch, add=add, scale=0.5, low=low)
    product = x.double() @ weight.double() + 0.25 * z.double() @ b.double()
    wanted = 0.5 * product + (before[:, :columns].double() if add else 0)
    assert close(out[:, :columns], wanted, terms=4 * (depth + rank))
    assert torch.equal(out[:, columns:], before[:, columns:])
    assert scratch.elements() == {"product work": counted}


@pytest.mark.parametrize("turned", [False, True])
def test_a_wide_product_deeper_than_one_part_does_not_depend_on_threads(turned: bool):
    x = random(61, 1300, seed=1, dtype=torch.float32)
    weight = (
        random(1400, 1300, seed=2, dtype=torch.float32).t()
        if turned
        else random(1300, 1400, seed=2, dtype=torch.float32)
    )
    found, before = [], torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide, "is_wide", lambda _depth, _columns: True)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.empty(61, 1400))
            wide.product(x, weight, found[-1], Scratch(), add=False)
    torch.set_num_threads(before)
    assert close(found[0], x.double() @ weight.double(), terms=1300)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_over_its_whole_range(dtype: torch.dtype):
    # silu(g) = g / (1 + e^-g), up and da being 1.
    limit = 80 if dtype == torch.float32 else 700
    gate = torch.cat(
        [torch.linspace(-limit, limit, 20_001, dtype=torch.float64), torch.tensor([0.0, -1e-30, 1e-30])]
    )
    gate = gate.to(dtype)
    exact = gate.double()
    wanted = exact * torch.sigmoid(exact)
    ones, out, dup, slope = (
        torch.ones_like(gate),
        torch.empty_like(gate),
        torch.empty_like(gate),
        gate.clone(),
    )
    swiglu(gate[None], ones[None], out[None])
    swiglu_backward(ones.clone(), slope, ones, dup)
    # Of the value itself: relative, as e^x is small where g is far below 0.
    unit = 8 * torch.finfo(dtype).eps
    assert bool(((out.double() - wanted).abs() <= unit * wanted.abs() + 1e-30).all())
    assert bool(((dup.double() - wanted).abs() <= unit * wanted.abs() + 1e-30).all())
    sigmoid = torch.sigmoid(exact)
    derivative = sigmoid * (1 + exact * (1 - sigmoid))
    # 1 - sigmoid is a difference: what it loses counts g times.
    assert bool(((slope.double() - derivative).abs() <= unit * (1 + exact.abs())).all())


def test_extreme_gates_give_no_nan():
    gate = torch.tensor([-200.0, 200.0, 1e30])
    out = torch.empty_like(gate)
    swiglu(gate[None], torch.ones_like(gate)[None], out[None])
    assert abs(float(out[0])) < 1e-30
    assert out[1:].tolist() == gate[1:].tolist()
    broken = torch.tensor([torch.nan])
    swiglu(broken[None], torch.ones(1, 1), broken[None])
    assert bool(broken.isnan())


def test_halves_of_one_tensor_are_gate_and_up():
    both = random(5, 40, seed=1, dtype=torch.float32)
    gate, up = both.split([20, 20], 1)
    out = torch.empty(5, 20)
    swiglu(gate, up, out)
    assert close(out, torch.nn.functional.silu(gate.double()) * up.double())
