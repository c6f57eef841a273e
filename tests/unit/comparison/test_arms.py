"""What ``--arms`` means."""

import pytest

from tunesmith.comparison.arms import parse_arms
from tunesmith.errors import ConfigError

DEFAULTS = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}


@pytest.mark.parametrize("config", [None, {}])
def test_full_and_lora_with_the_documented_defaults(config):
    full, lora = parse_arms(["full,lora"], config)
    assert (full.method, full.lora_config) == ("full", None)
    assert (lora.method, lora.lora_config) == ("lora", DEFAULTS)


def test_lora_takes_the_files_settings_and_a_variant_changes_them():
    given = {"r": 4, "target_modules": ["q_proj"]}
    _, lora, wide, shape = parse_arms(["full,lora,lora:r=64:alpha=128", "lora:dora:targets=all"], given)
    assert lora.lora_config == {**DEFAULTS, **given}
    assert wide.lora_config == {**DEFAULTS, **given, "r": 64, "lora_alpha": 128}
    assert wide.label == "LoRA, r 64, alpha 128"
    assert shape.lora_config == {**DEFAULTS, "r": 4, "use_dora": True}
    assert shape.label == "LoRA, DoRA, all layers"


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("q_proj+lm_head", ["q_proj", "lm_head"]),
        ("[q_proj,lm_head]", ["q_proj", "lm_head"]),
    ],
)
def test_targets(text, targets):
    _, arm = parse_arms([f"full,lora:targets={text}"], None)
    assert arm.lora_config["target_modules"] == targets


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("full,lroa", "closest is lora"),
        ("full,lora:rank=8", "no LoRA setting 'rank=8'"),
        ("full,lora:dorra", "closest is dora"),
        ("full:r=8,lora", "has no settings"),
        ("lora", "fewer than two arms"),
        ("lora,lora:r=8", "trains the same as lora"),
        ("full,", "no arm ''"),
    ],
)
def test_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_arms([text], None)
