"""Finding and loading base models."""

import json
from pathlib import Path

import pytest
import torch

from tiny_models import save_tiny_model
from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.base import choose_dtype, find_base, load_model, load_tokenizer, model_limit

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


def load(folder: Path, context_length: int | None = None) -> torch.nn.Module:
    return load_model(find_base(str(folder)), dtype=torch.float32, device=CPU, context_length=context_length)


def test_a_folder_is_used_as_it_is(folder: Path):
    base = find_base(str(folder))
    assert (base.path, base.revision) == (folder, None)
    assert [f.name for f in base.weight_files] == ["model.safetensors"]
    assert model_limit(base) == 256
    assert load_tokenizer(base).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("missing", "named"),
    [("config.json", "config.json"), ("model.safetensors", "safetensors"), ("tokenizer.json", "tokenizer")],
)
def test_what_a_folder_lacks_is_named(folder: Path, missing: str, named: str):
    (folder / missing).unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=named):
        load_tokenizer(find_base(str(folder)))


def test_a_damaged_weight_file_is_an_error_of_one_line(folder: Path):
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_says_how_to_give_local_weights():
    with pytest.raises(ModelError) as caught:
        find_base("some-org/some-model")
    assert "local folder" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(reference: str):
    with pytest.raises(ModelError, match="no such model folder"):
        find_base(reference)


def test_a_misspelt_catalog_name_gets_the_nearest():
    with pytest.raises(ModelError, match="smollm2-135m-instruct-q4"):
        find_base("smollm2-135m-instruct")


def test_a_longer_context_interpolates_positions_by_the_ratio(folder: Path):
    """Chen et al. 2023: positions divided by the factor; position 2 of factor 2 is position 1 of the original."""
    plain, longer = load(folder), load(folder, context_length=512)
    hidden = torch.zeros(1, 1, 32)
    one = plain.model.rotary_emb(hidden, torch.tensor([[1]]))
    two = longer.model.rotary_emb(hidden, torch.tensor([[2]]))
    assert torch.allclose(one[0], two[0])
    assert torch.allclose(one[1], two[1])
    assert longer.config.max_position_embeddings == 512
    assert load(folder, context_length=256).config.max_position_embeddings == 256


def test_weights_are_mapped_not_read(folder: Path):
    model = load(folder)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert "model.safetensors" in maps.read_text()
    assert next(model.parameters()).dtype == torch.float32


def test_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tunesmith.models.base._cpu_has_bf16", lambda: False)
    assert choose_dtype("auto", CPU)[0] == torch.float32
    assert choose_dtype("fp32", CPU)[0] == torch.float32
    with pytest.raises(ConfigError, match="emulated"):
        choose_dtype("bf16", CPU)
    monkeypatch.setattr("tunesmith.models.base._cpu_has_bf16", lambda: True)
    assert choose_dtype("auto", CPU)[0] == torch.bfloat16


def test_a_config_of_no_known_architecture_is_refused(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "never-heard-of"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)
