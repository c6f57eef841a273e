"""A whole run on a disk that becomes full: one line, nothing half-written, and the same bits once there is room."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flow_parts import LORA, finetune, runs_in, settings_for, tensors, write_config
from resume_parts import EVERY_STEP, equal, made, step_figures
from tunesmith.checkpoints.manifest import verify
from tunesmith.cli import main

pytestmark = pytest.mark.flow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; skipped where this user may not mount one."""
    place = made(tmp_path / "disk")
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tunesmith-test", str(place)], check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting is not permitted")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("lora", [True, False])
def test_a_disk_that_grows_bit_by_bit(tmp_path, tiny, rows, capfd, disk, lora):
    """At each size the run gets a little further before the disk is full."""
    method = {"lora_config": LORA} if lora else {}
    whole = finetune(made(tmp_path / "whole"), tiny, rows, **EVERY_STEP, **method)
    settings = settings_for(disk, tiny, rows, **EVERY_STEP, **method)
    config = write_config(tmp_path / "config.yaml", settings)
    refusals, size = 0, 64
    while size < 100_000:
        capfd.readouterr()
        code = main(["finetune", str(config), "--resume", "auto"])
        err = capfd.readouterr().err
        if code == 0:
            break
        assert (code, len(err.splitlines())) == (3, 1)
        assert "no space left on the disk" in err
        refusals += 1
        for run in runs_in(disk / "outputs"):
            for checkpoint in (run / "checkpoints").glob("step-*"):
                verify(checkpoint)
        size = int(size * 1.3)
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
    assert refusals > 5
    run = max(runs_in(disk / "outputs"), key=lambda run: (run / "best").exists())
    assert step_figures(run) == step_figures(whole)
    assert equal(tensors(run / "best"), tensors(whole / "best"))
