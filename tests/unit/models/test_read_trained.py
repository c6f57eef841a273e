"""What a checkpoint holds comes back under the names that it is computed with, or it is said that it does not."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tiny_models import tiny_model
from tunesmith.errors import CheckpointError
from tunesmith.models.method import read_trained, servable_tensors
from tunesmith.training.state import named_trainable


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(5)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        )
    )  # fmt: skip


def test_experts_that_are_saved_one_by_one_and_computed_together_come_back(tmp_path: Path):
    model = mixtral()
    model.save_pretrained(tmp_path, state_dict=servable_tensors(model, "full"))
    found = read_trained(model, "full", tmp_path)
    experts = [name for name in found if "experts" in name]
    assert experts
    for name, tensor in named_trainable(model).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_to_save_are_the_file_that_transformers_writes(tmp_path: Path, tied: bool):
    model = tiny_model(tied=tied)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours", state_dict=servable_tensors(model, "full"))
    plain, ours = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "ours"))
    assert plain == ours


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    model = tiny_model(tied=True)
    tiny_model("neox").save_pretrained(tmp_path / "neox")
    with pytest.raises(CheckpointError, match=r"neox: has no model\.embed_tokens\.weight; use a checkpoint"):
        read_trained(model, "full", tmp_path / "neox")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_trained(model, "lora", tmp_path / "nothing")
