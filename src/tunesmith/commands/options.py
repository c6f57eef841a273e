"""Options that several commands have, so that each reads alike wherever it stands."""

import math
from pathlib import Path

import click

SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated."
)
SKIP = click.option(
    "--skip-bad-rows", is_flag=True, help="Leave out rows that break a rule instead of stopping."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, for programs.")
OUTPUTS = click.option(
    "--output-dir",
    "output_dirs",
    multiple=True,
    default=("./outputs",),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where runs are looked for; may be repeated.",
)


def finite(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    """For options that are numbers: click takes "nan" and "inf" for numbers in any range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


PRICE = click.option(
    "--price-per-hour",
    type=click.FloatRange(0),
    callback=finite,
    help="Of this machine, for the cost of a run.",
)
BASE = click.option("--base", help="Where the adapter's base is, if not where it was.")
