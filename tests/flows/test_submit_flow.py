"""A run sent to a real Ray cluster on this machine: followed, left and asked after, stopped."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from flow_parts import LORA, settings_for, start, write_config

pytest.importorskip("ray.job_submission")
pytestmark = pytest.mark.flow


TOKEN = secrets.token_hex(32)
SET_TOKEN = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file with it"
AUTHORISED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head node in processes of its own; its dashboard's address."""
    port = _free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--port=0", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}", f"--ray-client-server-port={_free_port()}", "--num-cpus=2",
        "--object-store-memory=80000000", "--disable-usage-stats", "--block",
    ]  # fmt: skip
    environ = {**os.environ, **AUTHORISED, "RAY_DISABLE_MEMORY_MONITOR": "1", "PYTHONWARNINGS": "ignore"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    head = subprocess.Popen(
        command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 90
        while True:
            with suppress(httpx.HTTPError):  # not yet
                if httpx.get(
                    f"{url}/api/version", timeout=2, headers={"Authorization": f"Bearer {TOKEN}"}
                ).is_success:
                    break
            assert head.poll() is None, "ray start ended"
            assert time.monotonic() < until, "no dashboard"
            time.sleep(0.3)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in AUTHORISED.items():
                patch.setenv(name, value)
            yield url
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def command(*arguments: str) -> tuple[int, str, str]:
    """``tunesmith ARGUMENTS``: exit code, output, errors. In a process of its own: Ray reads the token once."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    assert "Traceback (most recent call last)" not in err
    return process.returncode, out, err


def test_a_run_goes_to_a_cluster_and_its_result_comes_back(address, tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_TEST_SECRET", "hush-hush")
    settings = settings_for(tmp_path, tiny, rows, custom_model_tag="sent", lora_config=LORA)
    config = write_config(tmp_path / "config.yaml", settings)
    code, out, err = command("submit", str(config), "--address", address, "--env", "TUNESMITH_TEST_SECRET")
    assert (code, err) == (0, "")
    assert "hush-hush" not in out
    assert "model_id: " in out
    assert "train_path: 1 file" in out
    assert "variables TUNESMITH_TEST_SECRET" in out
    assert out.count("Best checkpoint is stored in:") == 1  # the job's own last lines
    (run,) = json.loads(command("models", "--output-dir", str(tmp_path / "outputs"), "--json")[1])
    assert (run["tag"], run["status"], run["method"]) == ("sent", "finished", "lora")

    (job,) = [line.split()[1] for line in out.splitlines() if line.startswith("Job tunesmith-")]
    assert (
        json.loads(command("jobs", "status", job, "--address", address, "--json")[1])["status"] == "SUCCEEDED"
    )
    assert command("jobs", "logs", job, "--address", address)[1].count("Best checkpoint is stored in:") == 1
    assert job in command("jobs", "list", "--address", address)[1]


@pytest.mark.slow
def test_a_job_that_fails_says_why_and_where_to_look(address, tiny, rows, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    settings = settings_for(tmp_path, tiny, rows, train_path=str(tmp_path / "bad.jsonl"))
    code, out, err = command("submit", str(write_config(tmp_path / "c.yaml", settings)), "--address", address)
    assert code == 3
    assert "1 row breaks a rule" in out
    assert "ended as FAILED; its log: tunesmith jobs logs tunesmith-" in err


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_which_can_be_followed_and_stopped(address, tiny, rows, tmp_path):
    rarely = {"unit": "epochs", "frequency": 100_000}
    settings = settings_for(
        tmp_path, tiny, rows, num_epochs=100_000, checkpoint_and_evaluation_frequency=rarely
    )
    sender = start("submit", str(write_config(tmp_path / "c.yaml", settings)), "--address", address)
    job = ""
    assert sender.stdout is not None
    for line in sender.stdout:
        job = line.split()[1] if line.startswith("Job tunesmith-") else job
        if job and "step" in line.lower():
            break
    sender.send_signal(signal.SIGINT)
    _, err = sender.communicate(timeout=30)
    assert sender.returncode == 130
    assert f"Stopped: job {job}: goes on without you; follow: tunesmith jobs logs {job}" in err
    assert "Traceback" not in err
    assert f"{job}: RUNNING" in command("jobs", "status", job, "--address", address)[1]
    assert command("jobs", "stop", job, "--address", address)[0] == 0
    code, _, err = command("jobs", "logs", job, "--address", address)
    assert (code, f"job {job}: was stopped" in err) == (3, True)


def test_a_cluster_asks_for_its_token(address, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    assert command("jobs", "list", "--address", address) == (
        2,
        "",
        f"Error: {address}: the cluster asks for its token; {SET_TOKEN}\n",
    )


def test_unknown_jobs(address):
    code, _, err = command("jobs", "status", "tunesmith-none", "--address", address)
    assert code == 2
    assert err == (f"Error: job tunesmith-none: {address} knows no such job; see: tunesmith jobs list\n")
