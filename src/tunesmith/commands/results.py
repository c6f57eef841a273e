"""Commands on what has been trained: chat, merge, models."""

from pathlib import Path

import click

from tunesmith.commands.options import BASE, JSON, OUTPUTS
from tunesmith.commands.printing import print_json, terminal


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--system", help="System message for every conversation.")
@click.option("--base", help="Where the adapters' base is, if not where it was.")
@OUTPUTS
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

    console = terminal()
    talk([load_servable(name, output_dirs, base=base) for name in models], console, max_new_tokens, system)


@click.command()
@click.argument("run")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--data", help="Rows to compare on.  [default: those the run was trained on]")
@BASE
@OUTPUTS
def merge(run: str, output: Path, data: str | None, base: str | None, output_dirs: tuple[Path, ...]) -> None:
    """Fold the adapter of RUN into its base: one Hugging Face folder, verified against the unmerged logits."""
    from tunesmith.merge import merge_to_folder
    from tunesmith.models.servable import load_servable

    # In float32: the sum of two matrices is not the place to lose digits.
    servable = load_servable(run, output_dirs, base=base, precision="fp32")
    merge_to_folder(servable, output, data, terminal())


@click.command()
@click.option("--lineage", metavar="TAG", help="Print what TAG was trained from, back to the base weights.")
@OUTPUTS
@JSON
def models(lineage: str | None, output_dirs: tuple[Path, ...], as_json: bool) -> None:
    """What has been trained here: tag, base, method, best loss, size, path."""
    from tunesmith.checkpoints.lineage import trace
    from tunesmith.checkpoints.listing import listing_facts, print_lineage, print_runs
    from tunesmith.checkpoints.locate import list_runs

    if lineage is not None:
        chain = trace(lineage, output_dirs)
        if as_json:
            print_json(chain.facts())
        else:
            print_lineage(terminal(), chain)
        return
    runs = list_runs(output_dirs)
    if as_json:
        print_json([listing_facts(run) for run in runs])
    else:
        print_runs(terminal(), runs, output_dirs)
