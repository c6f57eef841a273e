"""Token-weighted loss of a model on held-out rows."""

from collections.abc import Callable

from tunesmith.data.rows import TokenizedRows
from tunesmith.models.batches import MicroBatches
from tunesmith.models.passes import Passes


def row_loss(
    passes: Passes,
    rows: TokenizedRows,
    *,
    micro_batches: MicroBatches,
    on_progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean of -log p over all trained tokens of ``rows``, in nats.

    Each token weighs the same, whatever row it stands in.

    Args:
        passes: computes losses of the model.
        rows: held-out rows.
        micro_batches: how rows are cut into batches.
        on_progress: called with rows done and rows in all.
    """
    total, count, done = 0.0, 0, 0
    for batch in micro_batches(rows, range(len(rows))):
        losses = passes.losses(batch)
        total, count, done = total + float(losses.sum()), count + len(losses), done + batch.rows
        if on_progress:
            on_progress(done, len(rows))
    return total / count
