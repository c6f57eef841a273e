"""What stops a run: numbers that are not finite, Ctrl-C, SIGTERM. What was saved before stays good."""

import itertools
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tunesmith.run
import tunesmith.run_steps
from flow_parts import (
    LORA,
    checkpoint_steps,
    events,
    refused_run,
    report,
    runs_in,
    settings_for,
    start,
    tensors,
    write_config,
)
from tunesmith.checkpoints.manifest import verify
from tunesmith.cli import main

pytestmark = pytest.mark.flow


def test_a_non_finite_loss_names_its_rows_and_keeps_the_last_good_checkpoint(tmp_path, tiny, rows, capfd):
    err = refused_run(
        capfd, tmp_path, tiny, rows, code=3, learning_rate=1e30, valid_path=..., lora_config=LORA,
        checkpoint_and_evaluation_frequency={"unit": "steps", "frequency": 1}, optimizer={"max_grad_norm": 0.0},
        num_epochs=4,
    )  # fmt: skip
    assert "is not finite on rows" in err
    assert f"{rows / 'train.jsonl'}:" in err
    (run,) = runs_in(tmp_path / "outputs")
    assert report(run)["status"] == "failed"
    for checkpoint in (run / "checkpoints").iterdir():
        verify(checkpoint)
        assert str(checkpoint) in err
        assert all(tensor.isfinite().all() for tensor in tensors(checkpoint).values())


def test_base_weights_that_are_not_finite(tmp_path, tiny, rows, capfd):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    model.save_pretrained(broken)
    err = refused_run(capfd, tmp_path, broken, rows, code=3, lora_config=LORA)
    assert "step 1: the loss is not finite on rows" in err
    (run,) = runs_in(tmp_path / "outputs")
    assert not (run / "checkpoints").exists()
    assert report(run)["best_checkpoint"] is None


def test_a_model_that_learned_to_be_nan_is_not_called_finished(tmp_path, tiny, rows, capfd):
    settings = {"learning_rate": 1e38, "optimizer": {"max_grad_norm": 0.0}, "train_batch_size_per_device": 20}
    err = refused_run(capfd, tmp_path, tiny, rows, code=3, num_epochs=1, **settings)
    assert "not finite" in err
    assert "lower learning_rate" in err
    (run,) = runs_in(tmp_path / "outputs")
    assert report(run)["status"] == "failed"
    assert not (run / "best").exists()


def _wait_for_steps(run_parent: Path, process: subprocess.Popen, steps: int) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        for run in runs_in(run_parent):
            file = run / "metrics.jsonl"
            if file.exists() and file.read_text().count('"event": "step"') >= steps:
                return run
        time.sleep(0.05)
    raise AssertionError("no steps within a minute")


def interrupted(run: Path, code: int, err: str, reason: str) -> None:
    """Checks what a run must leave that a signal has ended."""
    found = report(run)
    assert (code, found["status"]) == (130, "interrupted")
    steps = found["steps"]
    if steps:
        assert checkpoint_steps(run) == [steps]
        verify(run / "best")
        kept = f"the best checkpoint is {run}/checkpoints/step-{steps:06d}"
    else:
        assert not (run / "checkpoints").exists()
        kept = "nothing had been saved yet"
    assert err == f"Stopped: {run}: {reason} after step {steps}; {kept}\n"


NEVER = {"unit": "steps", "frequency": 1_000_000}


def test_ctrl_c_saves_the_last_step_and_ends_the_run(tmp_path, tiny, rows):
    settings = settings_for(
        tmp_path, tiny, rows, num_epochs=100_000, lora_config=LORA, checkpoint_and_evaluation_frequency=NEVER
    )
    process = start("finetune", str(write_config(tmp_path / "c.yaml", settings)))
    run = _wait_for_steps(tmp_path / "outputs", process, 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert report(run)["steps"] >= 5
    interrupted(run, process.returncode, err, "SIGINT")
    assert "Traceback" not in out


def signal_in(monkeypatch, name: str, number: int, call: int) -> None:
    """Let the process get a signal at the given call of a function of the run."""
    owner = tunesmith.run if hasattr(tunesmith.run, name) else tunesmith.run_steps
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*arguments, **more):
        if next(calls) == call:
            signal.raise_signal(number)
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("place", "call", "reason"),
    [
        ("learning_rate_at", 4, "SIGTERM"),  # within step 4
        ("_save", 1, "SIGTERM"),  # while saving
        ("score_heldout", 1, "stopped"),  # while the base is scored, before step 1
    ],
)
def test_sigterm_saves_the_last_step_and_ends_the_run(
    tmp_path, tiny, rows, monkeypatch, capfd, place, call, reason
):
    signal_in(monkeypatch, place, signal.SIGTERM, call)
    before = signal.getsignal(signal.SIGTERM)
    settings = settings_for(tmp_path, tiny, rows, num_epochs=3, lora_config=LORA, eval_first=True)
    code = main(["finetune", str(write_config(tmp_path / "c.yaml", settings))])
    (run,) = runs_in(tmp_path / "outputs")
    if place == "learning_rate_at":  # keeps one: the scored checkpoint of step 3, and the newest
        assert checkpoint_steps(run) == [3, 4]
        shutil.rmtree(run / "checkpoints" / "step-000003")
        best = capfd.readouterr().err.replace("step-000003", "step-000004")
    else:
        best = capfd.readouterr().err
    interrupted(run, code, best, reason)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(tmp_path, tiny, rows, monkeypatch, capfd):
    signal_in(monkeypatch, "score_heldout", signal.SIGINT, 1)
    settings = settings_for(tmp_path, tiny, rows, num_epochs=3)
    code = main(["finetune", str(write_config(tmp_path / "c.yaml", settings))])
    (run,) = runs_in(tmp_path / "outputs")
    assert events(run, "eval") == []
    interrupted(run, code, capfd.readouterr().err, "SIGINT")


def test_ctrl_c_before_there_is_a_run(tmp_path, tiny, rows, monkeypatch, capfd):
    signal_in(monkeypatch, "assemble", signal.SIGINT, 1)
    assert (
        main(["finetune", str(write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows)))]) == 130
    )
    assert capfd.readouterr().err.strip() == "Interrupted."
    assert not (tmp_path / "outputs").exists()
