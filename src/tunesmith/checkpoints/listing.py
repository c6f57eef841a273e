"""Trained models for people and programs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.checkpoints.disk_errors import human_bytes
from tunesmith.checkpoints.locate import RunListing


def listing_facts(run: RunListing) -> dict[str, Any]:
    """A listing, JSON-serialisable."""
    return asdict(run) | {"path": str(run.path)}


def print_runs(console: Console, runs: Sequence[RunListing], output_dirs: Sequence[Path]) -> None:
    """A block a run, newest first: the path is never cut, so that it can be copied."""
    if not runs:
        console.print(
            f"Nothing has been trained in {', '.join(map(str, output_dirs))}.", markup=False, soft_wrap=True
        )
        return
    table = Table(header_style="bold")
    for heading in ("tag", "base", "method", "best loss", "size", "status", "created"):
        table.add_column(heading, overflow="fold")
    for run in runs:
        table.add_row(
            Text(run.tag or "?"),
            Text(run.model_id or "?"),
            Text(run.method or "?"),
            "–" if run.best_loss is None else f"{run.best_loss:.4f}",
            "–" if run.bytes is None else human_bytes(run.bytes),
            Text(run.status, style="" if run.status == "finished" else "yellow"),
            run.created[:16].replace("T", " "),
        )
    console.print(table)
    for run in runs:
        console.print(Text(f"{run.tag or '?'}  {run.path}"), soft_wrap=True)
