"""Going on with an interrupted run: to the same bits, or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flow_parts import (
    LORA,
    checkpoint_steps,
    events,
    finetune,
    refused,
    report,
    runs_in,
    settings_for,
    tensors,
    write_config,
)
from resume_parts import EVERY_STEP, equal, interrupted, made, step_figures
from tunesmith.checkpoints.lock import locked
from tunesmith.cli import main

pytestmark = pytest.mark.flow


@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(tmp_path, tiny, rows, monkeypatch, lora):
    method = {"lora_config": {**LORA, "lora_dropout": 0.1}} if lora else {}
    whole = finetune(made(tmp_path / "whole"), tiny, rows, num_epochs=2, **EVERY_STEP, **method)
    config, run = interrupted(made(tmp_path / "broken"), tiny, rows, monkeypatch, 4, num_epochs=2, **method)
    assert main(["finetune", str(config), "--resume", run.name]) == 0
    assert step_figures(run) == step_figures(whole)
    assert [e["step"] for e in events(run, "step")] == [1, 2, 3, 4, 5, 6]
    assert (
        events(run, "epoch")[1]["avg_train_loss_epoch"] == events(whole, "epoch")[1]["avg_train_loss_epoch"]
    )
    assert checkpoint_steps(run) == checkpoint_steps(whole)
    last = "checkpoints/step-000006"
    assert equal(tensors(run / last), tensors(whole / last))
    assert equal(tensors(run / last / "training"), tensors(whole / last / "training"))
    assert equal(tensors(run / "best"), tensors(whole / "best"))
    assert not (run / "best" / "training").exists()
    assert report(run)["resumed_at"] == [4]
    assert report(run)["real_tokens"] == report(whole)["real_tokens"]


def test_a_finished_run_is_not_resumed(tmp_path, tiny, rows, capfd):
    run = finetune(tmp_path, tiny, rows, lora_config=LORA)
    err = refused(capfd, ["finetune", str(tmp_path / "config.yaml"), "--resume", str(run)])
    assert "is finished" in err


def test_what_would_change_the_bits_is_listed_and_refused(tmp_path, tiny, rows, monkeypatch, capfd):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    changed = ["--set", "learning_rate=0.02", "--set", "lora_config.r=8"]
    before = (run / "metrics.jsonl").read_bytes()
    err = refused(capfd, ["finetune", str(config), "--resume", str(run), *changed])
    assert "learning_rate: 0.01 then, 0.02 now" in err
    assert "lora_config.r: 4 then, 8 now" in err
    assert (run / "metrics.jsonl").read_bytes() == before
    state = run / "checkpoints" / "step-000002" / "training" / "state.json"
    assert (
        json.loads(state.read_text())["environment"]["torch"].partition("+")[0]
        == torch.__version__.partition("+")[0]
    )


def test_other_threads_are_refused_unless_forced_and_then_marked(tmp_path, tiny, rows, monkeypatch, capfd):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        err = refused(capfd, ["finetune", str(config), "--resume", str(run)])
        assert f"threads: {threads} then, {threads + 1} now" in err
        assert main(["finetune", str(config), "--resume", str(run), "--force-resume"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert report(run)["forced"] == [f"threads: {threads} then, {threads + 1} now"]
    assert report(run)["status"] == "finished"


def test_other_data_is_refused(tmp_path, tiny, rows, monkeypatch, capfd):
    own = shutil.copytree(rows, tmp_path / "rows")
    config, run = interrupted(tmp_path, tiny, own, monkeypatch, 2, lora_config=LORA)
    text = (own / "train.jsonl").read_text()
    (own / "train.jsonl").write_text(text.replace("red", "green", 1))
    err = refused(capfd, ["finetune", str(config), "--resume", str(run)])
    assert "train data: SHA-256" in err


def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, tiny, rows, monkeypatch, capfd):
    whole = finetune(made(tmp_path / "whole"), tiny, rows, lora_config=LORA, **EVERY_STEP)
    config, run = interrupted(made(tmp_path / "broken"), tiny, rows, monkeypatch, 2, lora_config=LORA)
    file = run / "checkpoints" / "step-000002" / "training" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    capfd.readouterr()
    assert main(["finetune", str(config), "--resume", str(run)]) == 0
    said = capfd.readouterr().out.replace("\n", "")
    assert "passed over" in said
    assert "optimizer.safetensors" in said
    assert report(run)["resumed_at"] == [1]
    assert step_figures(run) == step_figures(whole)


def test_auto_goes_on_with_the_run_of_this_configuration_and_no_other(tmp_path, tiny, rows, monkeypatch):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    other = write_config(
        tmp_path / "other.yaml", {**yaml.safe_load(config.read_text()), "learning_rate": 0.005}
    )
    assert main(["finetune", str(other), "--resume", "auto"]) == 0
    assert len(runs_in(tmp_path / "outputs")) == 2
    assert main(["finetune", str(config), "--resume", "auto"]) == 0
    assert len(runs_in(tmp_path / "outputs")) == 2
    assert report(run)["resumed_at"] == [2]


def test_without_a_checkpoint_it_begins_again_in_the_same_folder(tmp_path, tiny, rows, monkeypatch):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 1, lora_config=LORA)
    shutil.rmtree(run / "checkpoints")
    assert main(["finetune", str(config), "--resume", str(run)]) == 0
    assert [e["step"] for e in events(run, "step")] == [1, 2, 3]


def test_a_second_process_on_a_run_is_refused_with_the_pid_of_the_first(
    tmp_path, tiny, rows, monkeypatch, capfd
):
    config, run = interrupted(tmp_path, tiny, rows, monkeypatch, 2, lora_config=LORA)
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from pathlib import Path; from tunesmith.checkpoints.lock import locked\n"
         "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)", str(run)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    err = refused(capfd, ["finetune", str(config), "--resume", str(run)])
    assert f"is in use by process {holder.pid}" in err
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(run):  # the kernel let go of it
        pass


def test_verify_computes_a_stretch_again_and_notices_a_changed_bit(tmp_path, tiny, rows, capfd):
    run = finetune(tmp_path, tiny, rows, lora_config=LORA, **EVERY_STEP, num_epochs=2)
    capfd.readouterr()
    assert main(["verify", str(run), "--json"]) == 0
    proof = json.loads(capfd.readouterr().out)
    assert (proof["first"], proof["last"]) == (6, 6)
    assert proof["tensors"] == 3 * len(load_file(run / "best" / "adapter_model.safetensors"))
    metrics = (run / "metrics.jsonl").read_text()
    loss = events(run, "step")[5]["train_loss_batch"]
    (run / "metrics.jsonl").write_text(metrics.replace(repr(loss), repr(loss + 1e-7)))
    assert "step 6: loss" in refused(capfd, ["verify", str(run)], code=3)
    (run / "metrics.jsonl").write_text(metrics)
    file = run / "checkpoints" / "step-000006" / "adapter_model.safetensors"
    saved = load_file(file)
    next(iter(saved.values())).view(-1)[0] += 1
    save_file(saved, file, metadata={"format": "pt"})
    assert "its content is not what was saved" in refused(capfd, ["verify", str(run)], code=3)


def test_verify_elsewhere_says_what_differs_and_no_option_of_another_command(tmp_path, tiny, rows, capfd):
    run = finetune(tmp_path, tiny, rows, **EVERY_STEP, seed=42)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed: 42", "seed: 43"))
    capfd.readouterr()
    # By its name, which is looked for in every output folder.
    named = ["verify", run.name, "--output-dir", str(tmp_path / "none"), "--output-dir", str(run.parent)]
    text = refused(capfd, named)
    assert "as they were saved, but its steps would have other bits here: seed: 42 then, 43 now" in text
    assert "--force-resume" not in text


def test_verify_of_a_full_run_compares_weights_and_moments(tmp_path, tiny, rows, capfd):
    run = finetune(tmp_path, tiny, rows, **EVERY_STEP)
    capfd.readouterr()
    assert main(["verify", str(run), "--json"]) == 0
    proof = json.loads(capfd.readouterr().out)
    assert proof["tensors"] == 3 * len(load_file(run / "best" / "model.safetensors"))


def test_force_resume_alone_is_refused(tmp_path, tiny, rows, capfd):
    config = write_config(tmp_path / "config.yaml", settings_for(tmp_path, tiny, rows))
    assert "without --resume" in refused(capfd, ["finetune", str(config), "--force-resume"])
    assert not (tmp_path / "outputs").exists()


def test_killed_runs_resume_to_the_same_bits():
    """A sample of ``make torture``."""
    script = Path(__file__).resolve().parents[1] / "torture" / "torture.py"
    done = subprocess.run(
        [sys.executable, str(script), "--instants", "6", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every bit equal" in done.stdout
