"""The command line: the group of all commands, and ``main``, which turns errors into a line and an exit code.

Each command is one short function of the package ``commands``: it reads its arguments, calls one function, prints.
Nothing heavy is imported until a command needs it, so that ``--help`` answers at once.
"""

import atexit
import errno
import gc
import io
import os
import sys
import warnings
from collections.abc import Sequence

import click

from tunesmith import __version__
from tunesmith.commands.jobs import jobs, submit
from tunesmith.commands.judging import compare, evaluate, inspect, verify
from tunesmith.commands.results import chat, merge, models
from tunesmith.commands.serve import serve
from tunesmith.commands.training import check, convert, finetune, plan
from tunesmith.errors import ConfigError, Interrupted, TunesmithError, shown_value


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tunesmith")
def cli() -> None:
    """Fine-tune an open-weight LLM from one YAML file: LoRA if the file has lora_config, full if not."""


for _command in (
    finetune,
    check,
    plan,
    convert,
    compare,
    evaluate,
    chat,
    merge,
    verify,
    inspect,
    models,
    submit,
    jobs,
    serve,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of ours become one line on standard error and their exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character must not end a run
            stream.reconfigure(errors="backslashreplace")
    _silence_libraries()
    try:
        cli.main(args=arguments, prog_name="tunesmith", standalone_mode=False)
    except TunesmithError as error:
        return _tell(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        _end_soon()
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of our output (head, less) has left: nothing to tell anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # Any setting or argument may be taken for a path.
        return _tell(ConfigError(shown_value(error.filename), "is too long for a file's name", "check it"))
    return 0


def _tell(error: TunesmithError) -> int:
    colour = "yellow" if isinstance(error, Interrupted) else "red"
    label = "Stopped" if isinstance(error, Interrupted) else "Error"
    if isinstance(error, Interrupted):
        _end_soon()
    click.secho(f"{label}: ", fg=colour, bold=True, nl=False, err=True)
    click.echo(str(error), err=True)
    return error.exit_code


def _end_soon() -> None:
    # On its way out Python looks for cycles through all that torch and transformers have made: over a second of
    # computing, on a busy machine ten. Whoever stopped the program has begun to wait.
    atexit.register(gc.freeze)


def _silence_libraries() -> None:
    # Their warnings are for programmers. What matters to a user is checked and said by this program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(peft|torch|transformers|huggingface_hub|mlflow|wandb)\b")
