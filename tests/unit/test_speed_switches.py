"""LLMForge's speed switches: accepted, and said to do nothing here."""

from pathlib import Path

import pytest

from tunesmith.config.load import load_config
from tunesmith.run_record import config_notices

PLAIN = ["model_id=m", "train_path=rows.jsonl", "num_epochs=1", "num_warmup_steps=0"]


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("flash_attention_2=true", "flash_attention_2"),
        ("liger_kernel.enabled=true", "liger_kernel"),
        ("torch_compile=true", "torch_compile"),
        ("torch_compile={backend: inductor}", "torch_compile"),
    ],
)
def test_a_switch_without_effect_is_said_once(setting: str, key: str):
    (notice,) = config_notices(load_config(None, [*PLAIN, setting]), total_steps=10)
    assert key in notice
    assert "has no effect here" in notice


@pytest.mark.parametrize(
    "setting",
    ["flash_attention_2=false", "flash_attention_2=auto", "liger_kernel.enabled=false", "padding=max_length"],
)
def test_a_switch_that_is_off_is_not_spoken_of(setting: str):
    assert list(config_notices(load_config(None, [*PLAIN, setting]), total_steps=10)) == []


def test_the_file_of_the_run_reads_back(tmp_path: Path):
    loaded = load_config(None, [*PLAIN, "liger_kernel={enabled: true, kwargs: {rope: false}}"])
    (tmp_path / "again.yaml").write_text(loaded.as_yaml(), encoding="utf-8")
    assert load_config(str(tmp_path / "again.yaml"), []).config == loaded.config
