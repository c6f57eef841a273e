"""What the flow tests share: one tiny model, its rows, and one finished run of each method. All are only read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import flow_parts
import tiny_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with tied embeddings."""
    return tiny_models.save_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (20 rows) and valid.jsonl (6 others)."""
    folder = tmp_path_factory.mktemp("rows")
    tiny_models.write_rows(folder / "train.jsonl", 20)
    tiny_models.write_rows(folder / "valid.jsonl", 6, start=100)
    return folder


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As ``own_cache``, for fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny: Path, rows: Path, session_cache: None) -> Path:
    """An output folder with one finished run of each method: ``custom_model_tag`` is the method's name."""
    folder = tmp_path_factory.mktemp("finished")
    evaluation = {"metric": "token_f1", "max_new_tokens": 6}
    shared = {"evaluation": evaluation, "num_epochs": 2}
    flow_parts.finetune(folder, tiny, rows, custom_model_tag="lora", lora_config=flow_parts.LORA, **shared)
    flow_parts.finetune(folder, tiny, rows, custom_model_tag="full", learning_rate=0.001, **shared)
    return folder / "outputs"


@pytest.fixture(scope="session")
def lora_run(outputs: Path) -> Path:
    return next(outputs.glob("*-lora-*"))


@pytest.fixture(scope="session")
def full_run(outputs: Path) -> Path:
    return next(outputs.glob("*-full-*"))
