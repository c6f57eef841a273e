"""Attention of packed rows, forward and backward, as batched products over rows of like length, where ``segments.py``
has no compiled functions.

A row's token sees the prefix that all rows share and, causally, the row's own tokens. With S = scale Q K' + mask,
P = softmax(S) and O = P V (Vaswani et al. 2017, arXiv:1706.03762) the gradients are
dV = P' dO, dP = dO V', dS = P * (dP - rowsum(P * dP)), dQ = scale dS K and dK = scale dS' Q.
For long rows P would be the largest tensor of a layer: it is then computed again in the backward pass (after Dao et
al. 2022, arXiv:2205.14135). Heads of grouped-query attention that share a key stand below one another in one product,
so keys are repeated for no head; the prefix's keys are repeated for each row, and their gradients are summed.
"""

import torch

from tunesmith.models.kernels.arrangement import Arrangement, Block, Shape
from tunesmith.models.kernels.scratch import Scratch


def attend_rows(
    qkv: torch.Tensor, arrangement: Arrangement, shape: Shape, out: torch.Tensor, saved: torch.Tensor | None,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Attention of every row into ``out``, shape (tokens, heads * size).

    Args:
        qkv: shape (tokens, vectors * size), contiguous: a token's queries, then keys, then values, head by head.
        arrangement: of these rows, for this shape.
        saved: shape (scores,), where the probabilities are written for the backward pass; None: not kept.
    """
    queries, keys, values = _gathered(qkv, arrangement, shape, scratch)
    outputs = scratch.take("outputs", (arrangement.queries, shape.size), qkv)
    for block in arrangement.blocks:
        probabilities = _place(saved, block, queries, shape, scratch)
        _attend(queries, keys, block, shape, probabilities, scratch)
        torch.bmm(probabilities, _seen(values, block), out=_block(outputs, block))
    torch.index_select(outputs, 0, arrangement.outputs, out=out.view(-1, shape.size))


def attend_rows_backward(
    dout: torch.Tensor, qkv: torch.Tensor, arrangement: Arrangement, shape: Shape, dqkv: torch.Tensor,
    saved: torch.Tensor | None, scratch: Scratch,
) -> None:  # fmt: skip
    """Write the gradient of ``qkv`` into ``dqkv``; shapes as in ``attend_rows``, ``saved`` as it left it."""
    queries, keys, values = _gathered(qkv, arrangement, shape, scratch)
    douts = scratch.take("outputs", (arrangement.queries, shape.size), qkv)
    torch.index_select(dout.view(-1, shape.size), 0, arrangement.sources, out=douts)
    douts.index_fill_(0, arrangement.padding, 0)
    gradients = scratch.take("dgathered", (len(arrangement.gather), shape.size), qkv)
    dqueries, dkeys, dvalues = _split(gradients, arrangement)
    for block in arrangement.blocks:
        probabilities = _place(saved, block, queries, shape, scratch)
        if saved is None:
            _attend(queries, keys, block, shape, probabilities, scratch)
        dblock = _block(douts, block)
        # A batch's first block reaches all its keys and opens their sums.
        opened = 0 if block.whole else 1
        _seen(dvalues, block).baddbmm_(probabilities.transpose(1, 2), dblock, beta=opened)
        dprobabilities = torch.bmm(
            dblock,
            _seen(values, block).transpose(1, 2),
            out=_scores("scores", block, queries, shape, scratch),
        )
        dscores = torch.ops.aten._softmax_backward_data.out(
            dprobabilities, probabilities, -1, qkv.dtype, grad_input=dprobabilities
        )
        _block(dqueries, block).baddbmm_(dscores, _seen(keys, block), beta=0, alpha=shape.scale)
        _seen(dkeys, block).baddbmm_(
            dscores.transpose(1, 2), _block(queries, block), beta=opened, alpha=shape.scale
        )
    flat = dqkv.view(-1, shape.vectors, shape.size)
    torch.index_select(gradients, 0, arrangement.scatter, out=flat.view(-1, shape.size))
    for all_gradients, begin in ((dkeys, shape.heads), (dvalues, shape.heads + shape.groups)):
        of_prefix = flat[: arrangement.prefix, begin : begin + shape.groups].transpose(0, 1)
        for place, rows in arrangement.shared:
            by_row = all_gradients[place].view(rows, shape.groups, -1, shape.size)
            repeats = by_row[:, :, : arrangement.prefix]
            of_prefix += repeats[0] if rows == 1 else repeats.sum(0)


def _gathered(
    qkv: torch.Tensor, arrangement: Arrangement, shape: Shape, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = scratch.take("gathered", (len(arrangement.gather), shape.size), qkv)
    torch.index_select(qkv.view(-1, shape.size), 0, arrangement.gather, out=out)
    return _split(out, arrangement)


def _split(
    vectors: torch.Tensor, arrangement: Arrangement
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries, keys, values = vectors.split([arrangement.queries, arrangement.keys, arrangement.keys])
    return queries, keys, values


def _block(vectors: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's part of what belongs to queries: (batch, heads of a group * tokens, size)."""
    return vectors[block.queries].view(block.batch, -1, vectors.shape[-1])


def _seen(vectors: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's part of what belongs to keys: (batch, seen, size)."""
    return vectors[block.keys].view(block.batch, -1, vectors.shape[-1])[:, : block.seen]


def _scores(name: str, block: Block, like: torch.Tensor, shape: Shape, scratch: Scratch) -> torch.Tensor:
    """A buffer for a block's scores: (batch, heads of a group * tokens, seen)."""
    tokens = shape.heads // shape.groups * len(block.hidden)
    return scratch.take(name, (block.batch, tokens, block.seen), like)


def _place(
    saved: torch.Tensor | None, block: Block, like: torch.Tensor, shape: Shape, scratch: Scratch
) -> torch.Tensor:
    """Where the probabilities of a block stand, in the shape of its scores."""
    if saved is None:
        return _scores("probabilities", block, like, shape, scratch)
    return saved[block.scores].view(block.batch, -1, block.seen)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, block: Block, shape: Shape, probabilities: torch.Tensor,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Softmax of the masked scores of a block into ``probabilities``."""
    scores = _scores("scores", block, queries, shape, scratch)
    scores.baddbmm_(_block(queries, block), _seen(keys, block).transpose(1, 2), beta=0, alpha=shape.scale)
    by_head = scores.view(block.batch, -1, len(block.hidden), block.seen)
    by_head[..., block.first :].masked_fill_(block.hidden, -torch.inf)
    torch.ops.aten._softmax.out(scores, -1, False, out=probabilities)
