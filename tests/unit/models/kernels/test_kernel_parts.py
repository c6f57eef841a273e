"""Each kernel alone against autograd of its formula, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data.packing import Layout
from tunesmith.models.kernels import arrangement as kernel_arrangement
from tunesmith.models.kernels.arrangement import Shape, arrange
from tunesmith.models.kernels.attention import attend_rows, attend_rows_backward
from tunesmith.models.kernels.dropout import draw_dropped
from tunesmith.models.kernels.head import head_losses
from tunesmith.models.kernels.linear import Adapter, Linear, project, project_backward
from tunesmith.models.kernels.norm import rms_norm, rms_norm_backward
from tunesmith.models.kernels.rotary import rotate, rotate_backward
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.segments import attend, attend_backward, segments
from tunesmith.models.kernels.swiglu import swiglu, swiglu_backward

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, shape: Shape
) -> torch.Tensor:
    """One token, one head at a time, straight from the definition."""
    begin, rows = layout.prefix, [(list(range(layout.prefix)), layout.prefix)]
    for length in layout.suffixes:
        rows.append(([*range(layout.prefix), *range(begin, begin + length)], length))
        begin += length
    out = torch.zeros_like(q)
    for places, own in rows:
        for index in range(len(places) - own, len(places)):
            seen = places[max(0, index + 1 - (shape.window or len(places))) : index + 1]
            for head in range(shape.heads):
                group = head * shape.groups // shape.heads
                mine = slice(head * shape.size, (head + 1) * shape.size)
                theirs = slice(group * shape.size, (group + 1) * shape.size)
                scores = k[seen, theirs] @ q[places[index], mine] * shape.scale
                out[places[index], mine] = torch.softmax(scores, 0) @ v[seen, theirs]
    return out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.integers(0, 7),
    suffixes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 6),
    block=st.integers(2, 6),
    saves=st.booleans(),
)
def test_attention_of_any_rows(
    way: str, prefix: int, suffixes: list[int], window: int | None, block: int, saves: bool
):
    layout = Layout(prefix, tuple(suffixes))
    total = prefix + sum(suffixes)
    if total == 0:
        return
    shape = Shape(4, 2, 3, 0.7, window)
    q, k, v, dout = (
        random(total, 12),
        random(total, 6, seed=1),
        random(total, 6, seed=2),
        random(total, 12, seed=3),
    )
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = plain_attention(*leaves, layout, shape)
    wanted.backward(dout)
    out, scratch, qkv = torch.empty_like(q), Scratch(), torch.cat([q, k, v], 1)
    dqkv = torch.empty_like(qkv)
    if way == "compiled":
        laid_out = segments(layout, shape)
        attend(qkv, laid_out, shape, out, scratch)
        attend_backward(dout, qkv, laid_out, shape, dqkv, scratch)
    else:
        _attend_by_torch(qkv, dout, layout, shape, block, saves, out, dqkv)
    found = dqkv.split([12, 6, 6], 1)
    assert torch.allclose(out, wanted.detach(), rtol=1e-10, atol=1e-12)
    for mine, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        assert torch.allclose(mine, leaf.grad, rtol=1e-10, atol=1e-12)


def _attend_by_torch(
    qkv: torch.Tensor, dout: torch.Tensor, layout: Layout, shape: Shape, block: int, saves: bool,
    out: torch.Tensor, dqkv: torch.Tensor,
) -> None:  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_arrangement, "QUERY_BLOCK", block)
        arrangement = arrange(layout, shape, CPU)
    saved = torch.empty(arrangement.scores, dtype=qkv.dtype) if saves else None
    attend_rows(qkv, arrangement, shape, out, saved, Scratch())
    attend_rows_backward(dout, qkv, arrangement, shape, dqkv, saved, Scratch())


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("layout", [Layout(37, (20, 0, 61, 5)), Layout(0, (3, 90)), Layout(70, ())])
def test_compiled_attention_does_not_depend_on_threads(way: str, layout: Layout, size: int):
    if way == "torch":
        pytest.skip("compiled attention is looked at")
    shape, total = Shape(6, 3, size, size**-0.5, None), layout.prefix + sum(layout.suffixes)
    qkv, dout = random(total, shape.vectors * size), random(total, 6 * size, seed=1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows, out, dqkv = segments(layout, shape), torch.empty_like(dout), torch.empty_like(qkv)
            attend(qkv, rows, shape, out, Scratch())
            attend_backward(dout, qkv, rows, shape, dqkv, Scratch())
            found.append((out, dqkv))
    finally:
        torch.set_num_threads(before)
    for out, dqkv in found[1:]:
        assert torch.equal(out, found[0][0])
        # Sums over rows that share a prefix are added thread by thread.
        assert torch.allclose(dqkv, found[0][1], rtol=1e-12, atol=1e-13)
    q, k, v = (t.clone().requires_grad_() for t in qkv.split([6 * size, 3 * size, 3 * size], 1))
    wanted = plain_attention(q, k, v, layout, shape)
    wanted.backward(dout)
    assert torch.allclose(found[0][0], wanted.detach(), rtol=1e-10, atol=1e-12)
    assert torch.allclose(found[0][1], torch.cat([q.grad, k.grad, v.grad], 1), rtol=1e-9, atol=1e-11)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(costs=st.lists(st.integers(1, 300), min_size=1, max_size=12), threads=st.integers(1, 5))
def test_tasks_are_shared_out_whole_and_evenly(costs: list[int], threads: int):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        rows = segments(Layout(0, tuple(costs)), Shape(6, 3, 8, 1.0, None))
    finally:
        torch.set_num_threads(before)
    assert sorted(rows.tasks.tolist()) == list(range(3 * len(costs)))
    load = [0.0] * threads
    for task, owner in zip(rows.tasks.tolist(), rows.owners.tolist(), strict=True):
        load[owner] += costs[task // 3] ** 2 / 2
    # Graham 1969, "Bounds on Multiprocessing Timing Anomalies": largest first is within a third of the best.
    least = max(max(costs) ** 2 / 2, sum(3 * cost**2 / 2 for cost in costs) / threads)
    assert max(load) <= least * 4 / 3 + max(costs) ** 2 / 2


def test_swiglu_and_its_gradient():
    gate, up, da = random(5, 7), random(5, 7, seed=1), random(5, 7, seed=2)
    leaves, out, dup = (
        [t.clone().requires_grad_() for t in (gate, up)],
        torch.empty_like(gate),
        torch.empty_like(up),
    )
    wanted = leaves[0] * torch.sigmoid(leaves[0]) * leaves[1]
    wanted.backward(da)
    swiglu(gate, up, out)
    assert torch.allclose(out, wanted.detach(), rtol=1e-12)
    swiglu_backward(da.clone(), gate, up, dup)
    for mine, leaf in zip((gate, dup), leaves, strict=True):
        assert leaf.grad is not None
        assert torch.allclose(mine, leaf.grad, rtol=1e-10)


def test_rotation_and_its_transpose():
    heads, angle, dy = random(6, 2, 8), random(6, 1, 8, seed=1), random(6, 2, 8, seed=2)
    cos, sin = angle.cos(), angle.sin()
    leaf = heads.clone().requires_grad_()
    wanted = leaf * cos + torch.cat([-leaf[..., 4:], leaf[..., :4]], -1) * sin
    wanted.backward(dy)
    rotate(heads, cos, sin, Scratch())
    assert torch.allclose(heads, wanted.detach(), rtol=1e-12, atol=1e-14)
    rotate_backward(dy, cos, sin, Scratch())
    assert leaf.grad is not None
    assert torch.allclose(dy, leaf.grad, rtol=1e-12, atol=1e-14)


def test_rms_norm_adds_its_gradient():
    # Statistics are in float32, as in transformers; the formula in float64 tells how far that is.
    x, weight, dh = random(5, 16), random(16, seed=1).requires_grad_(), random(5, 16, seed=2)
    leaf = x.clone().requires_grad_()
    wanted = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5) * weight
    wanted.backward(dh)
    assert weight.grad is not None
    wanted_weight, weight.grad = weight.grad, None
    out = torch.empty_like(x)
    inverse = rms_norm(x, weight.detach(), 1e-5, out)
    dx = torch.ones_like(x)
    rms_norm_backward(dh.clone(), x, inverse, weight, dx, Scratch())
    assert torch.allclose(out, wanted.detach(), rtol=1e-6, atol=1e-6)
    assert leaf.grad is not None
    assert torch.allclose(dx - 1, leaf.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose(weight.grad, wanted_weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropped", [None, [0, 3, 11, 29]])
def test_layers_of_a_group_share_a_mask(dropped: list[int] | None):
    x, biases = random(6, 5), [random(4, seed=9).requires_grad_(), None]
    weights = [random(4, 5, seed=1), random(3, 5, seed=2)]
    if dropped is None:
        weights = [weight.requires_grad_() for weight in weights]
    a = [random(2, 5, seed=3).requires_grad_(), random(1, 5, seed=4).requires_grad_()]
    b = [random(4, 2, seed=5).requires_grad_(), random(3, 1, seed=6).requires_grad_()]
    dys = [random(6, 4, seed=7), random(6, 3, seed=8)]
    group = [Linear(weights[i], biases[i], Adapter(a[i], b[i], scale=0.5 + i, dropout=0.2)) for i in range(2)]
    mask = torch.ones(30, dtype=torch.float64)
    if dropped is not None:
        mask[dropped] = 0
        mask /= 0.8
    leaf = x.clone().requires_grad_()
    wanted = []
    for i in range(2):
        low = (leaf * mask.view(6, 5)) @ a[i].t() @ b[i].t() * (0.5 + i)
        wanted.append(leaf @ weights[i].t() + low + (biases[i] if biases[i] is not None else 0))
    (3 * sum((y * dy).sum() for y, dy in zip(wanted, dys, strict=True))).backward()
    trained = [p for p in (*weights, *a, *b, biases[0]) if p is not None and p.requires_grad]
    gradients = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    outs = [torch.empty(6, 4, dtype=torch.float64), torch.empty(6, 3, dtype=torch.float64)]
    places = None if dropped is None else torch.tensor(dropped)
    scratch = Scratch()
    state = project(x, group, outs, places, scratch)
    dx = torch.empty_like(x)
    seen = x if places is None else x.reshape(-1).index_fill(0, places, 0).view(6, 5)
    project_backward(dys, seen, group, state, scratch, dx, scale=3.0)
    for mine, theirs in zip([*outs, dx], [*wanted, leaf.grad], strict=True):
        assert torch.allclose(mine, theirs.detach(), rtol=1e-10, atol=1e-12)
    for p, gradient in zip(trained, gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_the_head_in_chunks_and_losses_too_large_for_a_probability(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tunesmith.models.kernels.head._CHUNK", 4)
    hidden, weight = random(11, 6), random(9, 6, seed=1).mul_(3).requires_grad_()
    targets = torch.arange(11) % 9
    hidden[5] = weight.detach()[0] * 200  # its target, 5, has a probability that underflows
    leaf = hidden.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf @ weight.t(), targets, reduction="none")
    assert float(wanted[5].detach()) > 800
    (wanted.sum() * 0.3).backward()
    gradient, weight.grad = weight.grad, None
    losses, dhidden = head_losses(hidden, targets, Linear(weight), Scratch(), gradient_scale=0.3)
    assert torch.allclose(losses, wanted.detach(), rtol=1e-10)
    assert dhidden is not None
    assert leaf.grad is not None
    assert torch.allclose(dhidden, leaf.grad, rtol=1e-9, atol=1e-12)
    assert torch.allclose(weight.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_drawn_places_are_independent_bernoulli_trials(rate: float):
    torch.manual_seed(0)
    size = 200_000
    drawn = draw_dropped(size, rate)
    assert bool((drawn.diff() > 0).all())
    assert int(drawn[0]) >= 0
    assert int(drawn[-1]) < size
    sigma = math.sqrt(size * rate * (1 - rate))
    assert abs(len(drawn) - size * rate) < 5 * sigma
    mask = np.zeros(size)
    mask[drawn.numpy()] = 1
    for lag in (1, 2, 7):
        pairs = float((mask[lag:] * mask[:-lag]).mean())
        assert abs(pairs - rate**2) < 6 * math.sqrt(rate**2 / size)
    quarters = mask.reshape(4, -1).mean(1)
    assert np.abs(quarters - rate).max() < 5 * math.sqrt(rate * (1 - rate) * 4 / size)


def test_dropout_at_its_ends():
    assert len(draw_dropped(100, 0.0)) == 0
    assert draw_dropped(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert len(draw_dropped(0, 0.5)) == 0


def test_scratch_keeps_the_largest_buffer_of_a_name():
    scratch = Scratch()
    like = torch.zeros(1)
    first = scratch.take("a", (4, 5), like)
    assert scratch.take("a", (2, 3), like).data_ptr() == first.data_ptr()
    assert scratch.nbytes == 80
    scratch.take("a", (6, 5), like)
    scratch.take("b", (1,), like.double())
    assert scratch.nbytes == 120 + 8
