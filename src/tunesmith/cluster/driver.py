"""A run on several workers, seen from the process that the user started: it asks, watches, prints and stops."""

import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.cluster.desk import Desk, News
from tunesmith.cluster.ray_setup import connected, import_ray
from tunesmith.cluster.resources import (
    Request,
    Resources,
    node_beside,
    refuse_impossible,
    refuse_nothing,
    request_of,
)
from tunesmith.cluster.worker import Screen, Task, work
from tunesmith.cluster.worker_log import LOGS
from tunesmith.config.deepspeed_file import read_deepspeed
from tunesmith.config.deepspeed_use import gathering, offloads
from tunesmith.config.load import LoadedConfig
from tunesmith.errors import RunError
from tunesmith.run import RunOptions
from tunesmith.tracking.events import RunRecord
from tunesmith.training.stop import stop_on_signals

# A machine that dies, a worker killed for its memory, and one more: what fails again after that fails always.
MAX_FAILURES = 3
_LOOK_SECONDS = 0.1
# That the other workers may take to end by themselves, once one has told how the run ended.
_GRACE_SECONDS = 15.0
_ANSWER_SECONDS = 60.0  # that the desk may be out of reach: a line breaks, a machine has much else to do
_WAIT_SECONDS = 20.0  # for the first worker, after which a full cluster is told as the reason


def finetune_on_cluster(loaded: LoadedConfig, console: Console, options: RunOptions) -> RunRecord:
    """Fine-tune on ``num_devices`` workers of Ray Train.

    A worker that is lost is replaced, with all others, up to ``MAX_FAILURES`` times: they go on from the last
    checkpoint, as ``--resume`` does.

    Raises:
        TunesmithError: as ``finetune``, and where the cluster has not what is asked for or loses workers too often.
    """
    settings = loaded.config.cluster
    place = loaded.place("num_devices")
    gathered, moved = None, False
    if settings.deepspeed is not None:
        sharding = read_deepspeed(settings.deepspeed.config_path)
        gathered, moved = gathering(sharding, settings.num_devices), offloads(sharding, settings.num_devices)
    ray = import_ray(place)
    with connected(ray, settings.num_devices), tempfile.TemporaryDirectory() as notes:
        request = request_of(
            settings.num_devices,
            settings.worker_resources,
            settings.trainer_resources,
            ray.cluster_resources(),
        )
        refuse_nothing(request, loaded.place("worker_resources"))
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        if not os.environ.get("TUNESMITH_CLUSTER_GROWS"):
            refuse_impossible(request, list(nodes.values()), place)
        desk = _desk(ray, request, nodes)
        screen = Screen(console.is_terminal, console.width, console.height, console.color_system)  # type: ignore[arg-type]
        text = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(text) if text.isdigit() else None
        task = Task(loaded, options, Path.cwd(), screen, threads, gathered, moved, desk)
        fit = _Fit(_trainer(request, task, notes))
        news = _watch(_Line(ray, desk), request, fit, console)
        if fit.is_alive():  # a worker waits for one that has ended: only the end of the job frees it
            ray.shutdown()
    return _outcome(news, fit)


def _desk(ray: Any, request: Request, nodes: Mapping[str, Resources]) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # It holds what is asked for beside the workers: Ray Train's own controller takes nothing. On the driver's machine
    # where that has room: another may go, and with it all messages.
    beside, here = dict(request.beside), ray.get_runtime_context().get_node_id()
    where = NodeAffinitySchedulingStrategy(node_beside(request, nodes, here) or here, soft=True)
    return (
        ray.remote(Desk)
        .options(
            num_cpus=beside.pop("CPU", 0),
            num_gpus=beside.pop("GPU", 0),
            memory=int(beside.pop("memory", 0)) or None,
            resources=beside,
            scheduling_strategy=where,
        )
        .remote()
    )


def _trainer(request: Request, task: Task, notes: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    return TorchTrainer(
        lambda: work(task),
        # Long, because the first worker may tokenise for hours while the others wait; who died Ray tells by itself.
        torch_config=TorchConfig(backend=_backend(request, task), timeout_s=24 * 3600),
        scaling_config=ScalingConfig(
            num_workers=request.workers, use_gpu=request.uses_gpus, resources_per_worker=dict(request.each)
        ),
        # Ray's own notes of the run: nothing is kept in them, checkpoints are in the run's folder.
        run_config=RunConfig(
            name="tunesmith",
            storage_path=notes,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _backend(request: Request, task: Task) -> str | None:
    """What the workers talk over; None: as Ray chooses, NCCL between GPUs, else gloo."""
    # Shares in the host's memory are summed there, when gradients are clipped.
    return "cpu:gloo,cuda:nccl" if request.uses_gpus and task.offloads else None


class _Fit(threading.Thread):
    """``trainer.fit()``, while the main thread prints and takes signals."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # told by the main thread
            self.error = error


class _Line:
    """The driver's line to the desk, which may be waiting for room in the cluster, or go with its machine."""

    def __init__(self, ray: Any, desk: Any) -> None:
        self._ray, self._desk = ray, desk
        self._asked: Any = None
        self._heard = time.monotonic()

    def news(self) -> News | None:
        """What has come in; None: the desk does not answer now.

        Raises:
            RunError: it will not answer any more.
        """
        self._asked = self._asked or self._desk.news.remote()
        if not self._ray.wait([self._asked], timeout=1.0)[0]:
            return None
        asked, self._asked = self._asked, None
        try:
            news: News = self._ray.get(asked)
        except self._ray.exceptions.RayActorError as error:
            is_lost = isinstance(error, self._ray.exceptions.ActorDiedError)
            if not is_lost and time.monotonic() - self._heard < _ANSWER_SECONDS:
                return None
            fault = "the machine with the run's messages was lost"
            raise RunError(
                "workers", fault, "the run can go on from its last checkpoint: give --resume auto"
            ) from error
        self._heard = time.monotonic()
        return news

    def ask_to_stop(self, signal_name: str) -> None:
        self._desk.ask_to_stop.remote(signal_name)

    def is_full(self) -> bool:
        """Whether something waits for room in the cluster."""
        from ray.util import placement_group_table

        return any(group["state"] == "PENDING" for group in placement_group_table().values())


def _watch(line: _Line, request: Request, fit: _Fit, console: Console) -> News:
    """Print what comes in and pass signals on until the run has ended; how it ended."""
    begun, ended = time.monotonic(), 0.0
    is_asked, is_waiting, heeds = False, False, False
    with stop_on_signals() as stop:  # a second signal ends this process at once, and the workers with it
        while True:
            is_running = fit.is_alive()  # before the news: what comes after its end is in them
            news = line.news()
            if news is not None:
                heeds = news.heeds  # kept while the desk is too busy to answer
                console.file.write(news.text)
                console.file.flush()
            if stop.signal_name and not is_asked:
                if not heeds:
                    raise KeyboardInterrupt
                line.ask_to_stop(stop.signal_name)
                is_asked = True
            if not (is_waiting or (news and news.begun)) and time.monotonic() - begun > _WAIT_SECONDS:
                is_waiting = news is None or line.is_full()
                if is_waiting:
                    said = f"The cluster is full: waiting for {request.shown()}; Ctrl-C ends the waiting."
                    console.print(said, style="yellow", markup=False, soft_wrap=True)
            if news and (news.error or news.crash or news.record):
                ended = ended or time.monotonic()
            if news and (not is_running or (ended and time.monotonic() - ended > _GRACE_SECONDS)):
                return news
            fit.join(_LOOK_SECONDS)


def _outcome(news: News, fit: _Fit) -> RunRecord:
    if news.error is not None:
        raise news.error
    if news.record is not None:
        return news.record
    if news.crash is not None:
        raise RuntimeError(f"a worker failed:\n{news.crash}")
    from ray.train import WorkerGroupError

    reason = " ".join(str(fit.error).split())[:300]
    remedy = "mend that and start it again: nothing has been saved yet"
    if news.folder is not None:
        remedy = f"see {news.folder / LOGS}; the run can go on from its last checkpoint: give --resume auto"
    is_loss = isinstance(fit.error, WorkerGroupError)
    fault = f"were lost more than {MAX_FAILURES} times" if is_loss else "were given up by Ray Train"
    raise RunError("workers", f"{fault} ({reason})", remedy) from fit.error
