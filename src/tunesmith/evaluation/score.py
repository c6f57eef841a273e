"""Held-out rows of a run and a model's score on them: loss, perplexity, task metric with interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.rows import TokenizedRows
from tunesmith.evaluation.answers import Question, greedy_answers
from tunesmith.evaluation.heldout import perplexity, score_answers
from tunesmith.evaluation.row_loss import RowLosses, row_loss
from tunesmith.models.batches import MicroBatches
from tunesmith.models.passes import Passes, unasked
from tunesmith.models.stops import Stops
from tunesmith.tracking.events import Score
from tunesmith.training.workers import ALONE, Workers

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HeldOut:
    """Rows never trained on. ``questions`` is empty where no task metric is asked for."""

    rows: TokenizedRows
    questions: Sequence[Question]
    metric: str | None
    max_new_tokens: int


@dataclass(frozen=True)
class Scored:
    """A score with what it is the mean of.

    Attributes:
        answers: to the questions; empty where there are none.
        losses: of each row.
        values: the metric of each answer; empty where there are none.
    """

    score: Score
    answers: Sequence[str]
    losses: RowLosses
    values: Sequence[float]


def score_heldout(
    model: Any,
    passes: Passes,
    tokenizer: Any,
    heldout: HeldOut,
    stops: Stops,
    *,
    micro_batches: MicroBatches,
    seed: int,
    label: str,
    workers: Workers = ALONE,
    on_progress: OnProgress,
    check: Callable[[], None] = unasked,
) -> Scored:
    """Score a model on rows and questions.

    Args:
        passes: computes losses of ``model``.
        micro_batches: how rows are cut when the loss is taken.
        seed: of the bootstrap, where the metric needs one.
        workers: who scores together; all get the score of all rows and questions.
        label, on_progress: ``on_progress(f"{label}: loss", done, total)``.
        check: called often; what it raises ends the scoring.
    """
    losses = row_loss(
        passes,
        heldout.rows,
        micro_batches=micro_batches,
        workers=workers,
        on_progress=lambda done, total: on_progress(f"{label}: loss", done, total),
        check=check,
    )
    loss = losses.mean
    base = Score(len(heldout.rows), loss, perplexity(loss))
    if heldout.metric is None or not heldout.questions:
        return Scored(base, [], losses, [])
    # Answers need a cache of keys and values, which may have the memory that losses needed.
    passes.rest()
    answers = greedy_answers(
        model,
        tokenizer,
        heldout.questions,
        stop_token_ids=stops.token_ids,
        stop_strings=stops.strings,
        max_new_tokens=heldout.max_new_tokens,
        workers=workers,
        on_progress=lambda done, total: on_progress(f"{label}: answers", done, total),
        check=check,
    )
    expected = [question.expected for question in heldout.questions]
    metric = score_answers(expected, answers, heldout.metric, seed=seed)
    score = Score(base.rows, loss, base.perplexity, metric.name, metric.value, metric.interval)
    return Scored(score, answers, losses, metric.per_row)
