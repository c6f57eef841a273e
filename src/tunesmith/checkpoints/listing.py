"""Trained models for people and programs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tunesmith.checkpoints.disk_errors import human_bytes
from tunesmith.checkpoints.lineage import Generation, Lineage
from tunesmith.checkpoints.locate import RunListing
from tunesmith.checkpoints.manifest import BaseWeights
from tunesmith.errors import printable


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
            *(Text(printable(text or "?")) for text in (run.tag, run.model_id, run.method)),
            "–" if run.best_loss is None else f"{run.best_loss:.4f}",
            "–" if run.bytes is None else human_bytes(run.bytes),
            Text(printable(run.status), style="" if run.status == "finished" else "yellow"),
            run.created[:16].replace("T", " "),
        )
    console.print(table)
    for run in runs:
        console.print(Text(printable(f"{run.tag or '?'}  {run.path}")), soft_wrap=True)


def print_lineage(console: Console, lineage: Lineage) -> None:
    """A branch a generation, the youngest at the root; below it the folders, never cut."""
    first, *older = lineage.generations
    tree = branch = Tree(_generation(first), guide_style="dim")
    for item in older:
        branch = branch.add(_generation(item))
    if lineage.base is not None:
        branch.add(_base(lineage.base))
    console.print(tree)
    if lineage.lost is not None:
        ends = printable(f"The chain ends here: {lineage.lost}")
        console.print(Text(ends, style="yellow"), soft_wrap=True)
    for item in lineage.generations:
        console.print(Text(printable(f"{item.manifest.tag}  {item.folder}")), soft_wrap=True)


def _generation(item: Generation) -> Text:
    manifest = item.manifest
    loss = "no eval loss" if manifest.eval_loss is None else f"eval loss {manifest.eval_loss:.4f}"
    # Full-parameter training continues no adapter: only merging makes a full model of one.
    is_merged = manifest.method == "full" and manifest.parent_adapter is not None
    method = "full, merged" if is_merged else manifest.method
    lines = [f"{method}, step {manifest.step:,}, {loss}, {manifest.created[:16].replace('T', ' ')}"]
    for name, split in manifest.data.items():
        path, rows, sha256 = (split.get(key) for key in ("path", "rows", "sha256"))
        lines.append(f"{name}: {path}, {rows} rows, SHA-256 {str(sha256)[:12]}")
    return Text.assemble((printable(manifest.tag), "bold"), *(f"\n{printable(line)}" for line in lines))


def _base(base: BaseWeights) -> Text:
    revision = f", revision {base.revision}" if base.revision else ""
    about = printable(f"base{revision}, weights {base.fingerprint[:12]}")
    return Text.assemble((printable(base.source), "bold green"), f"\n{about}")
