"""Token-weighted loss of a model on held-out rows."""

from collections.abc import Callable
from typing import Any

import torch

from tunesmith.data.rows import TokenizedRows
from tunesmith.models.batches import MicroBatches
from tunesmith.models.loss import loss_sum


def row_loss(
    model: Any,
    rows: TokenizedRows,
    *,
    micro_batches: MicroBatches,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean of -log p over all trained tokens of ``rows``, in nats.

    Each token weighs the same, whatever row it stands in. The model's training mode is restored.

    Args:
        model: a causal LM.
        rows: held-out rows.
        micro_batches: how rows are cut into batches.
        autocast: compute dtype of matrix products; None: that of the weights.
        on_progress: called with rows done and rows in all.
    """
    was_training = model.training
    model.eval()
    total, count, done = 0.0, 0, 0
    try:
        with torch.inference_mode():
            for batch in micro_batches(rows, range(len(rows))):
                loss = loss_sum(model, batch, autocast)
                total, count, done = total + float(loss.total), count + loss.count, done + batch.rows
                if on_progress:
                    on_progress(done, len(rows))
    finally:
        model.train(was_training)
    return total / count
