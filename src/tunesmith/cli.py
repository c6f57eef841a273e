"""The command line: one short function a command. Reads its arguments, calls one function, prints.

Nothing heavy is imported until a command needs it, so that ``--help`` answers at once.
"""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tunesmith import __version__
from tunesmith.errors import ConfigError, Interrupted, TunesmithError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.config.load import LoadedConfig

_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated."
)
_SKIP = click.option(
    "--skip-bad-rows", is_flag=True, help="Leave out rows that break a rule instead of stopping."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, for programs.")
_OUTPUTS = click.option(
    "--output-dir",
    "output_dirs",
    multiple=True,
    default=("./outputs",),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where runs are looked for; may be repeated.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tunesmith")
def cli() -> None:
    """Fine-tune an open-weight LLM from one YAML file: LoRA if the file has lora_config, full if not."""


@cli.command()
@click.argument("config", required=False)
@_SET
@click.option(
    "--default", "default", is_flag=True, help="Choose everything but model_id and train_path, saying why."
)
@click.option(
    "--resume",
    metavar="RUN|auto",
    help="Go on with an interrupted run: its folder or name; auto: one of CONFIG.",
)
@click.option(
    "--force-resume", is_flag=True, help="Go on even where the result's bits would be others; marks the run."
)
@_SKIP
def finetune(
    config: str | None,
    overrides: tuple[str, ...],
    default: bool,
    resume: str | None,
    force_resume: bool,
    skip_bad_rows: bool,
) -> None:
    """Fine-tune as CONFIG says: a path, or the name of a shipped configuration.

    With --resume RUN the CONFIG may be left out: it is then the run's own.
    """
    if force_resume and resume is None:
        raise ConfigError("--force-resume", "has no effect without --resume", "name the run, or leave it out")
    if config is None and resume not in (None, "auto"):
        from tunesmith.resuming import find_run_folder

        config = str(find_run_folder(str(resume), Path("./outputs")) / "config.yaml")
    if config is None and not default:
        raise ConfigError("CONFIG", "is missing", "name a YAML file, or give --default with --set model_id=…")
    loaded, console = _load(config, overrides, default), _console()
    if default:
        from tunesmith.config.show import print_settings

        print_settings(console, loaded)
    from tunesmith.run import finetune as run

    run(loaded, console, skip_bad_rows=skip_bad_rows, resume=resume, force_resume=force_resume)


@cli.command()
@click.argument("config")
@_SET
@click.option("--show", is_flag=True, help="Print every value and where it came from.")
@click.option(
    "--rows", type=click.IntRange(0), default=3, show_default=True, help="Rows in the coloured view."
)
@click.option(
    "--for-serving",
    "engine",
    type=click.Choice(["tunesmith", "vllm"]),
    help="Say too what this engine would refuse to serve of what is trained.",
)
@_SKIP
@_JSON
def check(
    config: str,
    overrides: tuple[str, ...],
    show: bool,
    rows: int,
    engine: Literal["tunesmith", "vllm"] | None,
    skip_bad_rows: bool,
    as_json: bool,
) -> None:
    """Check CONFIG and its data without loading weights, and show what would be trained."""
    from tunesmith.checking import check_config, print_check

    loaded, console = _load(config, overrides), _console()
    if show and not as_json:
        from tunesmith.config.show import print_settings

        print_settings(console, loaded)
    # With --json, standard output holds JSON alone.
    said = _console(stderr=True) if as_json else console
    result = check_config(
        loaded, preview_rows=rows, skip_bad_rows=skip_bad_rows, say=said.print, engine=engine
    )
    if as_json:
        _print_json(result.facts())
    else:
        print_check(console, result)
    result.refuse_unserved()


@cli.command()
@click.argument("config")
@_SET
@click.option(
    "--arms",
    multiple=True,
    default=("full,lora",),
    show_default=True,
    help="What to compare: full, lora, lora:r=16, lora:targets=attention, lora:dora, lora:rslora, …",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Full runs of each arm.")
@click.option(
    "--learning-rates",
    "rates",
    multiple=True,
    metavar="[ARM=]RATE,RATE…",
    help="Rates to try instead of the arm's own grid; one alone is taken as it is.",
)
@click.option(
    "--sweep-budget",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="What choosing an arm's rate may take, in full runs.",
)
@click.option("--price-per-hour", type=click.FloatRange(0), help="Of this machine, for the cost of a run.")
@click.option(
    "--forgetting", multiple=True, metavar="FILE", help="General text to see forgetting on; may be repeated."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the comparison.  [default: OUTPUT_DIR/compare-CONFIG]",
)
@_SKIP
@_JSON
def compare(
    config: str,
    overrides: tuple[str, ...],
    arms: tuple[str, ...],
    seeds: int,
    rates: tuple[str, ...],
    sweep_budget: float,
    price_per_hour: float | None,
    forgetting: tuple[str, ...],
    output: Path | None,
    skip_bad_rows: bool,
    as_json: bool,
) -> None:
    """LoRA against full-parameter on the data of CONFIG, each at its own learning rate; what the numbers allow to say.

    The same command goes on with an interrupted comparison; what is trained already is not trained again.
    """
    from tunesmith.comparison.command import compare as run
    from tunesmith.comparison.command import print_comparison
    from tunesmith.comparison.experiment import CompareOptions

    options = CompareOptions(
        arms, seeds, rates, sweep_budget, output, forgetting, price_per_hour, skip_bad_rows
    )
    console = _console(stderr=as_json)
    record = run(_load(config, overrides), options, console)
    if as_json:
        from tunesmith.comparison.record import to_json

        click.echo(to_json(record), nl=False)
    else:
        print_comparison(console, record)


@cli.command()
@click.argument("model")
@click.option("--data", required=True, help="JSONL file with the rows to score.")
@click.option("--metric", default="exact_match", show_default=True, help="exact_match, record_match, …")
@click.option("--max-rows", type=click.IntRange(1), help="Answer only the first rows.  [default: all]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--base", help="Where the adapter's base is, if not where it was.")
@_OUTPUTS
@_JSON
def evaluate(
    model: str,
    data: str,
    metric: str,
    max_rows: int | None,
    max_new_tokens: int,
    base: str | None,
    output_dirs: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Loss, perplexity and a task metric of MODEL: a run, a tag, a checkpoint or a base model."""
    from tunesmith.evaluation.command import evaluate_model, print_evaluation
    from tunesmith.models.servable import load_servable

    console = _console(stderr=True) if as_json else _console()
    servable = load_servable(model, output_dirs, base=base)
    result = evaluate_model(servable, data, metric, max_rows, max_new_tokens, console)
    if as_json:
        _print_json(result.facts())
    else:
        print_evaluation(console, result)


@cli.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--system", help="System message for every conversation.")
@click.option("--base", help="Where the adapters' base is, if not where it was.")
@_OUTPUTS
def chat(
    models: tuple[str, ...],
    max_new_tokens: int,
    system: str | None,
    base: str | None,
    output_dirs: tuple[Path, ...],
) -> None:
    """Talk to one or more MODELS side by side: runs, tags, checkpoints or base models."""
    from tunesmith.chat import chat as talk
    from tunesmith.models.servable import load_servable

    console = _console()
    talk([load_servable(name, output_dirs, base=base) for name in models], console, max_new_tokens, system)


@cli.command()
@click.argument("run")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--data", help="Rows to compare on.  [default: those the run was trained on]")
@click.option("--base", help="Where the adapter's base is, if not where it was.")
@_OUTPUTS
def merge(run: str, output: Path, data: str | None, base: str | None, output_dirs: tuple[Path, ...]) -> None:
    """Fold the adapter of RUN into its base: one Hugging Face folder, verified against the unmerged logits."""
    from tunesmith.merge import merge_to_folder
    from tunesmith.models.servable import load_servable

    # In float32: the sum of two matrices is not the place to lose digits.
    servable = load_servable(run, output_dirs, base=base, precision="fp32")
    merge_to_folder(servable, output, data, _console())


@cli.command()
@click.argument("run")
@click.option(
    "--steps", type=click.IntRange(1), default=5, show_default=True, help="At most so many steps again."
)
@_OUTPUTS
@_JSON
def verify(run: str, steps: int, output_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Check every hash of RUN, and compute a stretch of it again: are the bits the same?"""
    from tunesmith.resuming import find_run_folder
    from tunesmith.verification import print_proof, verify_run

    folder, console = find_run_folder(run, output_dirs[0]), _console(stderr=as_json)
    proof = verify_run(folder, steps, lambda text: console.print(text, markup=False, soft_wrap=True))
    if as_json:
        _print_json(proof.facts())
    else:
        print_proof(console, proof)


@cli.command()
@click.argument("run")
@click.option("--step", type=int, required=True, help="Optimizer step, from 1.")
@_OUTPUTS
@_JSON
def inspect(run: str, step: int, output_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Which rows were in a step of RUN: line in the file, tokens, text."""
    from tunesmith.inspection import inspect_step, print_step

    console = _console(stderr=as_json)
    view = inspect_step(
        run, step, output_dirs, lambda text: console.print(text, markup=False, soft_wrap=True)
    )
    if as_json:
        _print_json(view.facts())
    else:
        print_step(console, view)


@cli.command()
@click.option("--lineage", metavar="TAG", help="Print what TAG was trained from, back to the base weights.")
@_OUTPUTS
@_JSON
def models(lineage: str | None, output_dirs: tuple[Path, ...], as_json: bool) -> None:
    """What has been trained here: tag, base, method, best loss, size, path."""
    from tunesmith.checkpoints.lineage import trace
    from tunesmith.checkpoints.listing import listing_facts, print_lineage, print_runs
    from tunesmith.checkpoints.locate import list_runs

    if lineage is not None:
        chain = trace(lineage, output_dirs)
        if as_json:
            _print_json(chain.facts())
        else:
            print_lineage(_console(), chain)
        return
    runs = list_runs(output_dirs)
    if as_json:
        _print_json([listing_facts(run) for run in runs])
    else:
        print_runs(_console(), runs, output_dirs)


@cli.command()
@click.option("--base", required=True, help="The base model: catalog name, folder or hub id.")
@click.option(
    "--dynamic-lora-loading-path",
    "root",
    type=click.Path(path_type=Path),
    help="Folder of adapters; each in it is a model, new ones without a restart.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0: any free one."
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
@click.option(
    "--log-requests",
    "log_contents",
    is_flag=True,
    help="Write prompts and answers too into the log of requests on standard error.",
)
def serve(
    base: str,
    root: Path | None,
    host: str,
    port: int,
    max_running: int,
    max_waiting: int,
    grace_seconds: int,
    engine: str,
    log_contents: bool,
) -> None:
    """Serve a base and every adapter on it, with OpenAI's interface.

    TUNESMITH_API_KEY in the environment is the key that clients need, TUNESMITH_ADMIN_KEY the one for loading and
    unloading adapters.
    """
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("serve", f"needs {error.name}", "run: pip install 'tunesmith[serve]'") from error
    if engine == "vllm":
        from tunesmith.serving.vllm_server import VllmOptions, serve_with_vllm

        chosen = VllmOptions(base, root, host, port, max_running, grace_seconds)
        serve_with_vllm(chosen, lambda text: click.echo(text, err=True))
        return
    from tunesmith.serving.server import ServeOptions
    from tunesmith.serving.server import serve as run

    options = ServeOptions(base, root, host, port, max_running, max_waiting, grace_seconds, log_contents)
    run(options, lambda text: click.echo(text, err=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of ours become one line on standard error and their exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character must not end a run
            stream.reconfigure(errors="backslashreplace")
    _silence_libraries()
    try:
        cli.main(args=arguments, prog_name="tunesmith", standalone_mode=False)
    except TunesmithError as error:
        colour = "yellow" if isinstance(error, Interrupted) else "red"
        label = "Stopped" if isinstance(error, Interrupted) else "Error"
        click.secho(f"{label}: ", fg=colour, bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of our output (head, less) has left: nothing to tell anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _load(config: str | None, overrides: Sequence[str], default: bool = False) -> "LoadedConfig":
    from tunesmith.config.load import load_config

    return load_config(config, overrides, default=default)


def _silence_libraries() -> None:
    # Their warnings are for programmers. What matters to a user is checked and said by this program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(peft|torch|transformers|huggingface_hub|mlflow|wandb)\b")


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _print_json(facts: Any) -> None:
    import json

    click.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
