"""Every shipped recipe through the real command, on its architecture made tiny: two steps in this process."""

import json
from pathlib import Path

import pytest

import flow_parts
import recipe_parts
import tiny_models
from recipe_parts import CONFIGS
from tunesmith.cli import main
from tunesmith.config.deepspeed_file import read_deepspeed
from tunesmith.config.load import load_config

pytestmark = pytest.mark.flow
FIRST = "llama-3-8b-continue-from-checkpoint"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    kinds = sorted(set(recipe_parts.ARCHITECTURES.values()))
    return {kind: recipe_parts.save_tiny(folder / kind, kind) for kind in kinds}


def overrides(name: str, folder: Path, base: Path) -> list[str]:
    """What makes of the recipe a run of two steps on this machine; all else stays as shipped."""
    settings = load_config(str(CONFIGS / f"{name}.yaml")).config.optimization
    assert isinstance(settings.train_batch_size_per_device, int)
    rows = 2 * settings.train_batch_size_per_device * settings.gradient_accumulation_steps
    tiny_models.write_rows(folder / "train.jsonl", rows)
    tiny_models.write_rows(folder / "valid.jsonl", 3, start=500)
    values = {
        "model_id": base, "train_path": folder / "train.jsonl", "valid_path": folder / "valid.jsonl",
        "output_dir": folder / "outputs", "num_devices": 1, "num_epochs": 1, "num_warmup_steps": 0,
    }  # fmt: skip
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def train(name: str, folder: Path, base: Path, *more: str) -> Path:
    words = [*overrides(name, folder, base), *more]
    before = flow_parts.runs_in(folder / "outputs")
    assert main(["finetune", f"{name}.yaml", *words]) == 0
    (run,) = flow_parts.runs_in(folder / "outputs") - before
    return run


@pytest.mark.parametrize("name", [name for name in recipe_parts.recipe_names() if name != FIRST])
def test_a_recipe_trains_two_steps(tmp_path: Path, bases: dict[str, Path], name: str) -> None:
    run = train(name, tmp_path, bases[recipe_parts.architecture(name)])
    report = flow_parts.report(run)
    assert (report["steps"], report["status"]) == (2, "finished")
    notices = [event["message"] for event in flow_parts.events(run, "notice")]
    assert sum("one process does not shard" in text for text in notices) == 1
    assert report["method"] == ("full" if "full-parameter" in name else "lora")
    losses = [event["train_loss_batch"] for event in flow_parts.events(run, "step")]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


def test_the_recipe_that_continues_starts_where_the_first_run_ended(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    first = train("llama-3-8b-lora", tmp_path, bases["llama"], "--set", "learning_rate=1e-2")
    second = train(FIRST, tmp_path, bases["llama"], "--set", f"initial_adapter_model_ckpt_path={first}")
    assert flow_parts.report(second)["steps"] == 2
    config = json.loads((second / "best" / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert "embed_tokens" in config["target_modules"]


@pytest.mark.parametrize("name", recipe_parts.recipe_names())
def test_a_recipe_is_planned_as_shipped(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its own model, whose shape is known here, its number of devices and its DeepSpeed file."""
    own = ["--set", "initial_adapter_model_ckpt_path=null"] if name == FIRST else []
    assert main(["plan", f"{name}.yaml", *own, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)["asked"]
    settings = load_config(str(CONFIGS / f"{name}.yaml")).config.cluster
    assert settings.deepspeed is not None
    stage = read_deepspeed(settings.deepspeed.config_path).stage
    assert (asked["devices"], asked["zero_stage"]) == (settings.num_devices, stage)


@pytest.mark.parametrize("name", ["gemma-2-9b-lora", "llama-guard-2-8b-lora"])
def test_check_shows_what_a_recipe_with_a_prompt_format_trains(
    tmp_path: Path, bases: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = overrides(name, tmp_path, bases[recipe_parts.architecture(name)])
    assert main(["check", f"{name}.yaml", *words, "--json", "--rows", "1"]) == 0
    (texts,) = json.loads(capsys.readouterr().out)["trained_texts"]
    end = "<end_of_turn>" if name.startswith("gemma") else "<|eot_id|>"
    assert "".join(texts).startswith(f"colour is red{end}")


def test_check_says_what_a_deepspeed_file_means_and_the_run_takes_what_it_states(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, file = "llama-3-8b-lora", tmp_path / "zero.json"
    words = {"zero_optimization": {"stage": 3}, "gradient_clipping": 1e-30}
    file.write_text(json.dumps(words), encoding="utf-8")
    own = ["--set", f"deepspeed.config_path={file}", "--set", "max_num_checkpoints=1"]
    base = bases[recipe_parts.architecture(name)]
    assert main(["check", f"{name}.yaml", *overrides(name, tmp_path, base), *own, "--json"]) == 0
    notices = json.loads(capsys.readouterr().out)["notices"]
    for said in (
        "one process does not shard",
        "gradient_clipping 1e-30",
        "max_num_checkpoints is an old name",
    ):
        assert sum(said in notice for notice in notices) == 1
    run = train(name, tmp_path, base, *own)
    assert load_config(str(run / "config.yaml")).config.optimization.optimizer.max_grad_norm == 1e-30
    file.unlink()  # what a run leaves needs it no more
    assert main(["inspect", str(run), "--step", "1"]) == 0
