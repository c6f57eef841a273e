"""The probe: a few real steps, nothing left behind, and a plan that goes by them."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tiny_models import save_tiny_model, write_rows
from tunesmith.config.load import load_config
from tunesmith.errors import RunError
from tunesmith.planning.plan import PlanOptions, make_plan
from tunesmith.planning.probe import Measured, ProcessorUse, probe
from tunesmith.planning.report import print_plan


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "m")
    write_rows(tmp_path / "train.jsonl", 60)
    settings: dict[str, Any] = {
        "model_id": str(tmp_path / "m"),
        "train_path": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "outputs"),
        "num_epochs": 1,
        "lora_config": {"r": 4},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "c.yaml"


def test_a_rate_is_what_was_measured():
    assert Measured(4, 2000, 5.0, 1, None, 5.0, 0.0).seconds_per_token == 0.0025


def test_what_other_programs_take_of_the_processors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    begin = ProcessorUse(1.0, 50.0, 7.0)
    # Ten seconds of four processors: 16 of ours, 30 of all.
    assert ProcessorUse(17.0, 80.0, 17.0).others_since(begin) == pytest.approx(14 / 40)
    # The system counts in hundredths of a second, the process in less: never below nothing.
    assert ProcessorUse(17.0, 65.9, 17.0).others_since(begin) == 0
    assert begin.others_since(begin) == 0
    now, later = ProcessorUse.now(), ProcessorUse.now()
    assert later.own >= now.own
    assert later.every >= now.every > 0


@pytest.mark.flow
def test_a_plan_with_a_probe_goes_by_the_measured_steps_and_leaves_nothing(config: Path, tmp_path: Path):
    (tmp_path / "temporary").mkdir()
    before = sorted(tmp_path.rglob("*"))
    # As a user gives it: memory that earlier tests have left in this process would count as the program's.
    command = [sys.executable, "-m", "tunesmith", "plan", str(config), "--probe", "--json"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert sorted(tmp_path.rglob("*")) == before
    found = json.loads(done.stdout)
    measured = found["probe"]
    assert measured["steps"] == 7  # of the 8 there are, the first is not counted
    here = {kind: found["methods"][kind]["machines"][0] for kind in ("lora", "full")}
    assert measured["cpu_seconds"] > 0
    assert 0 <= measured["taken_by_others"] <= 1
    rate = measured["seconds"] / measured["real_tokens"]
    assert here["lora"]["seconds"] == pytest.approx(rate * found["workload"]["tokens"])
    assert here["lora"]["time_basis"] == "measured in 7 steps"
    assert here["full"]["time_basis"] == "from the measured steps of LoRA, by FLOPs"
    assert here["full"]["seconds"] > here["lora"]["seconds"]
    # A tiny model: nearly all of it is the program, the same in both processes.
    assert here["lora"]["total"] == pytest.approx(measured["peak_bytes"], rel=0.10)


def test_a_probe_beside_other_programs_says_so(config: Path):
    plan = make_plan(load_config(str(config)), PlanOptions(), print)

    def said(others: float) -> str:
        console = Console(width=100, file=io.StringIO())
        print_plan(console, replace(plan, measured=Measured(7, 200, 1.0, 2**30, 2**30, 1.0, others)))
        return " ".join(console.file.getvalue().split())

    assert "7 steps, 200 real tokens/s, peak 1.0 GiB" in said(0.05)
    assert "other programs" not in said(0.05)
    assert "other programs took 45% of this machine's processors meanwhile" in said(0.45)


@pytest.mark.flow
def test_steps_that_fail_are_told_in_one_line(config: Path, tmp_path: Path):
    loaded = load_config(str(config))
    for file in (tmp_path / "m").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(RunError, match=r"--probe: the steps failed \(.*no \*\.safetensors") as caught:
        probe(loaded, skip_bad_rows=False)
    assert "\n" not in str(caught.value)
