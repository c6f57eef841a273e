"""``heldout.json``: loss and metric of every held-out row of one run, so that runs can be compared row by row."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoints.atomic import write_json
from tunesmith.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from tunesmith.evaluation.answers import Question
    from tunesmith.evaluation.score import Scored

HELD_OUT = "heldout.json"
_SHOWN = 8  # answers kept as text; all would make the file as large as the data


@dataclass(frozen=True)
class ShownAnswer:
    """One of the first held-out rows."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class HeldOutValues:
    """Values in file order.

    Attributes:
        losses: nats, summed over the trained tokens of each row; None where that is not finite.
        tokens: trained tokens of each row.
        metric, values: of the rows that were answered, the first ones; None and empty where none were.
    """

    losses: tuple[float | None, ...]
    tokens: tuple[int, ...]
    metric: str | None
    values: tuple[float, ...]
    shown: tuple[ShownAnswer, ...]

    @property
    def not_finite(self) -> int:
        """Rows whose loss is not finite: no mean can be taken over them, and none may be left out of it."""
        return sum(loss is None for loss in self.losses)


def write_heldout(path: Path, scored: "Scored", questions: "Sequence[Question]") -> None:
    """Write the values of ``scored``, whole or not at all.

    Raises:
        CheckpointError, OutputError: it cannot be written.
    """
    pairs = list(zip(questions, scored.answers, strict=False))[:_SHOWN]
    shown = tuple(ShownAnswer(q.shown, q.expected, answer) for q, answer in pairs)
    losses = scored.losses
    values = HeldOutValues(
        tuple(loss if math.isfinite(loss) else None for loss in losses.sums.tolist()),
        tuple(losses.tokens.tolist()),
        scored.score.metric,
        tuple(scored.values),
        shown,
    )
    write_json(path, values)


def read_heldout(path: Path) -> HeldOutValues:
    """What ``write_heldout`` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return _adapter().validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            str(path), "is missing or damaged", "remove its run's folder, and compare again"
        ) from error


@functools.cache
def _adapter() -> "TypeAdapter[HeldOutValues]":
    from pydantic import TypeAdapter

    return TypeAdapter(HeldOutValues)
