"""Rows -> one flat list of tokens without padding, in which a prefix that all rows share stands once.

Chats of one data set open with the same system text. In a causal model the states of those tokens depend on
nothing behind them, so they are equal in every row: they are computed once, and every row attends to them.
The gradient that autograd gives them is the sum over rows, as if each row had computed its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.rendering import TokenizedExample
from tunesmith.data.rows import TokenizedRows


@dataclass(frozen=True)
class Layout:
    """Where rows stand in the flat list: ``prefix`` shared tokens, then each row's own ``suffixes`` tokens."""

    prefix: int
    suffixes: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """Rows of a micro-batch, flat.

    Attributes:
        input_ids: int64, shape (tokens,): the shared prefix, then the rest of each row.
        position_ids: int64, shape (tokens,): a token's place in its row.
        sources: int64, shape (trained,): the flat place of the token that predicts each target.
        targets: int64, shape (trained,): the ids to predict, row by row.
        layout: the borders of rows.
        rows, real_tokens: rows, and tokens of all rows, the prefix counted once a row.
        members: which rows of the split these are, in their order here; empty where nobody said.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    layout: Layout
    rows: int
    real_tokens: int
    members: tuple[int, ...] = ()

    @property
    def trained_tokens(self) -> int:
        return len(self.targets)


def shared_prefix(rows: Sequence[TokenizedExample]) -> int:
    """Tokens that all rows open with and none is trained on.

    A trained token counts once for each row that has it, so the prefix ends before the first of them. It also
    leaves every row at least one token of its own.
    """
    first = rows[0].ids
    length = min(min(len(row.ids) - 1, int(row.trained.argmax())) for row in rows)
    for row in rows[1:]:
        same = row.ids[:length] == first[:length]
        length = length if same.all() else int(same.argmin())
    return length if len(rows) > 1 else 0


def pack_rows(rows: Sequence[TokenizedExample], device: torch.device) -> PackedBatch:
    """Lay rows out flat. What stands behind a row's last target predicts nothing and is left out."""
    prefix = shared_prefix(rows)
    ids, positions = [rows[0].ids[:prefix]], [np.arange(prefix)]
    sources, targets, suffixes = [], [], []
    flat = prefix
    for row in rows:
        places = row.trained.nonzero()[0]
        end = int(places[-1])  # the last target is predicted, not read
        ids.append(row.ids[prefix:end])
        positions.append(np.arange(prefix, end))
        before = places - 1
        sources.append(np.where(before < prefix, before, before - prefix + flat))
        targets.append(row.ids[places])
        suffixes.append(end - prefix)
        flat += end - prefix
    return PackedBatch(
        _tensor(ids, device),
        _tensor(positions, device),
        _tensor(sources, device),
        _tensor(targets, device),
        Layout(prefix, tuple(suffixes)),
        len(rows),
        sum(len(row.ids) for row in rows),
    )


def split_packed(
    rows: TokenizedRows, chosen: Sequence[int], token_budget: int, most_rows: int | None = None
) -> list[list[int]]:
    """Cut rows into groups of at most ``token_budget`` computed tokens and ``most_rows`` rows each.

    Groups are filled evenly, so that the last one is not a straggler with matrix products too small to be
    efficient. A row longer than the budget stands alone.
    """
    prefix = shared_prefix([rows.row(i) for i in chosen])
    cost = {i: max(1, int(rows.lengths[i]) - prefix) for i in chosen}
    room = max(1, token_budget - prefix)
    count = max(1, -(-sum(cost.values()) // room))
    aim = sum(cost.values()) / count
    groups: list[list[int]] = [[]]
    filled = 0
    for row in chosen:
        full = filled + cost[row] > room or filled + cost[row] / 2 > aim
        if groups[-1] and (full or len(groups[-1]) == most_rows):
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += cost[row]
    return groups


def _tensor(parts: Sequence[NDArray[np.integer]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
