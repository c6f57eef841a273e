"""Attention of packed rows, forward and backward, as batched products over rows of like length.

A row's token sees the prefix that all rows share and, causally, the row's own tokens. With S = scale Q K' + mask,
P = softmax(S) and O = P V (Vaswani et al. 2017, arXiv:1706.03762) the gradients are
dV = P' dO, dP = dO V', dS = P * (dP - rowsum(P * dP)), dQ = scale dS K and dK = scale dS' Q.
P is computed again in the backward pass: it would be the largest tensor of a layer. Blocks of queries bound its size
and leave out most of what the causal mask hides (after Dao et al. 2022, arXiv:2205.14135). Heads of grouped-query
attention that share a key stand below one another in one product, so keys are never repeated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tunesmith.data.packing import Layout
from tunesmith.models.kernels.scratch import Scratch

_QUERY_BLOCK = 128
_MOST_SCORES = 4_000_000  # of one product, all heads: 16 MB in float32
_HEADS = 9  # of a usual small model, for the size of a group only


@dataclass(frozen=True)
class Shape:
    """``heads`` queries and ``groups`` keys and values a token, each of ``size``; ``scale`` of the scores; ``window``
    of last tokens that a token sees, itself included, or None for all."""

    heads: int
    groups: int
    size: int
    scale: float
    window: int | None


@dataclass(frozen=True)
class RowGroup:
    """Rows of like length, padded to the longest.

    Attributes:
        prefix: shared tokens that these rows see before their own.
        rows, length: how many rows, and their padded length.
        places: int64, shape (rows * length,): flat places of their tokens; padding repeats a row's last token.
        real: int64: which of ``places`` are no padding; None: all.
    """

    prefix: int
    rows: int
    length: int
    places: torch.Tensor
    real: torch.Tensor | None


def row_groups(layout: Layout, device: torch.device) -> list[RowGroup]:
    """The rows of a micro-batch in groups of like length; the prefix is a group of its own."""
    groups = [_group(0, [(0, layout.prefix)], device)] if layout.prefix else []
    spans, begin = [], layout.prefix
    for length in layout.suffixes:
        spans.append((begin, length))
        begin += length
    spans = sorted((span for span in spans if span[1]), key=lambda span: -span[1])
    while spans:
        longest = spans[0][1]
        block = min(longest, _QUERY_BLOCK)
        most = max(1, _MOST_SCORES // (_HEADS * block * (layout.prefix + longest)))
        # Padding is computed: a row may be at most a sixteenth shorter than the longest of its group.
        alike = [span for span in spans[:most] if span[1] * 16 >= longest * 15]
        groups.append(_group(layout.prefix, alike, device))
        spans = spans[len(alike) :]
    return groups


def _group(prefix: int, spans: Sequence[tuple[int, int]], device: torch.device) -> RowGroup:
    longest = max(length for _, length in spans)
    steps = torch.arange(longest)
    places = torch.stack([begin + steps.clamp(max=length - 1) for begin, length in spans])
    real = torch.stack([steps < length for _, length in spans])
    flat = None if bool(real.all()) else real.flatten().nonzero().squeeze(1).to(device)
    return RowGroup(prefix, len(spans), longest, places.flatten().to(device), flat)


def query_blocks(length: int) -> Iterator[tuple[int, int]]:
    """The blocks of queries that a row of this length is cut into."""
    count = -(-length // _QUERY_BLOCK)
    for number in range(count):
        yield length * number // count, length * (number + 1) // count


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[RowGroup], shape: Shape, out: torch.Tensor,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Attention of every row into ``out``, shape (tokens, heads * size).

    Args:
        q: shape (tokens, heads * size); k and v: shape (tokens, groups * size); rows contiguous in themselves.
    """
    for group in groups:
        keys, values = (_keys(t, group, shape, scratch, n) for t, n in ((k, "keys"), (v, "values")))
        queries = _gather(q, group, scratch, "queries")
        outputs = scratch.take("outputs", tuple(queries.shape), q)
        for begin, end in query_blocks(group.length):
            seen = group.prefix + end
            probabilities = _probabilities(
                _by_key(queries, group, shape, begin, end), keys[:, :seen], group, shape, begin, scratch
            )
            block = torch.bmm(probabilities, values[:, :seen])
            _by_token(outputs, group, shape, begin, end).copy_(_ungroup(block, group, shape, end - begin))
        _scatter(outputs, group, out)


def attend_rows_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[RowGroup], shape: Shape,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, scratch: Scratch,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, shapes as in ``attend_rows``."""
    prefix = max((group.prefix for group in groups), default=0)
    parts = (shape.groups, prefix, shape.size)
    dk_prefix, dv_prefix = (scratch.take(name, parts, q).zero_() for name in ("dk prefix", "dv prefix"))
    for group in groups:
        keys, values = (_keys(t, group, shape, scratch, n) for t, n in ((k, "keys"), (v, "values")))
        queries = _gather(q, group, scratch, "queries")
        douts = _gather(dout, group, scratch, "douts")
        if group.real is not None:
            padding = torch.ones(len(douts), dtype=torch.bool, device=q.device)
            padding[group.real] = False
            douts[padding] = 0
        dqueries = scratch.take("dqueries", tuple(queries.shape), q)
        dkeys, dvalues = (scratch.take(n, tuple(keys.shape), q).zero_() for n in ("dkeys", "dvalues"))
        for begin, end in query_blocks(group.length):
            seen = group.prefix + end
            query = _by_key(queries, group, shape, begin, end)
            probabilities = _probabilities(query, keys[:, :seen], group, shape, begin, scratch)
            dblock = _by_key(douts, group, shape, begin, end)
            dvalues[:, :seen] += torch.bmm(probabilities.transpose(1, 2), dblock)
            dprobabilities = torch.bmm(
                dblock,
                values[:, :seen].transpose(1, 2),
                out=scratch.take("scores", tuple(probabilities.shape), q),
            )
            dscores = torch.ops.aten._softmax_backward_data.out(
                dprobabilities, probabilities, -1, q.dtype, grad_input=dprobabilities
            )
            dquery = torch.baddbmm(query, dscores, keys[:, :seen], beta=0, alpha=shape.scale)
            _by_token(dqueries, group, shape, begin, end).copy_(_ungroup(dquery, group, shape, end - begin))
            dkeys[:, :seen].baddbmm_(dscores.transpose(1, 2), query, alpha=shape.scale)
        _scatter(dqueries, group, dq)
        for gradient, shared, target in ((dkeys, dk_prefix, dk), (dvalues, dv_prefix, dv)):
            by_row = gradient.view(group.rows, shape.groups, -1, shape.size)
            if group.prefix:
                shared += by_row[:, :, : group.prefix].sum(0)
            own = by_row[:, :, group.prefix :].transpose(1, 2).reshape(group.rows * group.length, -1)
            _scatter(own, group, target)
    if prefix:
        for shared, target in ((dk_prefix, dk), (dv_prefix, dv)):
            target[:prefix] += shared.transpose(0, 1).reshape(prefix, -1)


def _gather(flat: torch.Tensor, group: RowGroup, scratch: Scratch, name: str) -> torch.Tensor:
    shape = (len(group.places), flat.shape[1])
    return torch.index_select(flat, 0, group.places, out=scratch.take(name, shape, flat))


def _scatter(rows: torch.Tensor, group: RowGroup, out: torch.Tensor) -> None:
    """Into ``out``, what belongs to no padding."""
    if group.real is None:
        out.index_copy_(0, group.places, rows)
    else:
        out.index_copy_(0, group.places[group.real], rows[group.real])


def _keys(flat: torch.Tensor, group: RowGroup, shape: Shape, scratch: Scratch, name: str) -> torch.Tensor:
    """Keys or values of prefix and rows, shape (rows * groups, prefix + length, size)."""
    length = group.prefix + group.length
    out = scratch.take(name, (group.rows, shape.groups, length, shape.size), flat)
    if group.prefix:
        shared = flat[: group.prefix].view(group.prefix, shape.groups, shape.size)
        out[:, :, : group.prefix] = shared.transpose(0, 1)
    own = _gather(flat, group, scratch, "own")
    out[:, :, group.prefix :] = own.view(group.rows, group.length, shape.groups, shape.size).transpose(1, 2)
    return out.view(group.rows * shape.groups, length, shape.size)


def _by_token(rows: torch.Tensor, group: RowGroup, shape: Shape, begin: int, end: int) -> torch.Tensor:
    """A view of the block's queries, shape (rows, groups, heads a group, block, size)."""
    by_token = rows.view(group.rows, group.length, shape.groups, -1, shape.size)
    return by_token[:, begin:end].permute(0, 2, 3, 1, 4)


def _by_key(rows: torch.Tensor, group: RowGroup, shape: Shape, begin: int, end: int) -> torch.Tensor:
    """The block's queries, those of one key together: (rows * groups, heads a group * block, size)."""
    view = _by_token(rows, group, shape, begin, end)
    return view.reshape(group.rows * shape.groups, -1, shape.size)


def _ungroup(block: torch.Tensor, group: RowGroup, shape: Shape, length: int) -> torch.Tensor:
    return block.view(group.rows, shape.groups, -1, length, shape.size)


def _probabilities(
    queries: torch.Tensor, keys: torch.Tensor, group: RowGroup, shape: Shape, begin: int, scratch: Scratch
) -> torch.Tensor:
    """Softmax of the masked scores of a block: (rows * groups, heads a group * block, keys)."""
    size = (queries.shape[0], queries.shape[1], keys.shape[1])
    scores = scratch.take("scores", size, queries)
    torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=shape.scale, out=scores)
    length = queries.shape[1] // (shape.heads // shape.groups)
    by_head = scores.view(queries.shape[0], -1, length, keys.shape[1])
    query = torch.arange(length, device=queries.device)[:, None] + group.prefix + begin
    if shape.window is None or shape.window >= keys.shape[1]:
        # Only the last columns hold keys that come after a query of the block.
        first = group.prefix + begin
        hidden = torch.arange(first, keys.shape[1], device=queries.device)[None] > query
        by_head[..., first:].masked_fill_(hidden, -torch.inf)
    else:
        key = torch.arange(keys.shape[1], device=queries.device)[None]
        by_head.masked_fill_((key > query) | (query - key >= shape.window), -torch.inf)
    out = scratch.take("probabilities", size, queries)
    return torch.ops.aten._softmax.out(scores, -1, False, out=out)
