"""Rows -> micro-batches: the rows of one optimizer step, cut into padded blocks that fit a token budget.

How a step is cut changes memory and speed, never the result: each micro-batch yields a sum and a count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.rendering import TokenizedExample


@dataclass(frozen=True)
class MicroBatch:
    """Padded rows.

    Attributes:
        input_ids: int64, shape (rows, longest), padded on the right.
        attention_mask: int64, same shape: 1 on real tokens; None where no row is padded.
        trained: bool, same shape: True where the token is a target.
        rows, real_tokens, trained_tokens: counts over the whole micro-batch.
        members: which rows of the split these are, in their order here; empty where nobody said.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    trained: torch.Tensor
    rows: int
    real_tokens: int
    trained_tokens: int
    members: tuple[int, ...] = ()


def split_by_tokens(
    rows: Sequence[int], lengths: NDArray[np.int64], token_budget: int, most_rows: int | None = None
) -> list[list[int]]:
    """Cut ``rows`` into groups whose padded size stays within ``token_budget``; a longer row stands alone.

    Rows are grouped by length so that little is padded. Ties keep the given order.
    """
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda r: -int(lengths[r])):
        width = int(lengths[groups[-1][0]]) if groups else 0
        fits = groups and (len(groups[-1]) + 1) * width <= token_budget
        if fits and (most_rows is None or len(groups[-1]) < most_rows):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def pad_rows(rows: Sequence[TokenizedExample], pad_token_id: int, device: torch.device) -> MicroBatch:
    """Stack rows, padded on the right. Which id pads does not matter: padding is masked by place."""
    lengths = [len(row.ids) for row in rows]
    shape = (len(rows), max(lengths))
    ids = np.full(shape, pad_token_id, np.int64)
    trained = np.zeros(shape, np.bool_)
    mask = np.zeros(shape, np.int64)
    for index, row in enumerate(rows):
        ids[index, : lengths[index]] = row.ids
        trained[index, : lengths[index]] = row.trained
        mask[index, : lengths[index]] = 1
    return MicroBatch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device) if min(lengths) < max(lengths) else None,
        torch.from_numpy(trained).to(device),
        len(rows),
        sum(lengths),
        int(trained.sum()),
    )
