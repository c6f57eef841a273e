"""The log of a worker: everything that its process writes, whoever writes it and however it ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

WRITES = """
import os, signal, subprocess, sys, warnings
from pathlib import Path
from tunesmith.cluster.worker_log import worker_log
print("of no run")
with worker_log(1, 4) as log:
    print("early")
    os.write(2, b"early error\\n")
    log.open(Path(sys.argv[1]))
    print("from Python")
    warnings.warn("from a warning")
    os.write(1, b"from C\\n")
    subprocess.run(["echo", "from a child"])
    if sys.argv[2:] == ["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
print("after the run")
"""


def run(script: str, folder: Path, *arguments: str) -> tuple[str, str]:
    """What a process leaves in the files that its launcher gave it as standard output and error."""
    out, err = folder.parent / "out", folder.parent / "err"
    with out.open("ab") as stdout, err.open("ab") as stderr:
        subprocess.run(
            [sys.executable, "-c", script, str(folder), *arguments], stdout=stdout, stderr=stderr, timeout=60
        )
    return out.read_text(), err.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "run"
    found.mkdir()
    return found


@pytest.mark.parametrize("end", [[], ["die"]], ids=["ends", "is killed"])
def test_all_that_a_process_writes_is_in_its_file(folder: Path, end: list[str]):
    out, err = run(WRITES, folder, *end)
    head, *lines = (folder / "logs" / "worker-1.log").read_text().splitlines()
    assert re.fullmatch(r"--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d worker 1 of 4, process \d+", head)
    assert [line for line in lines if "warn" not in line] == [
        "early",
        "early error",
        "from Python",
        "from C",
        "from a child",
    ]
    assert any(line.endswith("UserWarning: from a warning") for line in lines)
    # What was written before there was a folder stays where it went, too.
    assert out.splitlines() == ["of no run", "early", *([] if end else ["after the run"])]
    assert err == "early error\n"


def test_a_worker_that_starts_again_goes_on_in_its_file(folder: Path):
    run(WRITES, folder, "die")
    run(WRITES, folder)
    text = (folder / "logs" / "worker-1.log").read_text()
    assert text.count("worker 1 of 4, process ") == 2
    assert text.count("from C\n") == 2
    assert text.count("early\n") == 2  # not those of the process before, though they are in the same file


def test_a_folder_that_cannot_be_reached_is_said_once_and_harms_nothing(folder: Path):
    folder.rmdir()  # as on a machine that does not share it
    out, err = run(WRITES, folder)
    said = f"{folder}/logs/worker-1.log: cannot be reached from here (No such file or directory); "
    assert err.count(said + "this worker's log stays with Ray\n") == 1
    assert "from C\nfrom a child\n" in out
    assert not folder.exists()


def test_one_file_for_both_streams_is_copied_once(folder: Path, tmp_path: Path):
    with (tmp_path / "both").open("ab") as both:
        subprocess.run([sys.executable, "-c", WRITES, str(folder)], stdout=both, stderr=both, timeout=60)
    assert (folder / "logs" / "worker-1.log").read_text().count("early error\n") == 1


def test_streams_that_are_no_files_are_not_waited_for(folder: Path):
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["of no run", "early", "after the run"]
    lines = (folder / "logs" / "worker-1.log").read_text().splitlines()
    assert lines[1] == "from Python"
