"""Whole commands for the flow tests: a configuration as a file, a command run in this process, what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tunesmith.checkpoints.manifest import read_manifest
from tunesmith.cli import main

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def settings_for(folder: Path, model: Path, rows: Path, **changed: Any) -> dict[str, Any]:
    """Settings of a run that takes half a second; ``changed`` goes on top, ... removes a key."""
    settings: dict[str, Any] = {
        "model_id": str(model),
        "train_path": str(rows / "train.jsonl"),
        "valid_path": str(rows / "valid.jsonl"),
        "num_epochs": 1,
        "num_warmup_steps": 0,
        "learning_rate": 0.01,
        "output_dir": str(folder / "outputs"),
    }
    return {key: value for key, value in {**settings, **changed}.items() if value is not ...}


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def runs_in(output_dir: Path) -> set[Path]:
    """Run folders, whole or not."""
    return set(output_dir.glob("*-lora-*")) | set(output_dir.glob("*-full-*"))


def finetune(folder: Path, model: Path, rows: Path, *arguments: str, **changed: Any) -> Path:
    """``tunesmith finetune`` on these settings, which must succeed; the folder of the run."""
    settings = settings_for(folder, model, rows, **changed)
    config = write_config(folder / "config.yaml", settings)
    output_dir = Path(settings["output_dir"])
    before = runs_in(output_dir)
    assert main(["finetune", str(config), *arguments]) == 0
    (run,) = runs_in(output_dir) - before
    return run


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind in ``metrics.jsonl``."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a checkpoint folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def checkpoint_steps(run: Path) -> list[int]:
    # One that is being written has a hidden name.
    return sorted(read_manifest(path).step for path in (run / "checkpoints").glob("step-*"))


def logits(model: Any, text_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor([text_ids])).logits.float()


def start(*arguments: str, module: bool = True, **environ: str) -> subprocess.Popen[str]:
    """``tunesmith ARGUMENTS`` (without ``module``: ``python ARGUMENTS``) in a process of its own."""
    command = [sys.executable, *(["-m", "tunesmith"] if module else []), *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )  # fmt: skip


def refused(capfd, arguments: list[str], code: int = 2, lines: int = 1) -> str:
    """What a command that must fail says: ``lines`` lines on standard error and no traceback anywhere."""
    capfd.readouterr()
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert err.startswith("Error: "), err
    assert len(err.splitlines()) == lines, err
    return err


def refused_run(
    capfd, folder: Path, model: Path, rows: Path, *arguments: str, code: int = 2, lines: int = 1, **changed
):
    """``refused`` for a fine-tuning; before exit code 3 nothing may have been written."""
    config = write_config(folder / "config.yaml", settings_for(folder, model, rows, **changed))
    err = refused(capfd, ["finetune", str(config), *arguments], code, lines)
    if code == 2:
        left = [path for path in (folder / "outputs").rglob("*") if path.is_file()]
        assert left == []
        assert runs_in(folder / "outputs") == set()
    return err
