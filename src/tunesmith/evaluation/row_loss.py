"""Token-weighted loss of a model on held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.rows import TokenizedRows
from tunesmith.models.batches import MicroBatches
from tunesmith.models.passes import Passes, unasked
from tunesmith.training.workers import ALONE, Workers


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
    workers: Workers = ALONE,
    on_progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] = unasked,
) -> RowLosses:
    """-log p of the trained tokens of ``rows``.

    Args:
        passes: computes losses of the model.
        rows: held-out rows.
        micro_batches: how rows are cut into batches; says which rows stand in each. With several workers it yields this
            one's share.
        workers: who scores together; each gets the losses of all rows.
        on_progress: called with rows done and rows in all.
        check: called before each micro-batch and each layer in it; what it raises ends the scoring.
    """
    done = 0
    tokens = rows.trained_counts
    totals: list[float] = []
    sums = np.zeros(len(rows))
    for batch in micro_batches(rows, range(len(rows))):
        check()
        losses = passes.losses(batch, check)
        if not batch.members:
            continue  # others have something to do: this worker only keeps in step
        starts = np.concatenate([[0], np.cumsum(tokens[list(batch.members)])])[:-1]
        sums[list(batch.members)] = np.add.reduceat(losses.double().cpu().numpy(), starts)
        totals.append(float(losses.sum()))
        done += batch.rows
        if on_progress:
            on_progress(min(done * workers.world, len(rows)), len(rows))
    shares = workers.gather((totals, sums))
    # Added in the order of the batches, so that the last bits do not depend on how many workers there are.
    total = 0.0
    for part in chain.from_iterable(zip_longest(*(share for share, _ in shares), fillvalue=0.0)):
        total += part
    return RowLosses(total / int(tokens.sum()), np.sum([part for _, part in shares], axis=0), tokens)
