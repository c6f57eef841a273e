"""The command serve: one engine of ours, vLLM's server, or several processes on Ray Serve."""

import re
from pathlib import Path

import click
from click.core import ParameterSource

from tunesmith.commands.options import OUTPUTS
from tunesmith.errors import ConfigError
from tunesmith.starting import search_paused

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """Bytes: ``6GB``, ``512MiB``, or a plain number."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Z]*)", text.strip().upper())
    number = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if number < 1:
        raise click.BadParameter(f"{text!r} is no size; write 6GB, 512MiB or the like")
    return int(number)


@click.command()
@click.option(
    "--base",
    "bases",
    multiple=True,
    help="A base: catalog name, folder, hub id, or tag of a full-parameter run; may be repeated.",
)
@click.option(
    "--dynamic-lora-loading-path",
    "loading_path",
    metavar="PLACE",
    help="Folder or URL (s3://…) of adapters and full-parameter checkpoints; each in it is a model, new ones without "
    "a restart.",
)
@click.option(
    "--max-memory",
    callback=_size,
    metavar="SIZE",
    help="Most that all models take, such as 6GB; those not in use make room.  [default: 80 % of what is free]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0: any free one."
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name that the server may be asked by beside localhost and addresses, *.NAME for all below it; may be "
    "repeated. With TUNESMITH_API_KEY set any name may.",
)
@click.option(
    "--max-running",
    type=click.IntRange(1, 1_024),
    default=16,
    show_default=True,
    help="Answers made at once.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(0, 100_000),
    default=64,
    show_default=True,
    help="Answers that wait beside them; more are told to come again.",
)
@click.option(
    "--grace-seconds",
    type=click.IntRange(0, 86_400),
    default=30,
    show_default=True,
    help="How long answers may go on after SIGTERM.",
)
@click.option(
    "--engine",
    type=click.Choice(["tunesmith", "vllm"]),
    default="tunesmith",
    show_default=True,
    help="What makes the tokens; vllm: vLLM's own server, of this environment or of TUNESMITH_VLLM_PYTHON's.",
)
@click.option("--ray", "on_ray", is_flag=True, help="Run the bases on Ray Serve, several processes for each.")
@click.option(
    "--config",
    "config",
    type=click.Path(path_type=Path),
    help="YAML of --ray with everything that the other options say, and how many processes there are.",
)
@click.option(
    "--write-config",
    "new_config",
    type=click.Path(path_type=Path),
    help="Write such a YAML from the other options, and serve nothing.",
)
@click.option(
    "--log-requests",
    "log_contents",
    is_flag=True,
    help="Write prompts and answers too into the log of requests on standard error.",
)
@OUTPUTS
@click.pass_context
def serve(
    context: click.Context,
    bases: tuple[str, ...],
    loading_path: str | None,
    max_memory: int | None,
    host: str,
    port: int,
    allowed_hosts: tuple[str, ...],
    max_running: int,
    max_waiting: int,
    grace_seconds: int,
    engine: str,
    on_ray: bool,
    config: Path | None,
    new_config: Path | None,
    log_contents: bool,
    output_dirs: tuple[Path, ...],
) -> None:
    """Serve bases and every adapter on them, with OpenAI's interface.

    TUNESMITH_API_KEY in the environment is the key that clients need, TUNESMITH_ADMIN_KEY the one for loading and
    unloading adapters.
    """
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("serve", f"needs {error.name}", "run: pip install 'tunesmith[serve]'") from error
    if on_ray or config is not None or new_config is not None:
        _serve_on_ray(context)
        return
    if not bases:
        raise click.UsageError("Missing option '--base'.", context)
    with search_paused():
        from tunesmith.serving.bucket import local_root

    if engine == "vllm":
        from tunesmith.serving.vllm_server import VllmOptions, serve_with_vllm

        if len(bases) > 1 or max_memory is not None:
            raise ConfigError(
                "--engine vllm", "serves one base, without --max-memory", "leave the others out"
            )
        if allowed_hosts:
            fault = "is vLLM's own server, which takes any name"
            raise ConfigError("--engine vllm", fault, "leave out --allowed-host and set TUNESMITH_API_KEY")
        with local_root(loading_path, _say) as root:
            serve_with_vllm(VllmOptions(bases[0], root, host, port, max_running, grace_seconds), _say)
        return
    with search_paused():
        from tunesmith.serving.server import ServeOptions
        from tunesmith.serving.server import serve as run

    with local_root(loading_path, _say) as root:
        options = ServeOptions(
            bases,
            root,
            host,
            port,
            max_running,
            max_waiting,
            grace_seconds,
            max_memory,
            output_dirs,
            log_contents,
            allowed_hosts,
        )
        run(options, _say)


def _serve_on_ray(context: click.Context) -> None:
    """``serve`` with --ray, or what belongs to it."""
    from tunesmith.serving.ray_config import from_options, write_config

    given = {
        str(option.name): option.opts[0]
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    }
    chosen, new = from_options(context.params, given), context.params["new_config"]
    if new is not None:
        write_config(chosen, new)
        _say(f"Wrote {new}; serve it with: tunesmith serve --ray --config {new}")
        return
    from tunesmith.serving.ray_app import serve_with_ray

    serve_with_ray(chosen, _say)


def _say(text: str) -> None:
    click.echo(text, err=True)
