"""The loop against a training written out by hand, in float64."""

import copy
import math
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from tiny_models import tiny_model
from tunesmith.data.order import step_rows
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import NonFiniteError
from tunesmith.models.batches import MicroBatches, packed_batches, padded_batches, prepare_packing
from tunesmith.models.passes import AutogradPasses, KernelPasses
from tunesmith.tracking.events import StepEvent
from tunesmith.training.loop import train_steps
from tunesmith.training.optim import adamw
from tunesmith.training.schedule import plan_steps

RATE = 1e-2
CPU = torch.device("cpu")


def make_rows(lengths: list[int], trained_from: list[int]) -> TokenizedRows:
    generator = np.random.default_rng(3)
    ids = np.concatenate([generator.integers(3, 400, n).astype(np.int32) for n in lengths])
    masks = [np.arange(n) >= start for n, start in zip(lengths, trained_from, strict=True)]
    return TokenizedRows(
        "rows.jsonl", "0" * 64, ids, np.concatenate(masks), np.concatenate([[0], np.cumsum(lengths)]), ("rows.jsonl",),
        np.zeros(len(lengths), np.int32), np.arange(1, len(lengths) + 1, dtype=np.int32),
    )  # fmt: skip


# Counts of trained tokens as unequal as they come: 1 to 25 a row.
ROWS = make_rows([26, 5, 9, 14, 3, 20, 7], [1, 4, 8, 2, 2, 19, 3])


def run(
    model: torch.nn.Module,
    *,
    token_budget: int = 64,
    micro_batches: MicroBatches | None = None,
    clip: float = 1.0,
    epochs: int = 2,
    rows: TokenizedRows = ROWS,
) -> list[StepEvent]:
    parameters = list(model.parameters())
    optimizer = adamw(parameters, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)
    return list(
        train_steps(
            AutogradPasses(model),
            parameters,
            rows,
            plan_steps(len(rows), 3, epochs, 1),
            optimizer,
            learning_rate_at=lambda step: RATE / step,
            max_grad_norm=clip,
            micro_batches=micro_batches or padded_batches(token_budget, 2, CPU),
            seed=7,
            started=time.perf_counter(),
        )
    )


def by_hand(model: torch.nn.Module, clip: float, epochs: int) -> list[float]:
    """One row at a time, gradients by autograd of the mean over the step, AdamW as its paper writes it."""
    parameters = list(model.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    losses, step = [], 0
    for epoch in range(1, epochs + 1):
        for chosen in step_rows(len(ROWS), 3, 7, epoch):
            step += 1
            tokens: list[torch.Tensor] = []
            for index in chosen:
                row = ROWS.row(index)
                ids = torch.tensor(row.ids.astype(np.int64))[None]
                logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
                picked = -logp[torch.arange(len(row.ids) - 1), ids[0, 1:]]
                tokens.append(picked[torch.from_numpy(row.trained[1:])])
            loss = torch.cat(tokens).mean()
            gradients = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
            scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            with torch.no_grad():
                for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                    g = g * scale
                    m.mul_(0.9).add_(g, alpha=0.1)
                    v.mul_(0.99).add_(g * g, alpha=0.01)
                    rate = RATE / step
                    p.mul_(1 - rate * 0.1)
                    p.sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8))
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_equals_a_training_written_out_by_hand(clip: float):
    model = tiny_model(dtype=torch.float64)
    twin = copy.deepcopy(model)
    events = run(model, token_budget=40, clip=clip)
    losses = by_hand(twin, clip, 2)
    assert [e.train_loss_batch for e in events] == pytest.approx(losses, rel=1e-6)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def test_the_split_into_micro_batches_never_changes_the_result():
    models = {budget: tiny_model(dtype=torch.float64) for budget in (1, 30, 60, 10_000)}
    events = {budget: run(model, token_budget=budget) for budget, model in models.items()}
    reference = events[10_000]
    for budget in (1, 30, 60):
        for one, other in zip(events[budget], reference, strict=True):
            assert one.train_loss_batch == pytest.approx(other.train_loss_batch, rel=1e-9)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
            assert (one.trained_tokens, one.real_tokens) == (other.trained_tokens, other.real_tokens)
        for ours, theirs in zip(models[budget].parameters(), models[10_000].parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_packed_rows_train_to_the_same_weights_as_padded_ones(budget: int):
    padded, packed = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    assert prepare_packing(packed, ROWS, 2)[0]
    wanted = run(padded, token_budget=10_000)
    found = run(packed, micro_batches=packed_batches(budget, CPU))
    for one, other in zip(found, wanted, strict=True):
        assert one.train_loss_batch == pytest.approx(other.train_loss_batch, rel=1e-9)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
    for ours, theirs in zip(packed.parameters(), padded.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_counts_rows_steps_and_tokens():
    events = run(tiny_model(), token_budget=64)
    assert [(e.epoch, e.step) for e in events] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert sum(e.real_tokens for e in events) == 2 * (26 + 5 + 9 + 14 + 3 + 20 + 7)
    assert sum(e.trained_tokens for e in events) == 2 * (25 + 1 + 1 + 12 + 1 + 1 + 4)
    assert [e.learning_rate for e in events] == pytest.approx([RATE / s for s in range(1, 7)])


def test_the_same_run_twice_gives_the_same_bits():
    first, second = tiny_model(), tiny_model()
    assert [e.train_loss_batch for e in run(first, token_budget=40)] == [
        e.train_loss_batch for e in run(second, token_budget=40)
    ]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_non_finite_loss_stops_before_the_optimizer_steps_and_names_the_rows():
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[int(ROWS.row(0).ids[0])] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    one_step = make_rows([26, 5], [1, 4])
    with pytest.raises(NonFiniteError) as caught:
        run(model, token_budget=64, rows=one_step)
    assert "rows.jsonl:1" in str(caught.value)
    assert "loss is not finite" in str(caught.value)
    assert caught.value.exit_code == 3
    assert all(
        torch.equal(a, b.detach()) or torch.isnan(a).any()
        for a, b in zip(before, model.parameters(), strict=True)
    )
    assert all(p.grad is None for p in model.parameters())


def test_a_non_finite_gradient_stops_too():
    model = tiny_model()
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        run(model, token_budget=64)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kernels", [True, False])
def test_an_abandoned_step_leaves_all_as_after_the_step_before(kernels: bool):
    def trained(call: int | None) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Parameters and moments after step 1, or after a step 2 in which the given ``check`` says no."""
        model, calls, done = tiny_model(), 0, 0
        assert prepare_packing(model, ROWS, 2)[0]
        parameters = list(model.parameters())
        optimizer = adamw(parameters, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)

        def check() -> None:
            nonlocal calls
            calls += done == 1
            if calls == call:
                raise Stopped

        steps = train_steps(
            KernelPasses(model) if kernels else AutogradPasses(model), parameters, ROWS, plan_steps(7, 3, 2, 1),
            optimizer, learning_rate_at=lambda step: RATE / step, max_grad_norm=1.0,
            micro_batches=packed_batches(1, CPU), seed=7, started=0.0, check=check,
        )  # fmt: skip
        with suppress(Stopped):
            for _ in steps:
                done += 1
                if call is None:
                    break
        assert done == 1
        return parameters, [dict(optimizer.state[p]) for p in parameters]

    weights, moments = trained(None)
    each = 1 + 2 * len(tiny_model().model.layers)  # of a micro-batch, of which there are three
    for call in (1, 2, each, each + 1, 3 * each):
        others, their_moments = trained(call)
        assert all(map(torch.equal, weights, others))
        for one, other in zip(moments, their_moments, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", [KernelPasses, AutogradPasses])
def test_a_pass_asks_at_each_layer_whether_to_go_on(kind: type):
    model = tiny_model()
    assert prepare_packing(model, ROWS, 2)[0]
    (batch,) = packed_batches(10_000, CPU)(ROWS, range(len(ROWS)))
    calls: list[None] = []
    passes, layers = kind(model), len(model.model.layers)
    passes.losses(batch, lambda: calls.append(None))
    assert len(calls) == layers
    passes.train(batch, 1.0, lambda: calls.append(None))
    assert len(calls) == 3 * layers
    assert not any(layer._forward_hooks for layer in model.model.layers)
