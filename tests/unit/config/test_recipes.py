"""The shipped recipes: facts of LLMForge's, and what must hold of each."""

from pathlib import Path

import pytest
import yaml

from recipe_parts import ARCHITECTURES, CONFIGS, recipe_names
from tunesmith.config.deepspeed_file import read_deepspeed
from tunesmith.config.load import load_config
from tunesmith.config.schema import DeepSpeed, LoraMethod

# Model, GPUs, context, rows per device, rate, sharding: from LLMForge's shipped files, save where a recipe's
# comment says that it was chosen here.
FACTS = {
    "llama-3-8b-lora": (16, "A10G", 512, 8, 1e-4, "zero_3_offload_optim+param"),
    "llama-3-8b-full-parameter": (16, "A10G", 512, 8, 1e-5, "zero_3_offload_optim+param"),
    "llama-3-8b-lora-4xa10g": (4, "4xA10G", 512, 2, 1e-4, "zero_2"),
    "llama-3-8b-continue-from-checkpoint": (16, "A10G", 512, 16, 1e-4, "zero_3_offload_optim+param"),
    "llama-3-70b-lora": (8, "A100-80G", 4096, 2, 1e-4, "zero_3_offload_optim+param"),
    "llama-3-70b-lora-32xa10g": (32, "A10G", 4096, 1, 1e-4, "zero_3_offload_optim+param"),
    "llama-3-70b-full-parameter": (16, "A100-80G", 4096, 2, 5e-6, "zero_3_hpz"),
    "llama-3-70b-full-parameter-8xh100": (8, "H100", 1024, 12, 1e-5, "zero_3_offload_optim"),
    "llama-3-70b-full-parameter-32xa10g": (32, "4xA10G", 4096, 8, 5e-6, "zero_3_offload_optim+param"),
    "mistral-7b-lora": (4, "4xA10G", 512, 4, 1e-4, "zero_2"),
    "mistral-7b-full-parameter": (16, "A10G", 512, 4, 5e-6, "zero_3_offload_optim+param"),
    "mixtral-8x7b-lora": (16, "A10G", 4096, 8, 1e-4, "zero_3"),
    "mixtral-8x7b-full-parameter": (32, "A10G", 512, 8, 5e-6, "zero_3_offload_optim"),
    "gemma-2-9b-lora": (8, "A10G", 512, 4, 1e-4, "zero_3_offload_optim+param"),
    "gemma-2-27b-lora": (8, "A100-80G", 512, 8, 1e-4, "zero_3_offload_optim+param"),
    "llama-guard-2-8b-lora": (4, "4xA10G", 4096, 2, 1e-4, "zero_3_offload_optim+param"),
}


def test_every_recipe_has_its_facts_here() -> None:
    assert recipe_names() == sorted(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_says_what_is_known_of_it(name: str) -> None:
    devices, gpu, context, rows, rate, sharding = FACTS[name]
    config = load_config(f"{name}.yaml").config  # by its bare name, as a shipped file
    assert config.model.model_id in ARCHITECTURES
    assert config.model.context_length == context
    found = config.optimization
    assert (found.train_batch_size_per_device, found.learning_rate) == (rows, rate)
    assert config.cluster.num_devices == devices
    asked = [key.partition(":")[2] for key in config.cluster.worker_resources if ":" in key]
    assert asked == [gpu]
    assert isinstance(config.method, LoraMethod) == ("full-parameter" not in name)
    assert config.cluster.deepspeed == DeepSpeed(config_path=f"deepspeed_configs/{sharding}.json")
    assert read_deepspeed(f"deepspeed_configs/{sharding}.json").stage in (2, 3)


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_says_how_its_weights_are_split_and_changes_nothing_else(name: str) -> None:
    loaded = load_config(f"{name}.yaml")
    stage = read_deepspeed(f"deepspeed_configs/{FACTS[name][5]}.json").stage
    (said,) = [notice for notice in loaded.notices if f"zero_optimization.stage {stage}: " in notice]
    assert said.endswith("gathered only while it is computed" if stage == 3 else "gathered for a whole pass")
    assert f"each of the {FACTS[name][0]} workers holds its share" in said
    assert all(setting.origin in ("default", *_lines_of(name)) for setting in loaded.settings)


def _lines_of(name: str) -> list[str]:
    count = len((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines())
    return [f"{name}.yaml line {line}" for line in range(1, count + 1)]


def test_the_pair_differs_in_method_and_rate_alone() -> None:
    pair = [
        yaml.safe_load((CONFIGS / f"llama-3-8b-{method}.yaml").read_text(encoding="utf-8"))
        for method in ("lora", "full-parameter")
    ]
    lora = pair[0].pop("lora_config")
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (8, 16, 0.05)
    assert {"embed_tokens", "lm_head"} < set(lora["target_modules"])
    assert [values.pop("learning_rate") for values in pair] == ["1e-4", "1e-5"]  # YAML 1.1 reads text here
    assert pair[0] == pair[1]


@pytest.mark.parametrize("name", FACTS)
def test_the_rows_that_a_recipe_names_are_shipped(name: str) -> None:
    data = load_config(f"{name}.yaml").config.data
    for path in (data.train_path, data.valid_path):
        assert path is not None
        assert (CONFIGS.parent / Path(path)).is_file()
