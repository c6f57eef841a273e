"""Attention of packed rows by the compiled functions: who computes what, and in how much memory.

A segment is the shared prefix or a row's own tokens; a task is a segment's heads that share a key. Tasks go to threads
before the work begins, the largest first and each to the one with least so far, so that the same thread adds up the
same sums in the same order each time.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tunesmith.data.packing import Layout
from tunesmith.models.kernels.arrangement import Shape
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.native import compiled

_QUERIES = 16  # tokens of a block, as in native/attention.h


@dataclass(frozen=True)
class Segments:
    """A micro-batch's segments and tasks, int64: see native/attention.h. ``keys``: the most that a token sees."""

    starts: torch.Tensor
    lengths: torch.Tensor
    tasks: torch.Tensor
    owners: torch.Tensor
    prefix: int
    keys: int
    threads: int


def segments(layout: Layout, shape: Shape) -> Segments:
    """Lay out a micro-batch for layers of this shape and the threads that torch has."""
    threads, prefix = torch.get_num_threads(), layout.prefix
    spans = list(_spans(layout))
    costs = [
        (length * ((prefix if start else 0) + length / 2), number)
        for number, (start, length) in enumerate(spans)
    ]
    load = [(0.0, thread) for thread in range(threads)]
    tasks, owners = [], []
    for cost, number in sorted(costs, key=lambda pair: (-pair[0], pair[1])):
        for group in range(shape.groups):
            least, thread = heapq.heappop(load)
            heapq.heappush(load, (least + cost, thread))
            tasks.append(number * shape.groups + group)
            owners.append(thread)
    starts, lengths = zip(*spans, strict=True)
    return Segments(
        starts=torch.tensor(starts), lengths=torch.tensor(lengths), tasks=torch.tensor(tasks),
        owners=torch.tensor(owners), prefix=prefix, keys=most_keys(layout), threads=threads,
    )  # fmt: skip


def _spans(layout: Layout) -> Iterator[tuple[int, int]]:
    """First token and length of the prefix, where there is one, and of each row's own tokens."""
    if layout.prefix:
        yield 0, layout.prefix
    begin = layout.prefix
    for length in layout.suffixes:
        if length:
            yield begin, length
        begin += length


def most_keys(layout: Layout) -> int:
    """Tokens of the longest row."""
    return layout.prefix + max(layout.suffixes, default=0)


def workspace(keys: int, shape: Shape, element: int) -> int:
    """Elements that a thread needs for rows of ``keys`` tokens, of ``element`` bytes each.

    The backward pass has most: keys and values as columns, keys as rows and the gradients of both; queries, gradients
    of outputs and of queries of a block; its scores and their gradients.
    """
    lanes = 64 // element
    padded, rows = -(-keys // lanes) * lanes, shape.heads // shape.groups * _QUERIES
    needed = 2 * shape.size * padded + 3 * keys * shape.size + 3 * rows * shape.size + 2 * rows * padded
    return -(-needed // lanes) * lanes


def prefix_sums(prefix: int, shape: Shape) -> int:
    """Elements in which a thread adds up the gradients of the prefix's keys and values."""
    return 2 * shape.groups * prefix * shape.size


def attend(qkv: torch.Tensor, rows: Segments, shape: Shape, out: torch.Tensor, scratch: Scratch) -> None:
    """Attention of every row into ``out``, (tokens, heads * size); ``qkv``: contiguous, (tokens, vectors * size)."""
    native = compiled("training", "attend", "ppppppnnnnnnxpn", qkv)
    assert native is not None
    work, share = _work(qkv, rows, shape, scratch)
    native(qkv, out, *_described(rows, shape), work, share)


def attend_backward(
    dout: torch.Tensor, qkv: torch.Tensor, rows: Segments, shape: Shape, dqkv: torch.Tensor, scratch: Scratch
) -> None:
    """Write the gradient of ``qkv`` into ``dqkv``; shapes as in ``attend``."""
    native = compiled("training", "attend_backward", "pppppppnnnnnnxpnp", qkv)
    assert native is not None
    work, share = _work(qkv, rows, shape, scratch)
    sums = scratch.take("prefix sums", (rows.threads * prefix_sums(rows.prefix, shape),), qkv)
    native(dout, qkv, dqkv, *_described(rows, shape), work, share, sums)


def _described(rows: Segments, shape: Shape) -> tuple[torch.Tensor | float, ...]:
    return (
        rows.starts, rows.lengths, rows.tasks, rows.owners, len(rows.tasks), rows.prefix, shape.heads, shape.groups,
        shape.size, shape.window or 0, shape.scale,
    )  # fmt: skip


def _work(qkv: torch.Tensor, rows: Segments, shape: Shape, scratch: Scratch) -> tuple[torch.Tensor, int]:
    share = workspace(rows.keys, shape, qkv.element_size())
    return scratch.take("attention work", (rows.threads * share,), qkv), share
