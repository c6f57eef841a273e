"""``tunesmith evaluate``: a model's loss, perplexity and task metric on a file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tunesmith.data.conversation import detect_task
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.rendering import TrainOn
from tunesmith.data.rows import tokenize_rows
from tunesmith.errors import DataError
from tunesmith.evaluation.answers import read_questions
from tunesmith.evaluation.heldout import check_expected
from tunesmith.evaluation.metrics import metric_named
from tunesmith.evaluation.score import HeldOut, score_heldout
from tunesmith.models.batches import micro_batches, prepare_packing
from tunesmith.models.catalog import cache_dir
from tunesmith.models.passes import choose_passes
from tunesmith.models.servable import Servable
from tunesmith.tracking.events import Score
from tunesmith.tracking.formats import visible

_TOKEN_BUDGET, _ROWS, _EXAMPLES = 2048, 16, 3


@dataclass(frozen=True)
class Evaluation:
    """A score, what it is of, and each answer."""

    model: str
    data: str
    data_sha256: str
    score: Score
    answered: Sequence[tuple[str, str, str]]  # shown prompt, expected, answer

    def facts(self) -> dict[str, Any]:
        """The same, JSON-serialisable."""
        rows = [{"prompt": p, "expected": e, "answer": a} for p, e, a in self.answered]
        return {
            "model": self.model,
            "data": {"path": self.data, "sha256": self.data_sha256},
            **asdict(self.score),
            "answers": rows,
        }


def evaluate_model(
    servable: Servable,
    data: str,
    metric: str,
    max_rows: int | None,
    max_new_tokens: int,
    console: Console,
) -> Evaluation:
    """Score a loaded model on the rows of ``data``; the metric only where rows have answers.

    Raises:
        ConfigError, DataError: there is no such metric, or rows break a rule.
    """
    metric_named(metric)
    limit = servable.context_length
    train_on = _train_on(servable, data)
    rows = tokenize_rows(data, servable.renderer, train_on, cache_dir=cache_dir() / "tokens")
    try:
        rows = fit_to_length(rows, limit, "error")
    except DataError as error:
        raise DataError(error.place, error.fault, "leave such rows out") from error
    questions = []
    if train_on is TrainOn.ASSISTANT_TURNS:
        questions = read_questions(data, servable.renderer, max_rows, limit)
        check_expected([question.expected for question in questions], metric)
    pad = servable.stops.token_ids[0]
    device = next(servable.model.parameters()).device
    packs, _ = prepare_packing(servable.model, rows, pad)
    passes, _ = choose_passes(servable.model, rows, packs=packs, autocast=None)
    with _progress(console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done)

        scored = score_heldout(
            servable.model,
            passes,
            servable.tokenizer,
            HeldOut(rows, questions, metric if questions else None, max_new_tokens),
            servable.stops,
            micro_batches=micro_batches(packs, _TOKEN_BUDGET, pad, device, _ROWS),
            seed=0,
            label=servable.name,
            on_progress=show,
        )
    pairs = [(q.shown, q.expected, a) for q, a in zip(questions, scored.answers, strict=True)]
    return Evaluation(servable.name, data, rows.sha256, scored.score, pairs)


def _train_on(servable: Servable, data: str) -> TrainOn:
    # A run that learned whole texts is scored on whole texts, as it scored itself.
    settings = servable.manifest.config if servable.manifest else {}
    return TrainOn.ALL_TOKENS if settings.get("task") == TrainOn.ALL_TOKENS else TrainOn(detect_task(data))


def print_evaluation(console: Console, result: Evaluation) -> None:
    """The score and the first answers."""
    score = result.score
    console.print(
        Text(f"{result.model} on {result.data} ({score.rows:,} rows)", style="bold"), soft_wrap=True
    )
    console.print(f"loss {score.loss:.4f}, perplexity {score.perplexity:.3f}")
    if score.metric is not None and score.value is not None and score.interval is not None:
        low, high = score.interval
        console.print(
            f"{score.metric} {score.value:.1%}, 95 % interval {low:.1%} to {high:.1%}, "
            f"{len(result.answered):,} rows answered"
        )
    table = Table(header_style="bold", show_lines=True)
    for heading in ("prompt", "expected", "answer"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in result.answered[:_EXAMPLES]:
        table.add_row(*(Text(visible(text)) for text in row))
    if result.answered:
        console.print(table)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
