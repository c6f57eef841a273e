"""Commands that tell how good a result is and how it came about: compare, evaluate, verify, inspect."""

from pathlib import Path

import click

from tunesmith.commands.options import BASE, JSON, OUTPUTS, PRICE, SET, SKIP, finite
from tunesmith.commands.printing import lines, print_json, terminal


@click.command()
@click.argument("config")
@SET
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
    callback=finite,
    default=3.0,
    show_default=True,
    help="What choosing an arm's rate may take, in full runs.",
)
@PRICE
@click.option(
    "--forgetting", multiple=True, metavar="FILE", help="General text to see forgetting on; may be repeated."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the comparison.  [default: OUTPUT_DIR/compare-CONFIG]",
)
@SKIP
@JSON
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
    from tunesmith.config.load import load_config

    options = CompareOptions(
        arms, seeds, rates, sweep_budget, output, forgetting, price_per_hour, skip_bad_rows
    )
    console = terminal(stderr=as_json)
    record = run(load_config(config, overrides), options, console)
    if as_json:
        from tunesmith.comparison.record import to_json

        click.echo(to_json(record), nl=False)
    else:
        print_comparison(console, record)


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="JSONL file with the rows to score.")
@click.option("--metric", default="exact_match", show_default=True, help="exact_match, record_match, …")
@click.option("--max-rows", type=click.IntRange(1), help="Answer only the first rows.  [default: all]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@BASE
@OUTPUTS
@JSON
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

    console = terminal(stderr=as_json)
    servable = load_servable(model, output_dirs, base=base)
    result = evaluate_model(servable, data, metric, max_rows, max_new_tokens, console)
    if as_json:
        print_json(result.facts())
    else:
        print_evaluation(console, result)


@click.command()
@click.argument("run")
@click.option(
    "--steps", type=click.IntRange(1), default=5, show_default=True, help="At most so many steps again."
)
@OUTPUTS
@JSON
def verify(run: str, steps: int, output_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Check every hash of RUN, and compute a stretch of it again: are the bits the same?"""
    from tunesmith.inspection import run_folder
    from tunesmith.verification import print_proof, verify_run

    folder, console = run_folder(run, output_dirs), terminal(stderr=as_json)
    proof = verify_run(folder, steps, lines(console))
    if as_json:
        print_json(proof.facts())
    else:
        print_proof(console, proof)


@click.command()
@click.argument("run")
@click.option("--step", type=int, required=True, help="Optimizer step, from 1.")
@OUTPUTS
@JSON
def inspect(run: str, step: int, output_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Which rows were in a step of RUN: line in the file, tokens, text."""
    from tunesmith.inspection import inspect_step, print_step

    console = terminal(stderr=as_json)
    view = inspect_step(run, step, output_dirs, lines(console))
    if as_json:
        print_json(view.facts())
    else:
        print_step(console, view)
