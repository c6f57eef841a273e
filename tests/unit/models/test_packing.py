"""Packed rows with a shared prefix against each row alone: losses and gradients, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig

from tiny_models import tiny_model
from token_rows import token_rows
from tunesmith.data.packing import pack_rows, shared_prefix, split_packed
from tunesmith.data.rendering import TokenizedExample
from tunesmith.data.rows import TokenizedRows
from tunesmith.models.batches import prepare_packing
from tunesmith.models.loss import token_losses
from tunesmith.models.packed_attention import NAME
from tunesmith.models.probe import probe_rows

CPU = torch.device("cpu")
PREFIX = [7, 8, 9, 10, 11]


def row(tail: list[int], trained_from: int, prefix: list[int] = PREFIX) -> TokenizedExample:
    """``trained_from`` counts from the start of the tail."""
    ids = np.array([*prefix, *tail], np.int32)
    return TokenizedExample(ids, np.arange(len(ids)) >= len(prefix) + trained_from)


ROWS = [row([20, 21, 22, 23], 2), row([30], 0), row([40, 41, 42, 43, 44, 45, 46], 4), row([50, 51], 1)]


def as_split(rows: list[TokenizedExample]) -> TokenizedRows:
    return token_rows([(r.ids.tolist(), r.trained.tolist()) for r in rows])


def alone(model: torch.nn.Module, rows: list[TokenizedExample]) -> torch.Tensor:
    """Plain Hugging Face forward of one row at a time, standard cross-entropy, summed."""
    total = torch.zeros((), dtype=torch.float64)
    for one in rows:
        ids = torch.from_numpy(one.ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        picked = torch.log_softmax(logits, -1)[torch.arange(len(one.ids) - 1), ids[0, 1:]]
        total = total - picked[torch.from_numpy(one.trained[1:])].sum()
    return total


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def mistral_with_a_short_window() -> torch.nn.Module:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def untied() -> torch.nn.Module:
    return tiny_model(tied=False, dtype=torch.float64)


MODELS = {
    "llama": lambda: tiny_model(dtype=torch.float64),
    "untied": untied,
    "qwen3": lambda: tiny_model("qwen3", dtype=torch.float64),
    "neox": lambda: tiny_model("neox", dtype=torch.float64),
    "sliding window": mistral_with_a_short_window,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lora", [False, True])
def test_losses_and_every_gradient_equal_those_of_rows_alone(name: str, lora: bool):
    model = MODELS[name]()
    if lora:
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        if name in ("llama", "untied"):
            targets = ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
            config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
    wanted_loss = alone(model, ROWS)
    wanted = gradients(model, wanted_loss)
    packs, reason = prepare_packing(model, as_split(ROWS), 2)
    assert packs, reason
    batch = pack_rows(ROWS, CPU)
    assert batch.layout.prefix == len(PREFIX)
    losses = token_losses(model, batch)
    assert len(losses) == batch.trained_tokens == 2 + 1 + 3 + 1
    assert float(losses.sum().detach()) == pytest.approx(float(wanted_loss.detach()), rel=1e-9)
    for key, value in gradients(model, losses.sum()).items():
        assert float((value - wanted[key]).norm()) <= 1e-6 * float(wanted[key].norm()) + 1e-12, key


def test_a_token_changed_in_one_row_leaves_the_other_rows_losses_bit_equal():
    model = tiny_model(dtype=torch.float64)
    prepare_packing(model, as_split(ROWS), 2)
    with torch.no_grad():
        before = token_losses(model, pack_rows(ROWS, CPU))
        changed = [row([20, 99, 22, 23], 2), *ROWS[1:]]
        after = token_losses(model, pack_rows(changed, CPU))
    assert not torch.equal(before[:2], after[:2])
    assert torch.equal(before[2:], after[2:])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(3, 9), max_size=6),
    st.lists(
        st.tuples(st.lists(st.integers(3, 9), min_size=1, max_size=6), st.integers(0, 5)),
        min_size=1,
        max_size=5,
    ),
)
def test_any_rows_pack_to_the_same_loss(prefix: list[int], tails: list[tuple[list[int], int]]):
    rows = [row(tail, min(start, len(tail) - 1), prefix) for tail, start in tails]
    rows = [r for r in rows if r.trained[1:].any()]
    for one in rows:
        one.trained[0] = False
    if not rows:
        return
    model = tiny_model(dtype=torch.float64)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        wanted = float(alone(model, rows))
        assert prepare_packing(model, as_split(ROWS), 2)[0]
        found = token_losses(model, pack_rows(rows, CPU))
    assert float(found.sum()) == pytest.approx(wanted, rel=1e-9)
    assert len(found) == sum(int(r.trained.sum()) for r in rows)


def test_the_prefix_ends_before_the_first_target_and_the_first_difference():
    assert shared_prefix([row([1, 2], 1), row([1, 3], 1)]) == 6
    assert shared_prefix([row([1, 2, 3], 1), row([1, 2, 4], 2)]) == 6  # the second tail token is a target
    assert shared_prefix([row([5], 0), row([6], 0)]) == 5
    assert shared_prefix([row([5, 6], 1)]) == 0  # nothing to share it with


def test_what_stands_behind_the_last_target_is_not_computed():
    ids = np.array([4, 5, 6, 7, 8], np.int32)
    trained = np.array([False, False, True, False, False])
    batch = pack_rows([TokenizedExample(ids, trained)], CPU)
    assert batch.input_ids.tolist() == [4, 5]
    assert batch.targets.tolist() == [6]
    assert (batch.real_tokens, batch.trained_tokens) == (5, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 120), st.integers(1, 6))
def test_groups_keep_to_the_budget_and_hold_every_row_once(tails: list[int], budget: int, most_rows: int):
    rows = as_split([row(list(range(20, 20 + n)), n - 1) for n in tails])
    chosen = list(range(len(tails)))
    groups = split_packed(rows, chosen, budget, most_rows)
    assert [i for group in groups for i in group] == chosen
    for group in groups:
        assert len(group) <= most_rows
        # The last token of a row is only predicted, so what is computed stays below the lengths.
        computed = len(pack_rows([rows.row(i) for i in group], CPU).input_ids)
        assert computed <= budget or len(group) == 1


def test_a_model_without_attention_trains_padded_and_says_so():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    packs, reason = prepare_packing(model, as_split(ROWS), 2)
    assert not packs
    assert reason.startswith("padded rows:")


def test_soft_capped_attention_is_not_packed_and_left_as_it_was():
    from transformers import Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_logit_softcapping=50.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    packs, reason = prepare_packing(model, as_split(ROWS), 2)
    assert not packs
    assert reason == "padded rows: this model's attention is eager"
    assert model.config._attn_implementation == "eager"


def test_a_prepared_model_still_answers_ordinary_calls():
    plain, prepared = tiny_model(), tiny_model()
    assert prepare_packing(prepared, as_split(ROWS), 2)[0]
    assert prepared.config._attn_implementation == NAME
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        assert torch.equal(
            plain(input_ids=ids, attention_mask=mask).logits,
            prepared(input_ids=ids, attention_mask=mask).logits,
        )
        assert torch.equal(
            plain.generate(ids[:1], max_new_tokens=5, do_sample=False),
            prepared.generate(ids[:1], max_new_tokens=5, do_sample=False),
        )


def test_long_rows_are_probed_by_their_opening_and_their_last_targets():
    ids = np.arange(300, dtype=np.int32)
    trained = (ids >= 100) & (ids < 280)
    found = probe_rows(as_split([TokenizedExample(ids, trained), row([5, 6], 1)]))
    assert found[0].ids.tolist() == [*PREFIX, 5, 6]
    assert found[1].ids.tolist() == [*range(24), *range(240, 280)]
    assert found[1].trained.tolist() == [False] * 24 + [True] * 40
