"""Token-weighted loss of a model on held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.rows import TokenizedRows
from tunesmith.models.batches import MicroBatches
from tunesmith.models.passes import Passes


@dataclass(frozen=True)
class RowLosses:
    """Losses of a split.

    Attributes:
        mean: of -log p over all trained tokens, in nats; each token weighs the same, whatever row it stands in.
        sums: float64, shape (rows,): the same summed over each row, in file order, for paired comparisons.
        tokens: int64, shape (rows,): trained tokens of each row.
    """

    mean: float
    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]


def row_loss(
    passes: Passes,
    rows: TokenizedRows,
    *,
    micro_batches: MicroBatches,
    on_progress: Callable[[int, int], None] | None = None,
) -> RowLosses:
    """-log p of the trained tokens of ``rows``.

    Args:
        passes: computes losses of the model.
        rows: held-out rows.
        micro_batches: how rows are cut into batches; says which rows stand in each.
        on_progress: called with rows done and rows in all.
    """
    total, count, done = 0.0, 0, 0
    tokens = rows.trained_counts
    sums = np.zeros(len(rows))
    for batch in micro_batches(rows, range(len(rows))):
        losses = passes.losses(batch)
        starts = np.concatenate([[0], np.cumsum(tokens[list(batch.members)])])[:-1]
        sums[list(batch.members)] = np.add.reduceat(losses.double().cpu().numpy(), starts)
        total, count, done = total + float(losses.sum()), count + len(losses), done + batch.rows
        if on_progress:
            on_progress(done, len(rows))
    return RowLosses(total / count, sums, tokens)
