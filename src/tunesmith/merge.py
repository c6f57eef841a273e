"""``tunesmith merge``: a LoRA run -> one Hugging Face folder."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tunesmith.checkpoints.atomic import whole_folder
from tunesmith.checkpoints.lineage import parent_of
from tunesmith.checkpoints.manifest import hash_files, write_manifest
from tunesmith.data.conversation import Problem, iter_examples
from tunesmith.data.rendering import RenderingError, TrainOn
from tunesmith.errors import DataError, ModelError, OutputError
from tunesmith.models.merging import merge_verified, save_merged
from tunesmith.models.servable import Servable
from tunesmith.models.stops import Stops

_ROWS = 8
_TOKENS = 512


def merge_to_folder(servable: Servable, output: Path, data: str | None, console: Console) -> None:
    """Merge, compare with the unmerged model on real rows, and write ``output`` whole or not at all.

    Raises:
        ModelError: this is no adapter.
        DataError: there are no rows to compare on.
        OutputError: ``output`` exists or cannot be written.
        CheckpointError: logits differ by more than 1e-4.
    """
    if not servable.is_adapter:
        raise ModelError(servable.name, "is no LoRA adapter: there is nothing to merge", "use it as it is")
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(str(output), "exists", "name a new folder")
    rows = _rows(servable, data)
    merged, difference = merge_verified(servable.model, rows, servable.name)
    with whole_folder(output, replace=True) as folder:
        save_merged(merged, servable.tokenizer, _stopping(merged, servable.stops), folder)
        if servable.manifest is not None:
            manifest = dataclasses.replace(
                servable.manifest,
                method="full",
                parent=servable.manifest.tag,
                parent_adapter=parent_of(servable.folder),
                parent_base=None,
                created=datetime.now(UTC).isoformat(),
                files=hash_files(folder),
            )
            write_manifest(folder, manifest)
    console.print(
        f"Merged and unmerged logits differ by at most {difference:.1e} on {len(rows)} rows ({_dtype(merged)})."
    )
    console.print(Text("Merged model is stored in:", style="bold"))
    console.print(Text(str(output.resolve())), soft_wrap=True)


def _rows(servable: Servable, data: str | None) -> list[list[int]]:
    """Token ids of the first rows of ``data``, or of what the run was trained on."""
    splits = servable.manifest.data if servable.manifest else {}
    trained = splits.get("valid") or splits.get("train")
    path = data or (str(trained["path"]) if trained else None)
    if path is None:
        raise DataError(servable.name, "there are no rows to compare on", "name some with --data FILE.jsonl")
    try:
        rows = list(islice(_usable_rows(servable, path), _ROWS))
    except DataError as error:
        raise DataError(error.place, error.fault, "name rows to compare on with --data FILE.jsonl") from error
    if not rows:
        raise DataError(path, "has no row to compare on", "name other rows with --data FILE.jsonl")
    return rows


def _usable_rows(servable: Servable, path: str) -> Iterator[list[int]]:
    for _, example in iter_examples(path):
        if isinstance(example, Problem):
            continue
        with suppress(RenderingError):
            yield servable.renderer.example(example, TrainOn.ALL_TOKENS).ids.tolist()[:_TOKENS]


def _stopping(merged: object, stops: Stops) -> object:
    settings = merged.generation_config  # type: ignore[attr-defined]
    settings.eos_token_id = list(stops.token_ids)
    settings.stop_strings = list(stops.strings) or None
    return settings


def _dtype(merged: object) -> str:
    return str(next(merged.parameters()).dtype).removeprefix("torch.")  # type: ignore[attr-defined]
