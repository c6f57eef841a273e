"""One worker's part of a run: what Ray Train calls in each of the processes that it starts."""

import io
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from tunesmith.checkpoints.lock import wait_until_free
from tunesmith.cluster.ray_setup import cores
from tunesmith.cluster.worker_log import LOGS, WorkerLog, worker_log
from tunesmith.config.load import LoadedConfig
from tunesmith.errors import TunesmithError
from tunesmith.run import RunOptions, carry_out
from tunesmith.training.process_group import ProcessGroup, WorkerLostError, tells_of_loss, workers_here
from tunesmith.training.sharded_group import ShardedGroup
from tunesmith.training.stop import StopRequest
from tunesmith.training.workers import Workers

_LOOK_SECONDS = 0.3  # between looks for a stop
_LOCK_SECONDS = 60.0  # that a killed worker may take to let go of the run's folder


@dataclass(frozen=True)
class Screen:
    """What the driver prints on."""

    is_terminal: bool
    width: int
    height: int
    colours: Literal["auto", "standard", "256", "truecolor", "windows"] | None


@dataclass(frozen=True)
class Task:
    """All that a worker is told.

    Attributes:
        folder: that the driver was called in: settings may name files from there.
        threads: of each worker; None: the cores of its machine, shared out.
        gathering: how weights that are split over the workers are gathered; None: each has all of them.
        offloads: whether what is split lies in the host's memory.
        desk: the actor of ``cluster/desk.py``.
    """

    loaded: LoadedConfig
    options: RunOptions
    folder: Path
    screen: Screen
    threads: int | None
    gathering: bool | int | None
    offloads: bool
    desk: Any


def work(task: Task) -> None:
    """Carry out the run together with the other workers, or go on with it where an earlier set of them was lost.

    What ends the run, its record or an error, goes to the desk. Only the loss of another worker is raised, so that Ray
    starts a new set.
    """
    import ray

    if ray.get(task.desk.is_over.remote()):
        return
    with suppress(OSError):  # another machine may not have that folder
        os.chdir(task.folder)
    workers = (
        ProcessGroup(workers_here())
        if task.gathering is None
        else ShardedGroup(workers_here(), task.gathering, offloads=task.offloads)
    )
    torch.set_num_threads(task.threads or max(1, cores() // workers.here))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for what is started from here
    with worker_log(workers.rank, workers.world) as log:
        _work(task, workers, log)


def _work(task: Task, workers: Workers, log: WorkerLog) -> None:
    import ray

    def opened(folder: Path) -> None:
        log.open(folder)
        if workers.rank == 0:
            ray.get(task.desk.open.remote(folder.resolve()))

    stop = StopRequest()
    try:
        with _stop_of_driver(workers, task.desk, stop):
            record = carry_out(
                task.loaded, _console(workers, task), _options(workers, task), workers, stop, opened
            )
    except WorkerLostError:
        traceback.print_exc()
        raise
    except TunesmithError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        ray.get(task.desk.fail.remote(workers.rank, error.with_traceback(None)))
    except Exception as error:
        traceback.print_exc()
        if tells_of_loss(error):
            raise WorkerLostError(str(error)) from error
        written = f"what this worker wrote: {log.path.resolve()}\n" if log.path else ""
        ray.get(task.desk.crash.remote(traceback.format_exc() + written))
    else:
        if workers.rank == 0:
            ray.get(task.desk.finish.remote(record))


def _options(workers: Workers, task: Task) -> RunOptions:
    """Those of the driver; a further set of workers goes on with the run that the first one opened."""
    import ray

    if workers.rank or not ray.get(task.desk.start.remote()):
        return task.options
    folder: Path | None = ray.get(task.desk.folder.remote())
    if folder is None:
        return task.options
    wait_until_free(folder, _LOCK_SECONDS)
    said = (
        f"A worker was lost: the run goes on from its last checkpoint. What it wrote is in {folder / LOGS}."
    )
    _console(workers, task).print(said, style="yellow", markup=False, soft_wrap=True)
    return replace(task.options, resume=str(folder))


def _console(workers: Workers, task: Task) -> Console:
    """Prints where the driver prints; of the other workers nowhere."""
    screen = task.screen
    return Console(
        file=_Wire(task.desk),  # type: ignore[arg-type]  # a console only writes and flushes
        quiet=workers.rank > 0,
        force_terminal=screen.is_terminal,
        color_system=screen.colours,
        width=screen.width,
        height=screen.height,
        highlight=False,
    )


class _Wire(io.TextIOBase):
    """Sends what is written to the desk."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def write(self, text: str) -> int:
        self._desk.write.remote(text)
        return len(text)


@contextmanager
def _stop_of_driver(workers: Workers, desk: Any, stop: StopRequest) -> Iterator[None]:
    """Within the block a stop that the driver asks for reaches ``stop``; without a driver this process ends."""
    import ray

    done = threading.Event()

    def watch() -> None:
        told = False
        while not done.wait(_LOOK_SECONDS):
            try:
                if stop.is_heeded != told:
                    told = stop.is_heeded
                    ray.get(desk.heeds.remote(told))
                stop.signal_name = stop.signal_name or ray.get(desk.stop.remote())
            except ray.exceptions.RayActorError:
                # Nobody is left to tell, and the run's folder must be free for whoever goes on with it.
                os._exit(1)

    if workers.rank:
        yield
        return
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
