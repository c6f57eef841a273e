"""Commands on a Ray cluster: submit, and jobs with list, status, logs and stop."""

import click

from tunesmith.commands.options import JSON, SET, SKIP
from tunesmith.commands.printing import print_json, terminal

_ADDRESS = click.option(
    "--address",
    metavar="URL",
    help="Dashboard of the Ray cluster, as http://HOST:8265.  [default: RAY_ADDRESS]",
)


@click.command()
@click.argument("config")
@_ADDRESS
@SET
@click.option(
    "--env",
    "names",
    multiple=True,
    metavar="NAME",
    help="Variable of this environment for the job; may be repeated.",
)
@click.option("--detach", is_flag=True, help="Send it and do not follow its log.")
@SKIP
def submit(
    config: str,
    address: str | None,
    overrides: tuple[str, ...],
    names: tuple[str, ...],
    detach: bool,
    skip_bad_rows: bool,
) -> None:
    """Fine-tune as CONFIG says on a Ray cluster, and follow the log; Ctrl-C leaves the job to itself.

    The local files that CONFIG names go along. tunesmith must be installed on the cluster.
    """
    from tunesmith.config.load import load_config
    from tunesmith.jobs.command import submit as send

    arguments = ("--skip-bad-rows",) if skip_bad_rows else ()
    send(load_config(config, overrides), address, names, terminal(), detach=detach, arguments=arguments)


@click.group()
def jobs() -> None:
    """What has been submitted to a Ray cluster."""


@jobs.command("list")
@_ADDRESS
@JSON
def jobs_list(address: str | None, as_json: bool) -> None:
    """The jobs that the cluster remembers, newest first."""
    from tunesmith.jobs.client import Cluster
    from tunesmith.jobs.command import print_jobs

    found = Cluster(address).jobs()
    if as_json:
        print_json([job.facts() for job in found])
    else:
        print_jobs(terminal(), found)


@jobs.command("status")
@click.argument("job")
@_ADDRESS
@JSON
def jobs_status(job: str, address: str | None, as_json: bool) -> None:
    """How JOB is."""
    from tunesmith.jobs.client import Cluster
    from tunesmith.jobs.command import print_job

    found = Cluster(address).job(job)
    if as_json:
        print_json(found.facts())
    else:
        print_job(terminal(), found)


@jobs.command("logs")
@click.argument("job")
@_ADDRESS
def jobs_logs(job: str, address: str | None) -> None:
    """What JOB has written, and on until it has ended; Ctrl-C leaves it to itself."""
    from tunesmith.jobs.client import Cluster
    from tunesmith.jobs.command import follow

    follow(Cluster(address), job)


@jobs.command("stop")
@click.argument("job")
@_ADDRESS
def jobs_stop(job: str, address: str | None) -> None:
    """End JOB by SIGTERM, and by force where it has not ended 3 seconds later; its checkpoints stay."""
    from tunesmith.jobs.client import Cluster
    from tunesmith.jobs.command import print_job

    print_job(terminal(), Cluster(address).stop(job))
