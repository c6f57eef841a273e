"""Models that are saved by other names or in other shapes than they have in memory come back all the same.

Mixture-of-experts models hold experts fused and save them one by one; GPT-NeoX calls its head otherwise in files.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from tiny_models import chatml_tokenizer, tiny_config
from tunesmith.models.method import read_trained, save_servable, servable_tensors
from tunesmith.training.state import named_trainable
from tunesmith.training.workers import write

IDS = torch.tensor([[5, 9, 31, 77, 20, 3]])
COMMON = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 2, "eos_token_id": 2,
    "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip
# Each with the name of a tensor that it has in a file only.
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "mixtral": (
        lambda: MixtralConfig(**COMMON, num_local_experts=4),
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=16),
        "model.layers.1.mlp.experts.3.down_proj.weight",
    ),
    "neox": (lambda: tiny_config("neox", tied=False), "embed_out.weight"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_trained_tensor_comes_back(kind, tmp_path):
    config, in_file = MODELS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    then = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    save_servable(model, "full", chatml_tokenizer(), tmp_path, "base", servable_tensors(model, "full"))
    assert in_file in load_file(tmp_path / "model.safetensors")
    assert in_file not in then
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    write(named_trainable(model), read_trained(model, "full", tmp_path))
    lost = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, then[name])]
    assert lost == []
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)
