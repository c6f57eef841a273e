"""LoRA through PEFT: what is trained, what is saved, and that plain PEFT computes the same."""

import inspect
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tiny_models import tiny_model
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.lora import (
    attach,
    continue_adapter,
    default_targets,
    lora_config,
    merge,
    save_adapter,
    without_fresh_adapter,
)
from tunesmith.models.method import count_parameters, read_trained, trainable_parameters
from tunesmith.training.state import named_trainable
from tunesmith.training.workers import write

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
SETTINGS: list[dict] = [
    {},
    {"use_dora": True, "target_modules": ALL[:7]},
    {"use_rslora": True},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*mlp\.(up|down)_proj"},
]
IDS = torch.tensor([[5, 9, 31, 77, 20, 3]])


def tuned(model: torch.nn.Module, **settings: object) -> PeftModel:
    """A model with an adapter that does something: B is not zero."""
    found = attach(model, lora_config(settings, model, "lora_config"), seed=1, place="lora_config")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(found):
            parameter.normal_(std=0.05)
    return found.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_documented_defaults_are_used_for_what_the_file_leaves_out():
    config = lora_config({}, tiny_model(), "lora_config")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    assert sorted(config.target_modules) == sorted(ALL)
    assert lora_config({"r": 4}, tiny_model(), "x").lora_alpha == 16


def test_default_targets_follow_the_architecture():
    assert set(default_targets(tiny_model("neox"))) == {
        "embed_in", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head",
    }  # fmt: skip


def test_trainable_parameters_are_those_of_the_formula():
    model = tuned(tiny_model(), r=4)
    # r (in + out) a layer: hidden 32, heads 4 x 8, key-value heads 2 x 8, MLP 64, vocabulary 400.
    a_layer = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    wanted = 2 * a_layer + 2 * 4 * (400 + 32)
    assert count_parameters(model)[0] == wanted


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("extra", SETTINGS, ids=str)
def test_a_saved_adapter_loads_in_plain_peft_with_equal_logits(tmp_path: Path, tied: bool, extra: dict):
    model = tuned(tiny_model(tied=tied), **extra)
    wanted = logits(model)
    save_adapter(model, tmp_path, "some-base")
    plain = PeftModel.from_pretrained(tiny_model(tied=tied), tmp_path).eval()
    assert torch.equal(logits(plain), wanted)
    ours = continue_adapter(tiny_model(tied=tied), tmp_path, trainable=False).eval()
    assert torch.equal(logits(ours), wanted)
    assert not torch.allclose(logits(tiny_model(tied=tied)), wanted, atol=1e-4)


def test_the_adapter_file_holds_no_copy_of_an_embedding_layer(tmp_path: Path):
    model = tuned(tiny_model(tied=False), r=2)
    save_adapter(model, tmp_path, "some-base")
    adapter_bytes = 4 * count_parameters(model)[0]
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < adapter_bytes * 1.5
    assert '"some-base"' in (tmp_path / "adapter_config.json").read_text()


def test_a_target_that_matches_nothing_is_an_error_that_lists_what_exists():
    with pytest.raises(ConfigError) as caught:
        lora_config({"target_modules": ["q_proj", "value_proj"]}, tiny_model(), "my.yaml line 3: lora_config")
    text = str(caught.value)
    assert "my.yaml line 3" in text
    assert "value_proj" in text
    assert "v_proj" in text
    assert "down_proj" in text


@pytest.mark.parametrize("given", [{"target_modules": []}, {"task_type": "SEQ_CLS"}])
def test_settings_that_would_train_something_else_are_refused(given: dict):
    with pytest.raises(ConfigError, match=next(iter(given))):
        lora_config(given, tiny_model(), "my.yaml line 3: lora_config")


def test_what_peft_refuses_is_an_error_of_ours():
    with pytest.raises(ConfigError, match="PEFT"):
        lora_config({"target_modules": ".*q_proj", "layers_to_transform": [1]}, tiny_model(), "x")
    model = tiny_model()
    with pytest.raises(ConfigError, match="PEFT"):
        attach(model, lora_config({"r": -1}, model, "x"), 0, "x")


@pytest.mark.parametrize("tied", [True, False])
def test_merged_computes_what_unmerged_did(tied: bool):
    model = tuned(tiny_model(tied=tied))
    wanted = logits(model)
    merged = merge(model)
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    assert merged.config.tie_word_embeddings is False
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_tied_base_stays_tied_when_neither_end_is_adapted():
    merged = merge(tuned(tiny_model(tied=True), target_modules=["q_proj", "up_proj"]))
    assert merged.config.tie_word_embeddings is True
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path):
    save_adapter(tuned(tiny_model("neox")), tmp_path, "b")
    with pytest.raises(ModelError, match=r"does not fit|no place|lacks"):
        continue_adapter(tiny_model(), tmp_path, trainable=False)


def test_a_pickled_adapter_is_never_opened(tmp_path: Path):
    save_adapter(tuned(tiny_model()), tmp_path, "b")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        continue_adapter(tiny_model(), tmp_path, trainable=False)


@pytest.mark.parametrize("extra", SETTINGS, ids=str)
def test_a_checkpoint_is_read_into_the_tensors_that_were_trained(tmp_path: Path, extra: dict):
    model = tuned(tiny_model(), **extra)
    wanted = logits(model)
    save_adapter(model, tmp_path, "b")
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.zero_()
    write(named_trainable(model), read_trained(model, "lora", tmp_path))
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_are_read(tmp_path: Path, tied: bool):
    model = tiny_model(tied=tied)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    write(named_trainable(model), read_trained(model, "full", tmp_path))
    assert torch.equal(logits(model), wanted)


def test_a_fresh_adapter_adds_nothing_and_can_be_left_out():
    base = logits(tiny_model())
    model = tiny_model()
    fresh = attach(model, lora_config({}, model, "x"), seed=1, place="x").eval()
    assert torch.equal(logits(fresh), base)
    with without_fresh_adapter(fresh, is_fresh=True):
        assert torch.equal(logits(fresh), base)


def test_the_seed_decides_the_initial_adapter():
    def initial(seed: int) -> torch.Tensor:
        model = tiny_model()
        found = attach(model, lora_config({}, model, "x"), seed=seed, place="x")
        return next(p for n, p in found.named_parameters() if "lora_A" in n).detach()

    assert torch.equal(initial(1), initial(1))
    assert not torch.equal(initial(1), initial(2))


def test_continuing_keeps_the_adapter_trainable(tmp_path: Path):
    save_adapter(tuned(tiny_model()), tmp_path, "b")
    again = continue_adapter(tiny_model(), tmp_path, trainable=True)
    assert len(trainable_parameters(again)) == len(trainable_parameters(tuned(tiny_model())))
    assert inspect.signature(again.get_base_model().forward).parameters["input_ids"]
