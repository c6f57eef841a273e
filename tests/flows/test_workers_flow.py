"""``tunesmith finetune`` with several workers, through Ray itself."""

import io
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from flow_parts import (
    LORA,
    checkpoint_steps,
    events,
    finetune,
    refused,
    report,
    runs_in,
    settings_for,
    start,
    tensors,
    write_config,
)
from tunesmith.checkpoints.lock import LOCK_NAME
from tunesmith.checkpoints.manifest import read_manifest
from tunesmith.checkpoints.store import newest_checkpoint
from tunesmith.cluster.ray_setup import import_ray
from tunesmith.config.load import load_config
from tunesmith.run import finetune as run_here

pytest.importorskip("ray.train", reason="the extra tunesmith[ray] is not installed")
pytestmark = pytest.mark.flow
BUSY_SECONDS = 480  # Ray and two imports of torch, on a machine that has much else to do
ZERO_3 = {"deepspeed": {"config_path": "deepspeed_configs/zero_3.json"}}
EVERY_STEP = {
    "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
    "num_checkpoints_to_keep": 100,
}


def losses(run: Path) -> list[float]:
    return [event["train_loss_batch"] for event in events(run, "step")]


def test_two_workers_leave_what_one_process_leaves(tmp_path, tiny, rows, capfd):
    # 20 rows in steps of 8: the last step has 4.
    shared = {"lora_config": LORA, "evaluation": {"metric": "token_f1", "max_new_tokens": 6}, "num_epochs": 2}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = finetune(tmp_path / "one", tiny, rows, train_batch_size_per_device=8, **shared)
    capfd.readouterr()
    two = finetune(tmp_path / "two", tiny, rows, train_batch_size_per_device=4, num_devices=2, **shared)
    out, err = capfd.readouterr()
    assert "2, each with" in out
    assert "Chat with it" in out
    assert "Traceback" not in out + err
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    alone, together = report(one), report(two)
    assert (alone["workers"], together["workers"]) == (1, 2)
    assert together["after"]["loss"] == pytest.approx(alone["after"]["loss"], rel=1e-5)
    assert together["after"]["value"] == alone["after"]["value"]
    assert together["samples"] == alone["samples"]
    assert (together["steps"], together["trained_tokens"]) == (alone["steps"], alone["trained_tokens"])
    wanted, found = tensors(one / "best"), tensors(two / "best")
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
    assert read_manifest(two / "best").environment["workers"] == "2"
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()} | {"logs"}
    logs = sorted((two / "logs").iterdir())
    assert [log.name for log in logs] == ["worker-0.log", "worker-1.log"]
    for rank, log in enumerate(logs):
        assert re.match(rf"--- \d.* worker {rank} of 2, process \d+\n", log.read_text())
    for event in events(two, "step"):
        assert len(event["worker_times"]) == 2
        assert event["slowest_worker"] in (0, 1)
        assert 0 < event["mean_worker_time"] <= event["slowest_worker_time"] <= event["train_time_per_step"]
    assert together["peak_rss_bytes"] >= max(event["peak_memory"] for event in events(two, "step"))


def end_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process writes until it ends by itself."""
    try:
        return process.communicate(timeout=BUSY_SECONDS)
    finally:
        process.kill()


def started(folder: Path, model: Path, rows: Path, **changed):
    """A run with two workers in a process of its own, once it has saved its second checkpoint; its folder."""
    settings = settings_for(
        folder, model, rows, **{**EVERY_STEP, "num_devices": 2, "train_batch_size_per_device": 1, **changed}
    )
    config = write_config(folder / "config.yaml", settings)
    process = start("finetune", str(config))
    waited_until = time.monotonic() + BUSY_SECONDS
    while time.monotonic() < waited_until and process.poll() is None:
        for run in runs_in(folder / "outputs"):
            if (newest := newest_checkpoint(run)) and read_manifest(newest).step >= 2:
                return process, config, run
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("spread", [{}, ZERO_3], ids=["each has all weights", "each has a share"])
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_been(tmp_path, tiny, rows, spread):
    process, _, run = started(tmp_path, tiny, rows, lora_config=LORA, num_epochs=3, **spread)
    before = max(checkpoint_steps(run))
    first = int((run / LOCK_NAME).read_text())  # the first worker holds the run
    os.kill(first, signal.SIGKILL)
    out, err = end_of(process)
    assert process.returncode == 0, out + err
    said = "A worker was lost: the run goes on from its last checkpoint. What it wrote is in "
    assert f"{said}{run.resolve()}/logs." in out
    log = (run / "logs" / "worker-0.log").read_text()  # of both processes that were the first worker
    assert [f"process {first}\n" in log, log.count("worker 0 of 2, process ")] == [True, 2]
    assert (run / "logs" / "worker-1.log").read_text().count("worker 1 of 2, process ") == 2
    found = report(run)
    assert (found["status"], found["steps"]) == ("finished", 30)
    (resumed_at,) = found["resumed_at"]
    assert resumed_at >= before
    (tmp_path / "one").mkdir()
    one = finetune(
        tmp_path / "one",
        tiny,
        rows,
        lora_config=LORA,
        num_epochs=3,
        train_batch_size_per_device=2,
        **EVERY_STEP,
    )
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Any]:
    """A cluster of Ray: a head that only takes drivers, and two nodes with a core each."""
    import_ray("num_devices")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 2**27}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(**node)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


def _has_desk(node: Any) -> bool:
    """Whether the run's messages lie on this node: the driver's own."""
    (raylet,) = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children(recursive=True)
    return any("ray::Desk" in " ".join(child.cmdline()) for child in children)


def test_a_node_that_goes_is_made_up_for_by_another(tmp_path, tiny, rows, nodes):
    process, _, run = started(tmp_path, tiny, rows, lora_config=LORA, num_epochs=3)
    before = max(checkpoint_steps(run))
    # Of three nodes of one machine a driver may take any for its own, and ends with that.
    gone = next(node for node in nodes.worker_nodes if not _has_desk(node))
    nodes.add_node(num_cpus=1, object_store_memory=2**27)
    nodes.remove_node(gone, allow_graceful=False)
    out, err = end_of(process)
    assert process.returncode == 0, out + err
    assert "A worker was lost: the run goes on from its last checkpoint." in out
    found = report(run)
    assert (found["status"], found["steps"]) == ("finished", 30)
    (resumed_at,) = found["resumed_at"]
    assert resumed_at >= before
    (tmp_path / "one").mkdir()
    alone = {"num_epochs": 3, "train_batch_size_per_device": 2, **EVERY_STEP}
    one = finetune(tmp_path / "one", tiny, rows, lora_config=LORA, **alone)
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)


def test_a_lost_desk_is_told_in_one_line(tmp_path, tiny, rows):
    process, _, run = started(tmp_path, tiny, rows, lora_config=LORA, num_epochs=30)
    above = psutil.Process(process.pid).children(recursive=True)
    (desk,) = [child for child in above if "ray::Desk" in " ".join(child.cmdline())]
    desk.kill()
    out, err = end_of(process)
    assert process.returncode == 3, out + err
    assert "Traceback" not in out + err
    wanted = "Error: workers: the machine with the run's messages was lost; the run can go on from its last checkpoint"
    assert wanted in err
    assert newest_checkpoint(run)


def test_a_full_cluster_is_told_while_the_run_waits(tmp_path, tiny, rows, own_ray, monkeypatch):
    """All cores are another's until the run has said that it waits for them."""

    class Holder:
        def ready(self) -> bool:
            return True

    monkeypatch.setattr("tunesmith.cluster.driver._WAIT_SECONDS", 1.0)
    holder = own_ray.remote(num_cpus=2)(Holder).remote()
    assert own_ray.get(holder.ready.remote())
    said = io.StringIO()

    def let_go() -> None:
        until = time.monotonic() + BUSY_SECONDS
        while "waiting for 2 CPUs; Ctrl-C" not in said.getvalue() and time.monotonic() < until:
            time.sleep(0.2)
        own_ray.kill(holder)

    config = write_config(tmp_path / "c.yaml", settings_for(tmp_path, tiny, rows, num_devices=2))
    threading.Thread(target=let_go).start()
    record = run_here(load_config(str(config), []), Console(file=said))
    assert "The cluster is full: waiting for 2 CPUs; Ctrl-C ends the waiting." in said.getvalue()
    assert record.status == "finished"


def test_ctrl_c_saves_and_another_number_of_workers_goes_on(tmp_path, tiny, rows):
    process, config, run = started(tmp_path, tiny, rows, num_epochs=4, learning_rate=0.001)
    process.send_signal(signal.SIGINT)
    out, err = end_of(process)
    assert process.returncode == 130, out + err
    assert "SIGINT after step" in err
    assert "the best checkpoint is" in err
    assert report(run)["status"] == "interrupted"
    stopped_at = max(checkpoint_steps(run))
    # One process has to take two rows where each of two workers took one.
    again = start(
        "finetune", str(config), "--resume", "auto", "--set", "num_devices=1", "--set", "num_epochs=4"
    )
    out, err = end_of(again)
    assert again.returncode == 0, out + err
    assert "began with 2 workers, goes on with 1" in " ".join(out.split())
    assert runs_in(tmp_path / "outputs") == {run}
    assert report(run)["resumed_at"] == [stopped_at]
    assert [event["step"] for event in events(run, "step")] == list(range(1, 41))
    (tmp_path / "one").mkdir()
    one = finetune(
        tmp_path / "one",
        tiny,
        rows,
        num_epochs=4,
        learning_rate=0.001,
        train_batch_size_per_device=2,
        **EVERY_STEP,
    )
    assert losses(run) == pytest.approx(losses(one), rel=1e-4)


def test_a_killed_driver_leaves_a_run_that_goes_on(tmp_path, tiny, rows):
    process, config, run = started(tmp_path, tiny, rows, lora_config=LORA, num_epochs=4)
    first = psutil.Process(int((run / LOCK_NAME).read_text()))
    process.kill()
    process.communicate()
    # At once: a worker that still holds the run is waited for.
    again = start("finetune", str(config), "--resume", "auto", "--set", "num_epochs=4")
    out, err = end_of(again)
    assert again.returncode == 0, out + err
    assert report(run)["status"] == "finished"
    assert runs_in(tmp_path / "outputs") == {run}
    assert not first.is_running()  # no worker goes on without a driver
    assert [event["step"] for event in events(run, "step")] == list(range(1, 41))


@pytest.fixture
def own_ray() -> Iterator[Any]:
    """A Ray that is there already, whose processes report their metrics often."""
    ray = import_ray("num_devices")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=2**28,
        _node_ip_address="127.0.0.1",
        _system_config={"metrics_report_interval_ms": 200},
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


def test_the_metrics_of_a_run_are_at_rays_endpoint(tmp_path, tiny, rows, own_ray):
    (node,) = own_ray.nodes()
    seen: dict[str, set[tuple[str, float]]] = {}
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.wait(0.2):
            with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics") as page:
                text = page.read().decode()
            for name, labels, value in re.findall(r"^ray_tunesmith_(\w+){(.*)} (\S+)$", text, re.M):
                run = re.search(r'\brun="([^"]+)"', labels)
                assert run is not None
                seen.setdefault(name, set()).add((run[1], float(value)))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        run = finetune(tmp_path, tiny, rows, num_devices=2, train_batch_size_per_device=1, num_epochs=20)
    finally:
        is_over.set()
        scraper.join()
    steps = events(run, "step")
    for name in ("train_loss_batch", "trained_tokens_throughput", "step", "slowest_worker_time"):
        assert seen[name] <= {(run.name, float(step[name])) for step in steps}, name
    assert len(seen["step"]) > 1
    assert seen["eval_loss"] <= {(run.name, event["eval_loss"]) for event in events(run, "eval")}


def test_a_users_error_is_one_line_with_its_exit_code(tmp_path, tiny, rows, capfd):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    settings = settings_for(tmp_path, tiny, rows, num_devices=2, train_path=str(tmp_path / "bad.jsonl"))
    config = write_config(tmp_path / "config.yaml", settings)
    assert "bad.jsonl" in refused(capfd, ["finetune", str(config)], code=2, lines=2)
    settings = settings_for(
        tmp_path, tiny, rows, num_devices=2, worker_resources={"accelerator_type:A10G": 0.001}
    )
    write_config(tmp_path / "config.yaml", settings)
    said = refused(capfd, ["finetune", str(config)])
    assert (
        "asks for 2 GPUs, 0.002 accelerator_type:A10G; the cluster has 0 GPUs, 0 accelerator_type:A10G"
        in said
    )
    assert runs_in(tmp_path / "outputs") == set()
