"""What is counted before a model is loaded is what its tensors take afterwards."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine_parts import ALL, LINEAR, save_lora
from engine_parts import save_base as save_wandering
from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.engine import CpuEngine, EngineSettings
from tunesmith.serving.footprint import Measure, adapter_bytes

HIDDEN, INNER, LAYERS, VOCABULARY = 32, 64, 2, 400  # of engine_parts, 4 heads and 2 groups of 8
KEYS = 16


def weights(tied: bool, biased: bool) -> int:
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER + 2 * HIDDEN
    if biased:
        layer += HIDDEN + 2 * KEYS + HIDDEN + 2 * INNER + HIDDEN
    return LAYERS * layer + HIDDEN + 2 * VOCABULARY * HIDDEN  # with the head apart, tied or not


@pytest.mark.parametrize(("kind", "tied", "biased"), [("llama", True, False), ("untied", False, True)])
def test_a_base_is_its_weights_in_float32_and_its_cache_when_full(
    tmp_path: Path, kind: str, tied: bool, biased: bool
) -> None:
    base = save_wandering(tmp_path, kind)
    measure = Measure(running=3, waiting=9, context_length=2_048, prefix_tokens=64)
    assert measure.context(base) == 256
    cache = (3 * 256 + 64) * LAYERS * 2 * KEYS
    assert measure.base_bytes(base) == 4 * (weights(tied, biased) + cache)
    short = Measure(running=3, waiting=9, context_length=100, prefix_tokens=0)
    assert short.base_bytes(base) == 4 * (weights(tied, biased) + 300 * LAYERS * 2 * KEYS)


def test_the_cache_that_is_counted_is_the_one_that_is_taken(tmp_path: Path) -> None:
    base = save_wandering(tmp_path)
    engine = CpuEngine(base, EngineSettings(running=3, context_length=100, prefix_tokens=64))
    try:
        taken = [*engine._cache.layers, *engine._prefixes._pools]
        counted = Measure(3, 1, 100, 64).base_bytes(base) - 4 * weights(True, False)
        assert sum(tensor.nbytes for tensor in taken) == counted
    finally:
        engine.close()


@pytest.mark.parametrize("targets", [LINEAR, ALL, ["v_proj"]])
def test_an_adapter_is_what_the_engine_says_it_is(tmp_path: Path, targets: list[str]) -> None:
    base = save_wandering(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "adapter", target_modules=targets)
    engine = CpuEngine(base, EngineSettings(running=1, context_length=16, prefix_tokens=0))
    try:
        engine.load(adapter)
        assert engine.facts().adapter_bytes == adapter_bytes(adapter) > 0
    finally:
        engine.close()


@pytest.mark.parametrize(
    "change",
    [{"max_position_embeddings": -(10**9)}, {"max_position_embeddings": 0}, {"num_hidden_layers": -3},
     {"num_hidden_layers": math.inf}, {"head_dim": -8}, {"num_attention_heads": -4}],
)  # fmt: skip
def test_no_config_makes_a_base_weigh_less_than_its_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    base = save_wandering(tmp_path, "llama")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    measure = Measure(running=3, waiting=9, context_length=100, prefix_tokens=0)
    assert measure.context(base) == 100
    assert measure.base_bytes(base) >= 4 * weights(True, False)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    measure, folder = Measure(1, 1, 16, 0), save_wandering(tmp_path / "base").path
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="its weights cannot be read"):
        measure.base_bytes(BaseFolder("x", folder, None))
    for content in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"its config\.json"):
            measure.context(BaseFolder("x", folder, None))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    assert adapter_bytes(tmp_path) == 7
