"""Sizes of models and adapters without weights, against the models themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig, Qwen2MoeConfig

from tiny_models import save_tiny_model, tiny_config, tiny_model
from tunesmith.config.yaml_file import read_yaml_file
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.models.kernels.reading import read_decoder
from tunesmith.models.lora import attach, lora_config
from tunesmith.planned_adapter import skeleton, with_adapter
from tunesmith.planning.shapes import (
    ARCHITECTURES,
    adapter_shape,
    model_shape,
    shape_folder,
    shipped_shapes,
    stored_numbers,
    without_memory,
)


def bare(folder: Path, kind: str = "llama", *, tied: bool = True) -> BaseFolder:
    """A folder with nothing but config.json."""
    tiny_config(kind, tied=tied).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return BaseFolder("tiny", folder, None)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_count_is_the_real_models(tmp_path: Path, kind: str, tied: bool):
    shape = model_shape(skeleton(bare(tmp_path, kind, tied=tied)), "tiny")
    real = tiny_model(kind, tied=tied)
    assert shape.parameters == sum(p.numel() for p in real.parameters())


def test_sizes_of_a_tiny_llama_by_hand(tmp_path: Path):
    shape = model_shape(skeleton(bare(tmp_path, tied=False)), "tiny")
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # q, o; k, v; gate, up, down
    assert shape.matrices == 2 * layer
    assert shape.head == 400 * 32
    assert shape.parameters == 2 * (layer + 2 * 32) + 2 * 400 * 32 + 32
    assert (shape.layers, shape.width, shape.queries, shape.keys, shape.inner) == (2, 32, 32, 16, 64)
    assert shape.is_gated
    assert shape.largest == 400 * 32


def test_a_neox_is_not_gated(tmp_path: Path):
    shape = model_shape(skeleton(bare(tmp_path, "neox")), "tiny")
    assert not shape.is_gated
    assert shape.keys == shape.queries == 32


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 16, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "use_dora": True, "target_modules": ["o_proj"]},
        {"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_the_adapters_count_is_pefts(tmp_path: Path, settings: dict[str, object]):
    model = with_adapter(bare(tmp_path, tied=False), settings, "lora_config")
    assert all(p.device.type == "meta" for p in model.parameters())
    real = attach(m := tiny_model(tied=False), lora_config(settings, m, "lora_config"), 0, "lora_config")
    assert adapter_shape(model, 2).parameters == real.get_nb_trainable_parameters()[0]


def test_an_adapter_by_hand(tmp_path: Path):
    base = bare(tmp_path, tied=False)
    adapter = adapter_shape(with_adapter(base, {"r": 4, "lora_dropout": 0.1}, "lora_config"), 2)
    per_layer = 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert adapter.matrices == 2 * per_layer
    assert adapter.head == 4 * 432
    assert adapter.parameters == 2 * per_layer + 2 * 4 * 432
    assert adapter.layer_inputs == 6 * 32 + 64
    assert adapter.layer_ranks == 7 * 4
    assert adapter.dropout == 0.1
    plain = get_peft_model(tiny_model(tied=False), LoraConfig(r=4, target_modules=["q_proj"]))
    some = adapter_shape(with_adapter(base, {"r": 4, "target_modules": ["q_proj"]}, "x"), 2)
    assert some.parameters == plain.get_nb_trainable_parameters()[0] == 2 * 4 * 64
    assert (some.head, some.layer_inputs) == (0, 32)


def test_peft_refuses_before_anything_is_planned(tmp_path: Path):
    with pytest.raises(ConfigError, match="no layer of this model is called q_prj"):
        with_adapter(bare(tmp_path), {"target_modules": ["q_prj"]}, "lora_config")


def test_shipped_shapes_have_the_published_counts(tmp_path: Path):
    entries = read_yaml_file(ARCHITECTURES, "architectures.yaml").values
    assert entries["meta-llama/Meta-Llama-3-8B"]["parameters"] == 8_030_261_248
    for name, entry in entries.items():
        with shape_folder(name) as base:
            assert model_shape(skeleton(base), name).parameters == entry["parameters"], name
        assert not base.path.exists()
    assert len(shipped_shapes()) == len(entries) + sum(len(entry["names"]) for entry in entries.values())


def test_a_folder_goes_before_a_shipped_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "meta-llama/Meta-Llama-3-8B")
    with shape_folder("meta-llama/Meta-Llama-3-8B") as base:
        assert stored_numbers(base) == sum(p.numel() for p in tiny_model().parameters())
    with pytest.raises(ModelError, match="no such model folder"), shape_folder("./nothing"):
        pass


def test_without_memory_a_model_reads_like_a_loaded_one(tmp_path: Path):
    model = without_memory(with_adapter(bare(tmp_path), {"r": 4}, "lora_config"))
    decoder = read_decoder(model)
    real = read_decoder(attach(m := tiny_model(), lora_config({"r": 4}, m, "x"), 0, "x"))
    assert [len(layer.qkv[0].weight) for layer in decoder.layers] == [32, 32]
    assert decoder.head.weight is decoder.embeddings.weight  # tied, as in the file
    assert decoder.layers[0].down.adapter.a.shape == real.layers[0].down.adapter.a.shape
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) <= 4 * len(list(model.parameters()))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_of_a_mixture_of_experts_a_token_is_multiplied_with_those_it_goes_to():
    shape = model_shape(meta(MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=8)), "tiny")
    attention, expert = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    assert shape.matrices == 2 * (attention + 2 * expert)  # two experts a token
    assert shape.parameters == 2 * (attention + 8 * expert + 8 * 32 + 2 * 32) + 2 * 64 * 32 + 32
    assert (shape.inner, shape.routed) == (2 * 48, 2)
    assert shape.is_gated
    assert shape.largest == attention + 8 * expert + 8 * 32 + 2 * 32


def test_layers_without_experts_and_shared_experts_count_as_what_they_are():
    config = Qwen2MoeConfig(
        **SMALL, intermediate_size=80, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=4,
        num_experts_per_tok=2, mlp_only_layers=[0],
    )  # fmt: skip
    shape = model_shape(meta(config), "tiny")
    plain, shared, expert = (3 * 32 * width for width in (80, 40, 24))
    attention = 2 * 32 * 32 + 2 * 32 * 16
    # A shared expert has a gate of one number.
    assert shape.matrices == 2 * attention + plain + shared + 32 + 2 * expert
    assert shape.inner == (80 + 40 + 2 * 24) / 2
    assert shape.routed == 1  # two in one of two layers


def test_mixtures_that_are_not_understood_say_what_of_them_is_not():
    config = MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=8)
    model = meta(config)
    vars(model.config)["num_experts_per_tok"] = None  # past the check of its type
    with pytest.raises(ModelError, match=r"mixture of experts in numbers that config\.json does not tell"):
        model_shape(model, "tiny")
    plain = tiny_model()
    plain.config.num_experts = 4
    with pytest.raises(ModelError, match="mixture of experts in a form that plan does not know"):
        model_shape(plain, "tiny")


def test_a_model_without_attention_is_refused_in_one_line():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="has no list of layers with attention and a head"):
        model_shape(meta(config), "tiny")


def test_a_size_that_is_told_for_each_layer_counts_as_the_largest():
    model = tiny_model()
    vars(model.config)["intermediate_size"] = [64, 96]  # as Gemma 3n's
    assert model_shape(model, "tiny").inner == 96


def test_damaged_files_are_refused(tmp_path: Path):
    base = bare(tmp_path)
    assert stored_numbers(base) is None
    (tmp_path / "model.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        stored_numbers(base)
