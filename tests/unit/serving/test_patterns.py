"""Patterns of an adapter's settings: as PEFT takes them, but none may hold up the server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_parts import ask, expected, prompt, save_base, save_lora
from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving import patterns
from tunesmith.serving.engine import CpuEngine
from tunesmith.serving.plain_engine import PlainEngine

BOMB = r"(([a-z_.0-9]+)*)*!"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFolder:
    return save_base(tmp_path_factory.mktemp("base"), "untied")


@pytest.fixture(scope="module", params=[CpuEngine, PlainEngine])
def engine(request: pytest.FixtureRequest, base: BaseFolder) -> Iterator[Any]:
    found = request.param(base)
    yield found
    found.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": BOMB},
        {"exclude_modules": BOMB},
        {"rank_pattern": {BOMB: 4}},
        {"alpha_pattern": {BOMB: 4}},
        {"layers_to_transform": [0], "layers_pattern": BOMB},
        {"layers_to_transform": [0], "layers_pattern": ["layers", BOMB]},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_a_pattern_without_end_is_refused(
    engine: Any, base: BaseFolder, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    adapter = save_lora(base, tmp_path / "a", target_modules=["q_proj"])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    began = time.monotonic()
    with pytest.raises(ModelError, match="patterns take longer than"):
        engine.load(adapter)
    assert time.monotonic() - began < 5


def test_modules_to_save_are_patterns_too(
    base: BaseFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    adapter = save_lora(base, tmp_path / "a", target_modules=["q_proj"])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": [BOMB]}))
    engine = PlainEngine(base)
    try:
        with pytest.raises(ModelError, match="patterns take longer than"):
            engine.load(adapter)
    finally:
        engine.close()


def test_patterns_that_end_are_taken(engine: Any, base: BaseFolder, tmp_path: Path) -> None:
    adapter = save_lora(
        base,
        tmp_path / "a",
        target_modules=r".*\.layers\.\d+\.(self_attn|mlp)\.(q|v|down)_proj",
        rank_pattern={r"layers\.1\..*q_proj": 2},
    )
    key = engine.load(adapter)
    assert ask(engine, prompt(5), adapter=key, count=4).ids() == expected(base, adapter, prompt(5), 4)


def test_plain_names_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(patterns.subprocess, "run", refuse)
    config = LoraConfig(
        target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"model.layers.0.self_attn.q_proj": 2},
    )  # fmt: skip
    patterns.check_patterns(config, ["model.layers.0.self_attn.q_proj"], "here")


def test_a_pattern_may_not_be_a_book(base: BaseFolder) -> None:
    from peft import LoraConfig

    with pytest.raises(ModelError, match="has 20,006 characters"):
        patterns.check_patterns(LoraConfig(target_modules="(q)" + "x" * 19_997), ["q"], "here")
