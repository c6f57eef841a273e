"""Runs that ended as if they had been killed, and what is compared of them."""

from pathlib import Path

import pytest
import torch

import tunesmith.run
from flow_parts import events, runs_in, settings_for, write_config
from tunesmith.cli import main

EVERY_STEP = {
    "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
    "num_checkpoints_to_keep": 2,
}


class Killed(BaseException):
    """Stands for what no code can catch, in a test that goes on."""


def interrupted(
    folder: Path, model: Path, rows: Path, patch: pytest.MonkeyPatch, step: int, **changed
) -> tuple[Path, Path]:
    """(configuration, run folder) of a run that ended as if killed right after the checkpoint of ``step``."""
    config = write_config(
        folder / "config.yaml", settings_for(folder, model, rows, **{**EVERY_STEP, **changed})
    )
    save = tunesmith.run._save

    def save_and_die(run, totals, *rest):
        save(run, totals, *rest)
        if totals.steps == step:
            raise Killed

    with patch.context() as here:
        here.setattr(tunesmith.run, "_save", save_and_die)
        here.setattr(tunesmith.run, "leave_report", lambda *_: None)
        with pytest.raises(Killed):
            main(["finetune", str(config)])
    (run,) = runs_in(folder / "outputs")
    assert not (run / "report.json").exists()
    return config, run


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def step_figures(run: Path) -> list[tuple[int, float, float]]:
    return [(e["step"], e["train_loss_batch"], e["grad_norm"]) for e in events(run, "step")]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
