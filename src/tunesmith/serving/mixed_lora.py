"""LoRA terms for a batch whose rows belong to different adapters.

y += x A' B' for each row's own A and B (Hu et al. 2021, arXiv:2106.09685). Rows of one adapter that lie together are a
segment with two products. For a few rows of many adapters there is compiled C (``grouped_lora.py``). Where it could not
be compiled, the adapters' A and B are stacked: one product shrinks every row by every A, a mask keeps of each row its
own adapter's numbers, one product a layer expands. That computes more than needed in exchange for few and large
products; measured for 8 rows on 4 to 8 adapters it costs a third of gathering A and B per row by torch (as Punica's
BGMV does, Chen et al. 2023, arXiv:2310.18547). Layers on one input share the shrinking product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from tunesmith.serving.base_weights import EMBEDDINGS, BaseWeights, Group
from tunesmith.serving.seam import AdapterKey

MOST_STACKED_RANK = 256
_PARTS = 3  # PARTS of native/adapters.h: a group's most layers


@dataclass(frozen=True)
class LowRank:
    """``a`` (r, in) and ``b`` (r, out), the latter times alpha / r."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Part:
    """What columns ``ranks`` of the shrunk rows add to columns ``outputs`` by ``b`` (r, out)."""

    outputs: slice
    ranks: slice
    b: torch.Tensor


@dataclass(frozen=True)
class Term:
    """What is added to one group of layers: ``a`` (summed r, in)."""

    a: torch.Tensor
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: a term or None for each group of the base; ``embeddings`` with ``a`` (vocabulary, r)."""

    key: AdapterKey
    terms: tuple[Term | None, ...]
    embeddings: LowRank | None
    rank: int  # the largest of one layer

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [part.b for term in self.terms if term for part in term.parts]
        tensors += [term.a for term in self.terms if term]
        tensors += [self.embeddings.a, self.embeddings.b] if self.embeddings else []
        return sum(tensor.nbytes for tensor in tensors)

    @cached_property
    def shrunk(self) -> int:
        """The summed ranks of its widest term."""
        return max((len(term.a) for term in self.terms if term), default=0)

    @cached_property
    def addresses(self) -> torch.Tensor:
        """Its terms as ``lora_term`` of native/adapters.h, int64 (groups, 18). Valid while the adapter lives."""
        return torch.tensor([_addresses(term) for term in self.terms], dtype=torch.int64)


def _addresses(term: Term | None) -> list[int]:
    if term is None:
        return [0] * (3 + 5 * _PARTS)
    found = [term.a.data_ptr(), len(term.a), len(term.parts)]
    for part in term.parts:
        columns = part.outputs.stop - part.outputs.start
        found += [part.b.data_ptr(), part.outputs.start, columns, part.ranks.start, len(part.b)]
    return found + [0] * (5 * (_PARTS - len(term.parts)))


def adapter_of(key: AdapterKey, pairs: Mapping[str, LowRank], base: BaseWeights) -> Adapter:
    """Order an adapter's pairs, by name of their layer, along the base's groups."""
    terms = tuple(
        _term(group, [[pairs[n]] if n in pairs else [] for n in group.names]) for group in base.groups
    )
    embedding = pairs.get(EMBEDDINGS)
    if embedding is not None:  # looked up by token, so tokens are its rows
        embedding = LowRank(embedding.a.t().contiguous(), embedding.b)
    return Adapter(key, terms, embedding, max(len(pair.b) for pair in pairs.values()))


def _term(group: Group, pairs: Sequence[Sequence[LowRank]]) -> Term | None:
    """One term of the pairs of each part of the group."""
    a, parts, output, rank = [], [], 0, 0
    for size, of_part in zip(group.sizes, pairs, strict=True):
        if of_part:
            b = torch.cat([pair.b for pair in of_part])
            parts.append(Part(slice(output, output + size), slice(rank, rank + len(b)), b))
            a += [pair.a for pair in of_part]
            rank += len(b)
        output += size
    return Term(torch.cat(a), tuple(parts)) if parts else None


class Stack:
    """Several adapters' terms as one: of each part first the columns of the first adapter, then the next's."""

    def __init__(self, adapters: Sequence[Adapter], base: BaseWeights) -> None:
        self.numbers = {adapter.key: number for number, adapter in enumerate(adapters)}
        self.rank = sum(adapter.rank for adapter in adapters)
        self.terms: list[Term | None] = []
        self._owners: list[tuple[int, ...]] = []
        for group in base.groups:
            pairs: list[list[LowRank]] = []
            owners: list[int] = []
            for part in range(len(group.names)):
                found = [(number, _pair(adapter, group, part)) for number, adapter in enumerate(adapters)]
                of_part = [(number, pair) for number, pair in found if pair is not None]
                pairs.append([pair for _, pair in of_part])
                owners += [number for number, pair in of_part for _ in range(len(pair.b))]
            self.terms.append(_term(group, pairs))
            self._owners.append(tuple(owners))

    def masks(self, rows: Sequence[AdapterKey | None]) -> list[torch.Tensor]:
        """For each group (rows, summed r): 1 where the column is of the row's adapter, else 0."""
        numbers = torch.tensor([-1 if key is None else self.numbers[key] for key in rows])[:, None]
        made: dict[tuple[int, ...], torch.Tensor] = {}
        for owners in self._owners:
            if owners not in made:
                made[owners] = (numbers == torch.tensor(owners, dtype=torch.int64)[None]).float()
        return [made[owners] for owners in self._owners]


def _pair(adapter: Adapter, group: Group, part: int) -> LowRank | None:
    term = adapter.terms[group.number]
    start = sum(group.sizes[:part])
    for found in term.parts if term else ():
        if found.outputs.start == start:
            assert term is not None
            return LowRank(term.a[found.ranks], found.b)
    return None


class Plan:
    """Which rows of a batch get which terms; of this kind: none."""

    def embed(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """Add the adapters' part of the embeddings of ``tokens`` (rows,) to ``out`` (rows, width)."""

    def add(self, group: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the adapters' part of a group's output for ``x`` (rows, in) to ``out`` (rows, out)."""


class Segments(Plan):
    """Stretches of rows that lie together, each with its adapter."""

    def __init__(self, segments: Sequence[tuple[slice, Adapter]]) -> None:
        self._segments = segments

    def embed(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        for rows, adapter in self._segments:
            if adapter.embeddings is not None:
                _embed(tokens[rows], adapter.embeddings, out[rows])

    def add(self, group: int, x: torch.Tensor, out: torch.Tensor) -> None:
        for rows, adapter in self._segments:
            term = adapter.terms[group]
            if term is not None:
                _expand(torch.mm(x[rows], term.a.t()), term, out[rows])


def segments(rows: Sequence[tuple[int, Adapter | None]]) -> Plan:
    """The plan for stretches of rows, (length, adapter) in order; neighbours of one adapter become one."""
    found: list[tuple[slice, Adapter]] = []
    start = 0
    for _, stretch in groupby(rows, key=lambda row: row[1] and row[1].key):
        members = list(stretch)
        length, adapter = sum(count for count, _ in members), members[0][1]
        if adapter is not None:
            found.append((slice(start, start + length), adapter))
        start += length
    return Segments(found) if found else Plan()


class Stacked(Plan):
    """Rows by a stack that holds the adapters of all of them; embeddings are looked up segment by segment."""

    def __init__(self, stack: Stack, rows: Sequence[Adapter | None]) -> None:
        self._stack = stack
        self._masks = stack.masks([adapter.key if adapter else None for adapter in rows])
        self._segments = segments([(1, adapter) for adapter in rows])

    def embed(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        self._segments.embed(tokens, out)

    def add(self, group: int, x: torch.Tensor, out: torch.Tensor) -> None:
        term = self._stack.terms[group]
        if term is not None:
            _expand(torch.mm(x, term.a.t()).mul_(self._masks[group]), term, out)


def _expand(shrunk: torch.Tensor, term: Term, out: torch.Tensor) -> None:
    for part in term.parts:
        out[:, part.outputs].addmm_(shrunk[:, part.ranks], part.b)


def _embed(tokens: torch.Tensor, pair: LowRank, out: torch.Tensor) -> None:
    out.addmm_(pair.a.index_select(0, tokens), pair.b)
