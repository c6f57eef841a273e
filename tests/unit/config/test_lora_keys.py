"""The list of LoRA settings against the PEFT that is installed."""

import dataclasses

from peft import LoraConfig

from tunesmith.config.lora_keys import LORA_CONFIG_KEYS

# PEFT writes these into adapter_config.json by itself; a user who set them would describe another adapter.
FILLED_IN_BY_PEFT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config",
}  # fmt: skip


def test_the_list_is_what_peft_takes():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(LORA_CONFIG_KEYS) == fields - FILLED_IN_BY_PEFT
    assert fields >= FILLED_IN_BY_PEFT


def test_the_list_is_sorted_and_has_no_key_twice():
    assert list(LORA_CONFIG_KEYS) == sorted(set(LORA_CONFIG_KEYS))


def test_the_documented_set_is_known():
    assert {"r", "lora_alpha", "lora_dropout", "target_modules"} <= set(LORA_CONFIG_KEYS)
