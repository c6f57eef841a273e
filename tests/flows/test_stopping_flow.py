"""What stops a run: numbers that are not finite, Ctrl-C, SIGTERM. What was saved before stays good."""

import atexit
import gc
import itertools
import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tunesmith.config.load
import tunesmith.run
import tunesmith.run_result
import tunesmith.run_steps
import tunesmith.training.stop
from flow_parts import (
    LORA,
    checkpoint_steps,
    events,
    finetune,
    refused,
    refused_run,
    report,
    runs_in,
    settings_for,
    start,
    tensors,
    write_config,
)
from resume_parts import equal, made, step_figures
from tunesmith.checkpoints.manifest import read_manifest, verify
from tunesmith.cli import main
from tunesmith.errors import CheckpointError
from tunesmith.models.kernels import decoder

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
        folder = run / "checkpoints" / f"step-{steps:06d}"
        kept = f"saved is {folder.name}, the best checkpoint is {folder}"
    else:
        assert not (run / "checkpoints").exists()
        kept = "nothing had been saved yet"
    told, _, command = err.partition("; go on with: ")
    assert told == f"Stopped: {run}: {reason} after step {steps}; {kept}"
    assert command.endswith(f"tunesmith finetune --resume {run}\n")


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
    owner = next(module for module in (tunesmith.run, tunesmith.run_steps, decoder) if hasattr(module, name))
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
        best = capfd.readouterr().err.replace(
            "is " + str(run / "checkpoints/step-000003"), "is " + str(run / "checkpoints/step-000004")
        )
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


def same_as_unbroken(run: Path, whole: Path) -> None:
    """Checks that a resumed run left what one left that nobody stopped."""
    assert step_figures(run) == step_figures(whole)
    losses, wanted = ({e["step"]: e["eval_loss"] for e in events(one, "eval")} for one in (run, whole))
    assert losses == wanted
    last = f"checkpoints/step-{report(whole)['steps']:06d}"
    for part in (last, f"{last}/training", "best"):
        assert equal(tensors(run / part), tensors(whole / part))
    assert read_manifest(run / "best").step == read_manifest(whole / "best").step
    for key in ("status", "steps", "eval_loss", "before", "after"):
        assert report(run)[key] == report(whole)[key]


def stopped_and_resumed(folder: Path, model: Path, rows: Path, **settings) -> Path:
    """A run that a signal, sent by what the caller has patched, stops, and that then goes on to its end."""
    config = write_config(folder / "config.yaml", settings_for(folder, model, rows, **settings))
    assert main(["finetune", str(config)]) == 130
    (run,) = runs_in(folder / "outputs")
    assert report(run)["status"] == "interrupted"
    assert main(["finetune", str(config), "--resume", "auto"]) == 0
    return run


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("lora", [True, False])
def test_a_step_that_takes_long_is_abandoned_and_done_again(tmp_path, tiny, rows, monkeypatch, lora, step):
    settings = {
        "num_epochs": 2,
        "seed": 5,
        **({"lora_config": {**LORA, "lora_dropout": 0.1}} if lora else {}),
    }
    whole = finetune(made(tmp_path / "whole"), tiny, rows, **settings)
    monkeypatch.setattr(tunesmith.training.stop, "PATIENCE_SECONDS", -1)
    signal_in(monkeypatch, "layer_backward", signal.SIGTERM, (step - 1) * tiny_layers(tiny) + 1)
    run = stopped_and_resumed(made(tmp_path / "broken"), tiny, rows, **settings)
    assert report(run)["resumed_at"] == [step - 1]
    same_as_unbroken(run, whole)


def tiny_layers(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


@pytest.mark.parametrize("call", [1, 2])  # of 2: the second is the last step's, with which the run would end
def test_an_evaluation_that_a_signal_has_ended_is_made_up_for(tmp_path, tiny, rows, monkeypatch, call):
    settings = {"num_epochs": 2, "lora_config": LORA}
    whole = finetune(made(tmp_path / "whole"), tiny, rows, **settings)
    signal_in(monkeypatch, "score_heldout", signal.SIGTERM, call)
    run = stopped_and_resumed(made(tmp_path / "broken"), tiny, rows, **settings)
    assert report(run)["resumed_at"] == [3 * call]
    same_as_unbroken(run, whole)


def test_a_second_signal_ends_saving_and_leaves_what_was_saved_before(
    tmp_path, tiny, rows, monkeypatch, capfd
):
    settings = {"num_epochs": 2, "lora_config": LORA}
    whole = finetune(made(tmp_path / "whole"), tiny, rows, **settings)
    monkeypatch.setattr(tunesmith.training.stop, "ONE_SIGNAL_SECONDS", -1)
    signal_in(monkeypatch, "learning_rate_at", signal.SIGINT, 4)
    signal_in(monkeypatch, "save_servable", signal.SIGINT, 2)
    capfd.readouterr()
    run = stopped_and_resumed(made(tmp_path / "broken"), tiny, rows, **settings)
    assert "stopped after step 4; saved is step-000003, " in capfd.readouterr().err
    assert report(run)["resumed_at"] == [3]
    same_as_unbroken(run, whole)


def test_a_run_stopped_while_its_result_is_forwarded_is_not_finished(
    tmp_path, tiny, rows, monkeypatch, capfd
):
    signal_in(monkeypatch, "forward_best", signal.SIGTERM, 1)
    run = stopped_and_resumed(tmp_path, tiny, rows, lora_config=LORA)
    assert "Stopped: " in (err := capfd.readouterr().err)
    assert f"tunesmith finetune --resume {run}" in err
    assert list((tmp_path / "outputs" / "lora_fine_tuning").glob("*/adapter_model.safetensors"))


def test_a_copy_that_could_not_be_made_is_made_when_the_run_is_resumed(
    tmp_path, tiny, rows, monkeypatch, capfd
):
    config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows, lora_config=LORA))
    with monkeypatch.context() as patch:
        full = CheckpointError("disk", "is full (ENOSPC)", "free some room")
        patch.setattr(tunesmith.run_result, "forward", lambda *_: (_ for _ in ()).throw(full))
        err = refused(capfd, ["finetune", str(config)], code=3)
    (run,) = runs_in(tmp_path / "outputs")
    assert f"disk: is full (ENOSPC); free some room; then copy {run / 'best'}" in err
    assert f"tunesmith finetune --resume {run}" in err
    assert report(run)["status"] == "failed"
    losses = report(run)["eval_loss"]
    assert main(["finetune", "--resume", str(run)]) == 0
    assert report(run)["status"] == "finished"
    assert report(run)["eval_loss"] == losses
    assert list((tmp_path / "outputs" / "lora_fine_tuning").glob("*/adapter_model.safetensors"))


def test_sigterm_before_anything_is_imported(tmp_path, tiny, rows, monkeypatch, capfd):
    monkeypatch.setattr(
        tunesmith.config.load, "load_config", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    at_exit: list[object] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    assert main(["finetune", "my.yaml"]) == 130
    assert at_exit == [gc.freeze]  # so that the end of the process does not take seconds
    assert capfd.readouterr().err.strip() == "Interrupted."


def test_ctrl_c_before_there_is_a_run(tmp_path, tiny, rows, monkeypatch, capfd):
    signal_in(monkeypatch, "assemble", signal.SIGINT, 1)
    assert (
        main(["finetune", str(write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows)))]) == 130
    )
    assert capfd.readouterr().err.strip() == "Interrupted."
    assert not (tmp_path / "outputs").exists()
