"""``tunesmith inspect RUN --step N``: which rows were in a step.

Nothing is looked up: the order of rows is a function of seed, epoch and number of rows (``data/order.py``), so it
can be told for any step of any run, also where the data file is gone. Neither micro-batches nor threads take part.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.assembly import rows_per_step, template_of
from tunesmith.checkpoints.locate import REPORT_NAME, list_runs
from tunesmith.checkpoints.manifest import read_manifest
from tunesmith.checkpoints.store import newest_checkpoint
from tunesmith.config.load import LoadedConfig, load_config
from tunesmith.data.order import step_rows
from tunesmith.data.packing import shared_prefix
from tunesmith.data.problems import shorten
from tunesmith.data.rendering import Renderer
from tunesmith.data.rows import TokenizedRows
from tunesmith.data.sources import file_digest
from tunesmith.data.splits import choose_context_length, load_splits
from tunesmith.errors import CheckpointError, DataError, TunesmithError, UserError, printable
from tunesmith.models.base import find_base, load_tokenizer, model_limit
from tunesmith.models.catalog import cache_dir
from tunesmith.resuming import find_run_folder
from tunesmith.run_state import read_state
from tunesmith.starting_points import weights_id
from tunesmith.tracking.jsonl import read_events
from tunesmith.training.schedule import StepPlan, plan_steps

Say = Callable[[str], None]
_SHOWN_TOKENS = 64


@dataclass(frozen=True)
class RowView:
    """One row of a step; all but ``row`` is None where the data cannot be read as it was trained on."""

    row: int  # from 1, among the rows that were trained on
    place: str | None = None  # FILE:LINE
    tokens: int | None = None
    trained_tokens: int | None = None
    text: str | None = None  # begins at the first word that not all rows of the step open with


@dataclass(frozen=True)
class StepView:
    """The rows of one optimizer step.

    Attributes:
        data: the path of the training rows.
        rows_in_epoch: how many rows each epoch visits.
        loss: mean over the step's trained tokens, as recorded; None: not recorded.
        rows: in the order of the epoch.
        notices: what a reader must know before believing this.
    """

    run: str
    step: int
    total_steps: int
    epoch: int
    data: str
    rows_in_epoch: int
    loss: float | None
    rows: tuple[RowView, ...]
    notices: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


@dataclass(frozen=True)
class _Recorded:
    """What a run's files say of its training rows."""

    rows: int
    sha256: str


def inspect_step(reference: str, step: int, output_dirs: Sequence[Path], say: Say) -> StepView:
    """The rows of ``step`` (from 1) of the run ``reference``: a folder, name or tag.

    Raises:
        UserError: there is no such run or step, or nothing tells how many rows the run had.
    """
    folder = run_folder(reference, output_dirs)
    loaded = load_config(str(folder / "config.yaml"), settled=True)
    notices: list[str] = []
    recorded, changes = _recorded(folder), _forced(folder)
    if changes:
        notices.append(
            f"--force-resume let this run go on with other settings ({'; '.join(changes)}): what is told here is of "
            "its first ones, and steps since then may have had other rows"
        )
    rows, tokenizer = _read_rows(loaded, recorded, notices, say)
    count = recorded.rows if recorded else len(rows) if rows else None
    if count is None:
        fault = f"does not say how many rows it was trained on, and they cannot be read ({notices[-1]})"
        raise UserError(str(folder), fault, "put the data back where it was")
    plan, chosen = _chosen(loaded, count, step)
    event = _event(folder, step)
    if event is None:
        notices.append(f"{folder / 'metrics.jsonl'} has no step {step}: so it was not done, or not recorded")
    views = tuple(_views(rows, chosen, tokenizer)) if rows else tuple(RowView(row + 1) for row in chosen)
    if rows and event:
        notices += _disagreement(views, event)
    return StepView(
        run=folder.name,
        step=step,
        total_steps=plan.total_steps,
        epoch=(step - 1) // plan.steps_per_epoch + 1,
        data=loaded.config.data.train_path,
        rows_in_epoch=count,
        loss=float(event["train_loss_batch"]) if event else None,
        rows=views,
        notices=tuple(notices),
    )


def print_step(console: Console, view: StepView) -> None:
    """The rows as a table; places are never cut."""
    loss = f"; loss {view.loss:.4f}" if view.loss is not None else ""
    head = f"Step {view.step:,} of {view.total_steps:,}, epoch {view.epoch}{loss}"
    console.print(Text(head, style="bold"), soft_wrap=True)
    what = f"{len(view.rows)} of the {view.rows_in_epoch:,} rows of {printable(view.data)}"
    console.print(Text(what), soft_wrap=True)
    table = Table(header_style="bold")
    for heading in ("row", "tokens", "trained"):
        table.add_column(heading, justify="right")
    for heading in ("place", "text"):
        table.add_column(heading, overflow="fold")
    for row in view.rows:
        numbers = ("–" if n is None else f"{n:,}" for n in (row.tokens, row.trained_tokens))
        table.add_row(f"{row.row:,}", *numbers, Text(row.place or "–"), Text(row.text or "–"))
    console.print(table)
    for notice in view.notices:
        console.print(Text(f"Note: {notice}", style="yellow"), soft_wrap=True)


def run_folder(reference: str, output_dirs: Sequence[Path]) -> Path:
    """The folder of the run ``reference``: a path, or a name or tag in one of ``output_dirs``.

    Raises:
        UserError: there is no such run, or several.
    """
    try:
        Path(reference).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, "~nobody", a null character
        raise UserError(shorten(reference), "is no name of a run", "see: tunesmith models") from error
    for output_dir in output_dirs:
        with suppress(UserError):
            return find_run_folder(reference, output_dir)
    tagged = [run.path for run in list_runs(output_dirs) if run.tag == reference]
    if len(tagged) > 1:
        fault = f"means {len(tagged)} runs: {', '.join(map(str, tagged))}"
        raise UserError(reference, fault, "give the folder of one instead")
    # Raises, naming where was looked, where there is none.
    return find_run_folder(str(tagged[0]) if tagged else reference, output_dirs[0])


def _recorded(folder: Path) -> _Recorded | None:
    """From the newest checkpoint, else the report; None where there is neither."""
    checkpoint = newest_checkpoint(folder)
    with suppress(OSError, ValueError, KeyError, TypeError):
        if checkpoint is not None:
            train = read_manifest(checkpoint).data["train"]
        else:
            train = json.loads((folder / REPORT_NAME).read_bytes())["data"]["train"]
        return _Recorded(int(train["rows"]), str(train["sha256"]))
    return None


def _forced(folder: Path) -> tuple[str, ...]:
    """What --force-resume passed over, from the newest checkpoint, else the report."""
    checkpoint = newest_checkpoint(folder)
    with suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
        if checkpoint is not None:
            return read_state(checkpoint).totals.forced
        return tuple(map(str, json.loads((folder / REPORT_NAME).read_bytes())["forced"]))
    return ()


def _chosen(loaded: LoadedConfig, rows: int, step: int) -> tuple[StepPlan, list[int]]:
    """The plan of the run, and the rows of ``step``, numbered from 0. Raises UserError where there is no such step."""
    settings = loaded.config.optimization
    devices = loaded.config.cluster.num_devices
    batch = rows_per_step(settings.train_batch_size_per_device, settings.gradient_accumulation_steps, devices)
    plan = plan_steps(rows, batch, settings.num_epochs, settings.min_update_steps)
    if not 1 <= step <= plan.total_steps:
        raise UserError(f"--step {step}", f"this run has steps 1 to {plan.total_steps}", "name one of them")
    epoch, index = divmod(step - 1, plan.steps_per_epoch)
    return plan, step_rows(rows, batch, settings.seed, epoch + 1)[index]


def _read_rows(
    loaded: LoadedConfig, recorded: _Recorded | None, notices: list[str], say: Say
) -> tuple[TokenizedRows | None, Any]:
    """The rows as they were trained on, and the tokenizer; None where they cannot be had, which ``notices`` tells."""
    model, data = loaded.config.model, loaded.config.data
    try:
        digest = file_digest(data.train_path)
        if recorded and recorded.sha256 != digest:
            fault = f"SHA-256 {recorded.sha256[:12]} when it was trained on, {digest[:12]} now"
            raise DataError(printable(data.train_path), fault)
        base = find_base(weights_id(model), weights=False, say=say)
        tokenizer = load_tokenizer(base, template_of(data.generation_config))
        # Rows that break a rule were left out, or the run would not have begun.
        splits = load_splits(
            data.train_path,
            None,
            Renderer(tokenizer),
            data.task,
            cache_dir=cache_dir() / "tokens",
            skip_bad_rows=True,
        )
        # The validation rows matter to the limit only where no training row reaches it.
        limit = choose_context_length(
            model.context_length,
            model_limit(base),
            splits.longest,
            model.embedding_scaling_technique,
            loaded.place("context_length"),
        )
        rows = splits.fitted(limit, data.on_too_long).train
        if recorded and len(rows) != recorded.rows:
            fault = f"{len(rows):,} usable rows now, {recorded.rows:,} were trained on"
            raise DataError(printable(data.train_path), fault)
    except TunesmithError as error:
        notices.append(f"rows are given by number alone: {error}")
        return None, None
    return rows, tokenizer


def _views(rows: TokenizedRows, chosen: Sequence[int], tokenizer: Any) -> list[RowView]:
    examples = [rows.row(i) for i in chosen]
    shared = shared_prefix(examples)
    # From the last word that they share: "item 1" and "item 15" part within a number.
    opening = re.sub(r"\S*$", "", tokenizer.decode(examples[0].ids[:shared].tolist()))
    return [
        RowView(
            row=i + 1,
            place=printable(rows.origin(i)),
            tokens=len(example.ids),
            trained_tokens=int(example.trained.sum()),
            text=("…" if opening else "")
            + shorten(tokenizer.decode(example.ids[: shared + _SHOWN_TOKENS].tolist())[len(opening) :]),
        )
        for i, example in zip(chosen, examples, strict=True)
    ]


def _event(folder: Path, step: int) -> dict[str, Any] | None:
    """What was recorded of ``step``; the last, where a step was done again."""
    try:
        events = read_events(folder / "metrics.jsonl")
    except UserError:
        return None
    return next((e for e in reversed(events) if e["event"] == "step" and e.get("step") == step), None)


def _disagreement(views: Sequence[RowView], event: dict[str, Any]) -> list[str]:
    """These rows must have as many tokens as were counted when the step was done."""
    found = [sum(v.tokens or 0 for v in views), sum(v.trained_tokens or 0 for v in views)]
    counted = [event.get("real_tokens"), event.get("trained_tokens")]
    if found == counted:
        return []
    tokens = f"these rows have {found[0]} tokens, {found[1]} of them trained"
    return [f"{tokens}; the run counted {counted[0]} and {counted[1]}: it may have trained on other rows"]
