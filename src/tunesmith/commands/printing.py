"""How commands print: to a terminal, in plain lines, or as JSON."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def terminal(*, stderr: bool = False) -> "Console":
    """Standard output, or standard error where standard output is to hold JSON alone."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def lines(console: "Console") -> Callable[[str], None]:
    """What prints a text on ``console`` as it is: square brackets are no markup, and nothing is folded."""
    return lambda text: console.print(text, markup=False, soft_wrap=True)


def print_json(facts: Any) -> None:
    """Facts on standard output, for programs."""
    import json

    click.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
