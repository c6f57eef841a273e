"""``tunesmith submit`` and ``tunesmith jobs``: a run on a cluster, from its configuration to its last line."""

import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.config.load import LoadedConfig
from tunesmith.errors import Interrupted
from tunesmith.jobs.bundle import pack, shown_sizes
from tunesmith.jobs.client import Cluster, Job, chosen_variables, outcome


def submit(
    loaded: LoadedConfig,
    address: str | None,
    names: Sequence[str],
    console: Console,
    *,
    detach: bool = False,
    arguments: Sequence[str] = (),
) -> str:
    """Send a run to a cluster and follow it, unless ``detach``; the job's id.

    Args:
        loaded: the configuration.
        address: of the cluster's dashboard; None: ``RAY_ADDRESS``.
        names: variables of this environment that the job gets.
        console: where to print what is sent, and what the job writes.
        detach: end once the job is sent.
        arguments: of ``tunesmith finetune``, besides the configuration.

    Raises:
        ConfigError, DataError: what is to be sent, or the cluster, cannot be used; nothing was sent.
        RunError: the job ended otherwise than well.
        Interrupted: Ctrl-C; the job goes on.
    """
    variables = chosen_variables(names)
    with tempfile.TemporaryDirectory(prefix="tunesmith-job-") as folder:
        parcels = pack(loaded, Path(folder))
        cluster = Cluster(address)
        _print(console, f"Sending to {cluster.address}: the configuration")
        for line in shown_sizes(parcels):
            _print(console, f"  {line}")
        if variables:
            _print(
                console,
                f"  variables {', '.join(sorted(variables))}: whoever may use the cluster can read them",
            )
        name = cluster.submit(Path(folder), variables, arguments)
    _print(console, f"Job {name} is sent")
    if detach:
        _print(console, f"Follow it: {cluster.again('logs', name)}")
        return name
    follow(cluster, name)
    return name


def follow(cluster: Cluster, name: str) -> None:
    """Write what the job writes to standard output until it has ended.

    Raises:
        RunError: it ended otherwise than well.
        Interrupted: Ctrl-C; the job goes on.
    """
    try:
        job = cluster.follow(name, _write)
    except KeyboardInterrupt:
        remedy = f"follow: {cluster.again('logs', name)}; stop: {cluster.again('stop', name)}"
        raise Interrupted(f"job {name}", "goes on without you", remedy) from None
    outcome(cluster, job)


def print_job(console: Console, job: Job) -> None:
    """One job in a line."""
    _print(console, f"{job.id}: {job.status}{_times(job)}{f'; {job.message}' if job.message else ''}")


def print_jobs(console: Console, jobs: Sequence[Job]) -> None:
    """A table of jobs."""
    if not jobs:
        _print(console, "The cluster knows no jobs")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "status", "started", "took"):
        table.add_column(heading)
    for job in jobs:
        started = datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M:%S") if job.started else ""
        table.add_row(Text(job.id), job.status, started, _took(job))
    console.print(table)


def _times(job: Job) -> str:
    took = _took(job)
    return f", {'took' if job.has_ended else 'for'} {took}" if took else ""


def _took(job: Job) -> str:
    if job.started is None:
        return ""
    seconds = max(0, round((job.ended or time.time()) - job.started))  # the cluster's clock may be ahead
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
