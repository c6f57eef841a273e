"""Losses and gradients by hand against plain transformers and PEFT, one row at a time, in float64."""

import copy
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig, Qwen2Config

from tiny_models import tiny_model
from token_rows import token_rows
from tunesmith.data.packing import PackedBatch, pack_rows
from tunesmith.data.rendering import TokenizedExample
from tunesmith.data.rows import TokenizedRows
from tunesmith.models.batches import packed_batches, prepare_packing
from tunesmith.models.kernels.reading import UnreadableError, read_decoder
from tunesmith.models.passes import AutogradPasses, KernelPasses, choose_passes
from tunesmith.training.loop import train_steps
from tunesmith.training.optim import adamw
from tunesmith.training.schedule import plan_steps

CPU = torch.device("cpu")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL = [*LINEAR, "embed_tokens", "lm_head"]


def make_rows(seed: int = 0) -> list[TokenizedExample]:
    """Unequal lengths and trained counts behind a prefix of 12; token 2, the padding token, among them."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, 400, 12)
    rows = []
    for tail, untrained in ((20, 3), (7, 2), (33, 30), (33, 1), (15, 9), (3, 1), (1, 0)):
        ids = np.concatenate([prefix, rng.integers(2, 30, tail)]).astype(np.int32)
        rows.append(TokenizedExample(ids, np.arange(len(ids)) >= 12 + untrained))
    return rows


ROWS = make_rows()


def as_split(rows: list[TokenizedExample]) -> TokenizedRows:
    return token_rows([(r.ids.tolist(), r.trained.tolist()) for r in rows])


def tiny(config_class: type[PreTrainedConfig], **extra: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=2, **extra,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # made as ones and zeros, which would hide a missing factor
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


MODELS = {
    "llama": lambda: tiny_model(dtype=torch.float64),
    "untied": lambda: tiny_model(tied=False, dtype=torch.float64),
    "mistral": lambda: tiny(MistralConfig, head_dim=8, sliding_window=5),
    "qwen2": lambda: tiny(Qwen2Config),
}


def adapted(model: torch.nn.Module, targets: list[str], dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def prepared(name: str, method: str) -> torch.nn.Module:
    model = MODELS[name]()
    model = model if method == "full" else adapted(model, {"lora": LINEAR, "lora everywhere": ALL}[method])
    return model.eval()


def alone(model: torch.nn.Module, rows: list[TokenizedExample]) -> list[torch.Tensor]:
    """Token losses of plain forwards of one row at a time."""
    losses = []
    for one in rows:
        ids = torch.from_numpy(one.ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        picked = torch.log_softmax(logits, -1)[torch.arange(len(one.ids) - 1), ids[0, 1:]]
        losses.append(-picked[torch.from_numpy(one.trained[1:])])
    return losses


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name], parameter.grad = parameter.grad, None
    return found


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-12, name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["full", "lora", "lora everywhere"])
def test_losses_and_every_gradient_equal_those_of_rows_alone(name: str, method: str):
    model = prepared(name, method)
    wanted_losses = torch.cat(alone(model, ROWS))
    (wanted_losses.sum() / 77).backward()
    wanted = gradients(model)
    passes = KernelPasses(model)
    batch = pack_rows(ROWS, CPU)
    assert batch.layout.prefix == 12
    assert torch.allclose(passes.losses(batch), wanted_losses.detach(), rtol=1e-6, atol=0)
    total = passes.train(batch, 1 / 77).total
    assert total == pytest.approx(float(wanted_losses.detach().sum()), rel=1e-9)
    assert_close(gradients(model), wanted, 1e-6)


@pytest.mark.parametrize("method", ["full", "lora everywhere"])
def test_float32_stays_within_its_own_rounding(method: str):
    model = prepared("llama", method)
    wanted_losses = torch.cat(alone(model, ROWS))
    (wanted_losses.sum() / 77).backward()
    wanted = gradients(model)
    narrow = copy.deepcopy(model).float()
    total = KernelPasses(narrow).train(pack_rows(ROWS, CPU), 1 / 77).total
    assert total == pytest.approx(float(wanted_losses.detach().sum()), rel=1e-5)
    for name, gradient in gradients(narrow).items():
        assert float((gradient - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm()), name
        cosine = torch.cosine_similarity(gradient.double().flatten(), wanted[name].flatten(), dim=0)
        assert float(cosine) > 1 - 1e-7, name


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_of_any_size_and_no_prefix_add_up_to_the_same(method: str, size: int):
    model = prepared("untied", method)
    passes = KernelPasses(model)
    whole = passes.train(pack_rows(ROWS, CPU), 0.1).total
    wanted = gradients(model)
    parts = [ROWS[i : i + size] for i in range(0, len(ROWS), size)]
    total = sum(passes.train(pack_rows(part, CPU), 0.1).total for part in parts)
    assert total == pytest.approx(whole, rel=1e-9)
    assert_close(gradients(model), wanted, 1e-6)


def test_layers_computed_again_give_the_same_bits_with_dropout():
    model = adapted(MODELS["llama"](), ALL, dropout=0.3)
    found = []
    for again in (False, True):
        model.get_base_model().model.gradient_checkpointing = again
        assert read_decoder(model).saves_activations is not again
        torch.manual_seed(5)
        total = KernelPasses(model).train(pack_rows(ROWS, CPU), 1.0).total
        found.append((total, gradients(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_a_token_changed_in_one_row_leaves_the_other_rows_losses_bit_equal():
    model = prepared("llama", "full")
    before = KernelPasses(model).losses(pack_rows(ROWS, CPU))
    changed = ROWS[2].ids.copy()
    changed[20] = 399
    rows = [*ROWS[:2], TokenizedExample(changed, ROWS[2].trained), *ROWS[3:]]
    after = KernelPasses(model).losses(pack_rows(rows, CPU))
    counts = [int(r.trained.sum()) for r in ROWS]
    begin, end = sum(counts[:2]), sum(counts[:3])
    assert not torch.equal(before[begin:end], after[begin:end])
    assert torch.equal(before[:begin], after[:begin])
    assert torch.equal(before[end:], after[end:])


def test_dropout_scales_what_stays_and_hides_what_falls(monkeypatch: pytest.MonkeyPatch):
    """With the same mask put into PEFT's dropout, losses and gradients are the same."""
    model = adapted(tiny_model(tied=False, dtype=torch.float64), ["o_proj"], dropout=0.25)
    row = [ROWS[3]]
    batch: PackedBatch = pack_rows(row, CPU)
    # The last layer drops from the states of trained tokens alone: adapt the first layer only.
    for name, parameter in model.named_parameters():
        if "layers.1" in name and "lora" in name:
            parameter.data.zero_()
            parameter.requires_grad_(False)
    drawn = torch.arange(5, len(batch.input_ids) * 32, 7)
    monkeypatch.setattr(
        "tunesmith.models.kernels.layer.draw_dropped",
        lambda size, rate: drawn if size == len(batch.input_ids) * 32 else torch.empty(0, dtype=torch.int64),
    )
    total = KernelPasses(model).train(batch, 1.0).total
    found = gradients(model)

    class Mask(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones_like(x[0, : len(batch.input_ids)]).flatten()
            mask[drawn] = 0
            padded = torch.ones_like(x)
            padded[0, : len(batch.input_ids)] = mask.view(len(batch.input_ids), 32)
            return x * padded / 0.75

    model.get_base_model().model.layers[0].self_attn.o_proj.lora_dropout["default"] = Mask()
    wanted = torch.cat(alone(model, row)).sum()
    wanted.backward()
    assert total == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert_close(found, gradients(model), 1e-6)


def test_a_switched_off_adapter_is_not_computed():
    model = prepared("llama", "lora everywhere")
    batch = pack_rows(ROWS, CPU)
    passes = KernelPasses(model)
    with model.disable_adapter():
        without = passes.losses(batch)
    assert torch.allclose(without, KernelPasses(MODELS["llama"]()).losses(batch), rtol=1e-12)
    assert not torch.allclose(without, passes.losses(batch), rtol=1e-3)


@pytest.mark.parametrize("kind", ["neox", "qwen3"])
def test_other_decoders_train_by_autograd_and_say_why(kind: str):
    model = tiny_model(kind)
    rows = as_split(ROWS)
    packs, _ = prepare_packing(model, rows, 2)
    passes, reason = choose_passes(model, rows, packs=packs, autocast=None)
    assert isinstance(passes, AutogradPasses)
    assert "DecoderLayer" in reason or "Layer" in reason


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}]
)
def test_options_beyond_plain_lora_are_left_to_peft(options: dict[str, object]):
    model = get_peft_model(
        tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    )
    with pytest.raises(UnreadableError):
        read_decoder(model)


def test_fifty_steps_follow_peft_from_the_same_adapter():
    rows = as_split(make_rows(3))
    base = tiny_model().eval()
    base.set_attn_implementation("sdpa")
    models = [adapted(copy.deepcopy(base), LINEAR).float() for _ in range(2)]
    assert prepare_packing(models[0], rows, 2)[0]
    passes, reason = choose_passes(models[0], rows, packs=True, autocast=None)
    assert isinstance(passes, KernelPasses), reason
    parameters = [p for p in models[0].parameters() if p.requires_grad]
    events = train_steps(
        passes, parameters, rows, plan_steps(len(rows), len(rows), 50, 1),
        adamw(parameters, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0),
        learning_rate_at=lambda step: 1e-3, max_grad_norm=0.0, micro_batches=packed_batches(60, CPU), seed=1,
        started=time.perf_counter(),
    )  # fmt: skip
    ours = [event.train_loss_batch for event in events]
    theirs = []
    optimizer = torch.optim.AdamW(
        [p for p in models[1].parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    examples = [rows.row(i) for i in range(len(rows))]
    for _ in range(50):
        loss = torch.cat(alone(models[1], examples)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert ours[-1] < ours[0] - 0.25
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_memory_given_back_and_taken_again_changes_no_bit():
    model, batch = prepared("llama", "lora"), pack_rows(ROWS, CPU)
    passes = KernelPasses(model)
    wanted = passes.train(batch, 1.0).total, gradients(model)
    passes.reserve({"x in": 100_000})
    assert passes._scratch.nbytes >= 400_000
    passes.rest()
    assert passes._scratch.nbytes == 0
    assert passes.losses(batch).isfinite().all()
    assert passes._scratch.elements()["x in"] < 100_000  # an evaluation takes what it needs
    passes.rest()
    found = passes.train(batch, 1.0).total, gradients(model)
    assert passes._scratch.elements()["x in"] == 100_000
    assert found[0] == wanted[0]
    assert all(torch.equal(gradient, wanted[1][name]) for name, gradient in found[1].items())
