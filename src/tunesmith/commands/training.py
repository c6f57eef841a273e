"""Commands that take a configuration to its training: finetune, check, plan, convert."""

from pathlib import Path
from typing import Literal

import click

from tunesmith.commands.options import JSON, PRICE, SET, SKIP
from tunesmith.commands.printing import lines, print_json, terminal
from tunesmith.errors import ConfigError


@click.command()
@click.argument("config", required=False)
@SET
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
@SKIP
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
    from tunesmith.training.stop import terminate_as_interrupt

    # From now on, not only while it trains: what follows imports for seconds.
    click.get_current_context().with_resource(terminate_as_interrupt())
    if force_resume and resume is None:
        raise ConfigError("--force-resume", "has no effect without --resume", "name the run, or leave it out")
    if config is None and resume not in (None, "auto"):
        from tunesmith.resuming import find_run_folder

        config = str(find_run_folder(str(resume), Path("./outputs")) / "config.yaml")
    if config is None and not default:
        raise ConfigError("CONFIG", "is missing", "name a YAML file, or give --default with --set model_id=…")
    from tunesmith.config.load import load_config

    loaded, console = load_config(config, overrides, default=default), terminal()
    if default:
        from tunesmith.config.show import print_settings

        print_settings(console, loaded)
    from tunesmith.run import finetune as run

    run(loaded, console, skip_bad_rows=skip_bad_rows, resume=resume, force_resume=force_resume)


@click.command()
@click.argument("config")
@SET
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
@SKIP
@JSON
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
    from tunesmith.config.load import load_config

    loaded, console = load_config(config, overrides), terminal()
    if show and not as_json:
        from tunesmith.config.show import print_settings

        print_settings(console, loaded)
    # With --json, standard output holds JSON alone.
    said = terminal(stderr=True) if as_json else console
    result = check_config(
        loaded, preview_rows=rows, skip_bad_rows=skip_bad_rows, say=said.print, engine=engine
    )
    if as_json:
        print_json(result.facts())
    else:
        print_check(console, result)
    result.refuse_unserved()


@click.command()
@click.argument("config")
@SET
@click.option(
    "--rows",
    type=click.IntRange(1),
    metavar="N",
    help="Plan for N rows of context_length tokens instead of those of train_path.",
)
@click.option(
    "--hardware",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Machines to plan for: a YAML file like the shipped hardware.yaml, whose numbers are assumptions.",
)
@PRICE
@click.option(
    "--probe",
    is_flag=True,
    help="Train a few real steps here, forget them, and plan with the measured speed.",
)
@SKIP
@JSON
def plan(
    config: str,
    overrides: tuple[str, ...],
    rows: int | None,
    hardware: Path | None,
    price_per_hour: float | None,
    probe: bool,
    skip_bad_rows: bool,
    as_json: bool,
) -> None:
    """Memory, time and money that CONFIG takes by LoRA and by full-parameter, here and on named hardware.

    Reads configuration, data and headers, no weights. Of GPUs it tells formulae, labelled so.
    """
    from tunesmith.config.load import load_config
    from tunesmith.planning.plan import PlanOptions, make_plan, plan_facts
    from tunesmith.planning.report import print_plan
    from tunesmith.planning.verdict import verdict

    console = terminal(stderr=as_json)
    options = PlanOptions(rows, hardware, price_per_hour, probe, skip_bad_rows)
    found = make_plan(load_config(config, overrides), options, lines(console))
    if as_json:
        print_json(plan_facts(found, verdict(found)))
        return
    if not console.is_terminal:
        # A file or a pipe has room for the tables, whatever rich takes for its width.
        console.width = 100
    print_plan(console, found)


@click.command()
@click.argument("file")
@click.option(
    "--from",
    "tool",
    type=click.Choice(["axolotl", "llamafactory", "trl"]),
    help="Whose file it is.  [default: told from its keys]",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]"
)
@click.option("--strict", is_flag=True, help="Write nothing and exit with 2 if any key cannot be carried.")
@SET
def convert(
    file: str, tool: str | None, output: Path | None, strict: bool, overrides: tuple[str, ...]
) -> None:
    """Turn the YAML FILE of Axolotl, LLaMA-Factory or TRL into a configuration of ours.

    What could not be carried is listed on standard error, key by key.
    """
    from tunesmith.conversion.convert import convert_file, write_converted

    converted = convert_file(file, tool, overrides)
    for finding in converted.lost:
        click.echo(f"Not carried: {finding}", err=True)
    if strict and converted.lost:
        count = len(converted.lost)
        what = "1 key cannot" if count == 1 else f"{count} keys cannot"
        raise ConfigError(file, f"{what} be carried, see above", "take them out, or leave --strict out")
    if output is None:
        click.echo(converted.text, nl=False)
    else:
        write_converted(output, converted.text)
