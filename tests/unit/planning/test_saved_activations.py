"""The formula of activations against what autograd keeps of a model of transformers in bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from tunesmith.data.packing import Layout
from tunesmith.models.lora import attach, lora_config
from tunesmith.models.packed_attention import NAME, register
from tunesmith.planning.formulae import activation_bytes
from tunesmith.planning.shapes import adapter_shape, model_shape

TOKENS = 256


def tiny(kind: Any, **sizes: int) -> Any:
    torch.manual_seed(0)
    config = kind(
        vocab_size=64, hidden_size=128, intermediate_size=448, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, **sizes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@contextmanager
def kept(model: Any) -> Iterator[dict[int, int]]:
    """Bytes by address of all that autograd keeps in the block, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    alive.clear()


def measured(model: Any) -> int:
    ids = torch.randint(0, 64, (1, TOKENS))
    is_lora = hasattr(model, "peft_config")
    plain = (model.get_base_model() if is_lora else model).train()
    plain.set_attn_implementation(NAME)
    rows = {"packing": Layout(0, (100, 156)), "attention_mask": ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)}
    with kept(model) as found, torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_lora):
        plain.model(ids, use_cache=False, **rows)
    return sum(found.values())


@pytest.mark.parametrize("dropout", [None, 0.0, 0.1])
def test_layers_keep_what_the_formula_says(dropout: float | None):
    register()
    model = tiny(LlamaConfig)
    shape, adapter, mask = model_shape(model, "tiny"), None, 0
    if dropout is not None:
        settings = {"r": 8, "lora_dropout": dropout, "target_modules": "all-linear"}
        model = attach(model, lora_config(settings, model, "x"), 0, "x")
        adapter = adapter_shape(model, shape.layers)
        # On a CPU torch keeps dropout's mask as float32, where a GPU keeps a byte.
        mask = 3 * shape.layers * TOKENS * adapter.layer_inputs if dropout else 0
    formula = activation_bytes(shape, adapter, TOKENS, False) + mask
    assert formula == pytest.approx(measured(model), rel=0.10)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_layers_of_experts_keep_what_the_formula_says(is_frozen: bool):
    register()
    model = tiny(MixtralConfig, num_local_experts=4)
    shape, adapter = model_shape(model, "tiny"), None
    if is_frozen:
        settings = {"r": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        model = attach(model, lora_config(settings, model, "x"), 0, "x")
        adapter = adapter_shape(model, shape.layers)
    assert activation_bytes(shape, adapter, TOKENS, False) == pytest.approx(measured(model), rel=0.10)
