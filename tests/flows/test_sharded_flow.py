"""``tunesmith finetune`` with workers that split every tensor between them, through Ray itself."""

import signal
import time
from pathlib import Path

import pytest
import torch

from flow_parts import (
    LORA,
    checkpoint_steps,
    events,
    finetune,
    report,
    runs_in,
    settings_for,
    start,
    tensors,
    write_config,
)
from tunesmith.checkpoints.manifest import read_manifest
from tunesmith.checkpoints.store import newest_checkpoint

pytest.importorskip("ray.train", reason="the extra tunesmith[ray] is not installed")
pytestmark = pytest.mark.flow
BUSY_SECONDS = 480  # Ray and several imports of torch, on a machine that has much else to do
ZERO_3 = {"deepspeed": {"config_path": "deepspeed_configs/zero_3.json"}}


def losses(run: Path) -> list[float]:
    return [event["train_loss_batch"] for event in events(run, "step")]


@pytest.mark.parametrize("method", [{"lora_config": LORA}, {"learning_rate": 0.003}], ids=["lora", "full"])
def test_two_workers_that_split_everything_leave_what_one_process_leaves(tmp_path, tiny, rows, capfd, method):
    # Three epochs of 20 rows in steps of 8: the best checkpoint need not be the last, and is put back to be scored.
    shared = {
        **method,
        "evaluation": {"metric": "token_f1", "max_new_tokens": 6},
        "num_epochs": 3,
        # With the usual 1e-8 AdamW makes the rounding of a gradient that nearly cancels into a visible step: one
        # process with autograd, as here, then differs from one with the kernels by 5e-5 in one weight of a full run.
        "optimizer": {"adam_epsilon": 1e-5},
    }
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = finetune(tmp_path / "one", tiny, rows, train_batch_size_per_device=8, **shared)
    capfd.readouterr()
    two = finetune(
        tmp_path / "two", tiny, rows, train_batch_size_per_device=4, num_devices=2, **ZERO_3, **shared
    )
    out = " ".join(capfd.readouterr().out.split())
    assert "each of the 2 workers holds its share of weights, gradients and optimizer state (FSDP2)" in out
    assert "autograd: weights are sharded" in out
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    alone, together = report(one), report(two)
    assert together["before"]["loss"] == pytest.approx(alone["before"]["loss"], rel=1e-6)
    assert together["after"]["loss"] == pytest.approx(alone["after"]["loss"], rel=1e-5)
    assert together["samples"] == alone["samples"]
    wanted, found = tensors(one / "best"), tensors(two / "best")
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
    assert {path.name for path in (two / "best").iterdir()} == {
        path.name for path in (one / "best").iterdir()
    }


@pytest.mark.parametrize(
    ("begins_with", "goes_on_with"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_a_split_run_that_was_interrupted_goes_on_with_another_number_of_workers(
    tmp_path, tiny, rows, begins_with, goes_on_with
):
    every_step = {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1}}
    shared = {"num_epochs": 4, "learning_rate": 0.001, "num_checkpoints_to_keep": 100, **every_step}
    settings = settings_for(
        tmp_path, tiny, rows, num_devices=begins_with, train_batch_size_per_device=1, **ZERO_3, **shared
    )
    config = write_config(tmp_path / "config.yaml", settings)
    process = start("finetune", str(config))
    _wait_for_step(tmp_path / "outputs", 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=BUSY_SECONDS)
    assert process.returncode == 130, out + err
    (run,) = runs_in(tmp_path / "outputs")
    stopped_at = max(checkpoint_steps(run))
    again = start("finetune", str(config), "--resume", "auto", "--set", f"num_devices={goes_on_with}")
    out, err = again.communicate(timeout=BUSY_SECONDS)
    assert again.returncode == 0, out + err
    assert f"began with {begins_with} workers, goes on with {goes_on_with}" in " ".join(out.split())
    assert report(run)["resumed_at"] == [stopped_at]
    (tmp_path / "one").mkdir()
    one = finetune(tmp_path / "one", tiny, rows, train_batch_size_per_device=begins_with, **shared)
    assert losses(run) == pytest.approx(losses(one), rel=1e-4)


def _wait_for_step(outputs: Path, step: int, process) -> None:
    waited_until = time.monotonic() + BUSY_SECONDS
    while time.monotonic() < waited_until and process.poll() is None:
        for run in runs_in(outputs):
            if (newest := newest_checkpoint(run)) and read_manifest(newest).step >= step:
                return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())
