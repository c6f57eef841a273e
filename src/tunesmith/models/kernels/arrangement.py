"""In which order attention works through packed rows: one gather of queries, keys and values, then a list of blocks.

Rows of like length stand together as a batch. A block is a range of queries of such a batch, with the keys they can
see; blocks bound the memory of scores and leave out most of what the causal mask hides. It all depends on the lengths
of the rows alone, so it is laid out once a micro-batch and serves every layer, forward and backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tunesmith.data.packing import Layout

QUERY_BLOCK = 128
_MOST_SCORES = 4_000_000  # of one product, all heads: 16 MB in float32


@dataclass(frozen=True)
class Shape:
    """``heads`` queries and ``groups`` keys and values a token, each of ``size``; ``scale`` of the scores; ``window``
    of last tokens that a token sees, itself included, or None for all."""

    heads: int
    groups: int
    size: int
    scale: float
    window: int | None

    @property
    def vectors(self) -> int:
        """Queries, keys and values of a token."""
        return self.heads + 2 * self.groups


@dataclass(frozen=True)
class Block:
    """Queries of one batch, and the keys they see.

    Attributes:
        batch: rows times groups.
        queries: where they stand among all queries, in the order (row, group, head of the group, token).
        keys: where the batch's keys stand among all keys, in the order (row, group, token).
        scores: where its scores stand among all scores, in the order (row, group, head of the group, token, key).
        seen: how many of a row's keys, from its first on.
        hidden: bool, shape (tokens, seen - first): keys from ``first`` on that a query must not see.
        whole: it sees all of a row's keys; of a batch's blocks, this is the first.
    """

    batch: int
    queries: slice
    keys: slice
    scores: slice
    seen: int
    first: int
    hidden: torch.Tensor
    whole: bool


@dataclass(frozen=True)
class Arrangement:
    """Places of vectors, int64.

    Attributes:
        gather: of the flat list's vectors, shape (tokens * vectors,), those that queries, then keys, then values are.
        scatter: for each of the flat list's vectors, where it stands among those: in its own row, once.
        outputs: for each of the flat list's (tokens * heads) outputs, where it stands among the queries.
        sources: for each query, its place among the outputs.
        padding: queries that are none.
        queries, keys, scores: how many.
        shared: (where keys begin, rows) of each batch that repeats the prefix.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    outputs: torch.Tensor
    sources: torch.Tensor
    padding: torch.Tensor
    queries: int
    keys: int
    scores: int
    blocks: tuple[Block, ...]
    shared: tuple[tuple[slice, int], ...]
    prefix: int


@dataclass(frozen=True)
class Batch:
    """Rows of like length: ``prefix`` shared tokens, then ``spans`` (first token, length), padded to ``longest``."""

    prefix: int
    spans: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        return max(length for _, length in self.spans)


def row_batches(layout: Layout, shape: Shape) -> list[Batch]:
    """The rows of a micro-batch by length; the prefix is a batch of its own."""
    batches = [Batch(0, ((0, layout.prefix),))] if layout.prefix else []
    spans, begin = [], layout.prefix
    for length in layout.suffixes:
        spans.append((begin, length))
        begin += length
    spans = sorted((span for span in spans if span[1]), key=lambda span: -span[1])
    while spans:
        longest = spans[0][1]
        scores = shape.heads * min(longest, QUERY_BLOCK) * (layout.prefix + longest)
        # Padding is computed: a row may be at most a sixteenth shorter than the longest of its batch.
        alike = [span for span in spans[: max(1, _MOST_SCORES // scores)] if span[1] * 16 >= longest * 15]
        batches.append(Batch(layout.prefix, tuple(alike)))
        spans = spans[len(alike) :]
    return batches


def query_blocks(length: int) -> Iterator[tuple[int, int]]:
    """The ranges that a row of this length is cut into, the last first."""
    count = -(-length // QUERY_BLOCK)
    for number in reversed(range(count)):
        yield length * number // count, length * (number + 1) // count


def arrange(layout: Layout, shape: Shape, device: torch.device) -> Arrangement:
    """Lay out a micro-batch for layers of this shape."""
    tokens = layout.prefix + sum(layout.suffixes)
    batches = row_batches(layout, shape)
    queries: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    # True where a query is no padding, and where a key is its row's own and no padding.
    real_queries: list[torch.Tensor] = []
    own_keys: list[torch.Tensor] = []
    blocks: list[Block] = []
    shared: list[tuple[slice, int]] = []
    query_count, key_count, score_count = 0, 0, 0
    heads = torch.arange(shape.heads).view(1, shape.groups, -1, 1)
    groups = torch.arange(shape.groups).view(1, -1, 1) + shape.heads
    for batch in batches:
        steps = torch.arange(batch.longest)
        places = torch.stack([begin + steps.clamp(max=length - 1) for begin, length in batch.spans])
        real = torch.stack([steps < length for _, length in batch.spans])
        rows, count = len(batch.spans), len(batch.spans) * shape.groups
        seen = torch.cat([torch.arange(batch.prefix).expand(rows, -1), places], 1)
        own = torch.cat([torch.zeros(rows, batch.prefix, dtype=torch.bool), real], 1)
        keys.append((seen[:, None] * shape.vectors + groups).flatten())
        own_keys.append(own[:, None].expand(-1, shape.groups, -1).flatten())
        key_range = slice(key_count, key_count + len(keys[-1]))
        key_count = key_range.stop
        if batch.prefix:
            shared.append((key_range, rows))
        for begin, end in query_blocks(batch.longest):
            queries.append((places[:, None, None, begin:end] * shape.vectors + heads).flatten())
            of_head = real[:, None, None, begin:end].expand(-1, *heads.shape[1:3], -1)
            real_queries.append(of_head.flatten())
            query_range = slice(query_count, query_count + len(queries[-1]))
            query_count = query_range.stop
            stop = batch.prefix + end
            score_range = slice(score_count, score_count + len(queries[-1]) * stop)
            score_count = score_range.stop
            first, hidden = _hidden(batch.prefix + begin, stop, shape.window)
            blocks.append(
                Block(
                    count,
                    query_range,
                    key_range,
                    score_range,
                    stop,
                    first,
                    hidden.to(device),
                    end == batch.longest,
                )
            )
    query, key = torch.cat(queries), torch.cat(keys)
    real, own = torch.cat(real_queries), torch.cat(own_keys)
    scatter = torch.empty(tokens * shape.vectors, dtype=torch.int64)
    scatter[query[real]] = torch.arange(query_count)[real]
    for offset, part in ((0, 0), (key_count, shape.groups)):
        scatter[(key + part)[own]] = query_count + offset + torch.arange(key_count)[own]
    return Arrangement(
        gather=torch.cat([query, key, key + shape.groups]).to(device),
        scatter=scatter.to(device),
        outputs=scatter.view(tokens, -1)[:, : shape.heads].flatten().to(device),
        sources=(query // shape.vectors * shape.heads + query % shape.vectors).to(device),
        padding=(~real).nonzero().squeeze(1).to(device),
        queries=query_count,
        keys=key_count,
        scores=score_count,
        blocks=tuple(blocks),
        shared=tuple(shared),
        prefix=layout.prefix,
    )


def _hidden(begin: int, stop: int, window: int | None) -> tuple[int, torch.Tensor]:
    """The first key that some query of ``range(begin, stop)`` must not see, and a mask from there on."""
    # Without a window only the last keys come after a query of the block.
    first = begin if window is None else 0
    query, key = torch.arange(begin, stop)[:, None], torch.arange(first, stop)[None]
    hidden = key > query
    return first, hidden if window is None else hidden | (query - key >= window)
