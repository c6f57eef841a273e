"""The comparison of what was saved with what the same steps give: nothing that is trained is left out."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from tiny_models import chatml_tokenizer, tiny_model
from tunesmith.errors import RunError
from tunesmith.models.lora import attach, lora_config
from tunesmith.models.method import save_servable, servable_tensors
from tunesmith.training.state import named_trainable, save_training_state, training_tensors
from tunesmith.verification import _compare_tensors


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, num_local_experts=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def saved(model, kind, folder):
    """A run's parts and optimizer, with a checkpoint of them in ``folder``."""
    trained = named_trainable(model)
    optimizer = torch.optim.AdamW(list(trained.values()))
    tensors = training_tensors(trained, optimizer, trained if kind == "lora" else {})
    save_servable(model, kind, chatml_tokenizer(), folder, "base", servable_tensors(model, kind))
    (folder / "training").mkdir()
    save_training_state(folder / "training", tensors)
    return SimpleNamespace(model=model, kind=kind), optimizer


@pytest.mark.parametrize(
    "make", [mixtral, lambda: tiny_model(tied=True), lambda: tiny_model("neox", tied=False)]
)
def test_every_trained_tensor_of_a_full_model_is_compared(make, tmp_path):
    model = make()
    parts, optimizer = saved(model, "full", tmp_path)
    assert _compare_tensors(parts, optimizer, tmp_path) >= 3 * len(named_trainable(model))
    for parameter in named_trainable(model).values():
        was = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        with pytest.raises(RunError, match="is not what the same steps give here"):
            _compare_tensors(parts, optimizer, tmp_path)
        with torch.no_grad():
            parameter.copy_(was)


def test_every_trained_tensor_and_moment_of_an_adapter_is_compared(tmp_path):
    base = tiny_model()
    model = attach(base, lora_config({"target_modules": ["q_proj"]}, base, "x"), seed=1, place="x")
    parts, optimizer = saved(model, "lora", tmp_path)
    trained = named_trainable(model)
    assert _compare_tensors(parts, optimizer, tmp_path) == 3 * len(trained)
    for parameter in trained.values():
        moments = optimizer.state[parameter]
        for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
            was = tensor.detach().clone()
            with torch.no_grad():
                tensor.fill_(7)
            with pytest.raises(RunError, match="is not what the same steps give here"):
                _compare_tensors(parts, optimizer, tmp_path)
            with torch.no_grad():
                tensor.copy_(was)
