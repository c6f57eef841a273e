"""``--resume auto`` where a process still holds the run's folder: its driver may just have been killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunesmith import resuming
from tunesmith.checkpoints.lock import is_locked, lock_holder, locked, wait_until_free
from tunesmith.config.load import load_config
from tunesmith.resuming import unfinished_run

LOADED = load_config(None, ["model_id=m", "train_path=rows.jsonl"])
HOLD = """
import sys, time
from pathlib import Path
from tunesmith.checkpoints.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    time.sleep(float(sys.argv[2]))
    if sys.argv[3:]:
        (Path(sys.argv[1]) / "report.json").write_text('{"status": "finished"}')
"""
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """A process that holds a folder, and on a word of ours lets go of it after some seconds."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, seconds: float, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), str(seconds), *more]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def run_of(folder: Path, age: int = 0) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(LOADED.as_yaml(), encoding="utf-8")
    written = time.time() - age
    os.utime(folder, (written, written))
    return folder


def test_a_run_whose_workers_are_dying_is_waited_for(tmp_path: Path, hold: Hold):
    run, said = run_of(tmp_path / "run"), []
    process = hold(run, 0.5)
    let_go(process)
    assert unfinished_run(tmp_path, LOADED.resolved(), said.append) == run
    assert said == [f"{run} is in use by process {process.pid}: waiting 30 s at most for its end"]
    assert not is_locked(run)


def test_a_run_that_goes_on_is_passed_over_and_said(tmp_path: Path, hold: Hold, monkeypatch):
    monkeypatch.setattr(resuming, "DYING_SECONDS", 0.4)
    older, newer, said = run_of(tmp_path / "older", age=100), run_of(tmp_path / "newer"), []
    hold(newer, 60)
    begun = time.monotonic()
    assert unfinished_run(tmp_path, LOADED.resolved(), said.append) == older
    assert 0.4 <= time.monotonic() - begun < 5
    assert said[1:] == [f"{newer} is still in use: passed over"]


def test_only_the_newest_is_waited_for(tmp_path: Path, hold: Hold):
    older, newer, said = run_of(tmp_path / "older", age=100), run_of(tmp_path / "newer"), []
    hold(older, 60)
    os.utime(older, (1, 1))  # its lock is new in it
    assert unfinished_run(tmp_path, LOADED.resolved(), said.append) == newer
    assert said == []


def test_a_run_that_finishes_while_it_is_waited_for_is_not_resumed(tmp_path: Path, hold: Hold):
    run, said = run_of(tmp_path / "run"), []
    let_go(hold(run, 0.3, "finishes"))
    assert unfinished_run(tmp_path, LOADED.resolved(), said.append) is None
    assert len(said) == 1


def test_runs_of_other_settings_are_not_waited_for(tmp_path: Path, hold: Hold):
    hold(run_of(tmp_path / "run"), 60)
    other, said = load_config(None, ["model_id=m", "train_path=rows.jsonl", "learning_rate=1"]), []
    assert unfinished_run(tmp_path, other.resolved(), said.append) is None
    assert said == []


def test_who_holds_a_folder(tmp_path: Path):
    assert lock_holder(tmp_path) is None
    with locked(tmp_path):
        assert lock_holder(tmp_path) == str(os.getpid())
        assert is_locked(tmp_path)
        assert not wait_until_free(tmp_path, 0.0)
    assert lock_holder(tmp_path) is None
    assert wait_until_free(tmp_path, 0.0)
