"""LoRA terms of rows of different adapters by ``native/adapters.h``: each row by its own A and B, which lie as loaded.

What the C reads of an adapter is a table of addresses, made once an adapter; of a batch, where each adapter's rows lie.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from tunesmith.native import compiled
from tunesmith.serving.base_weights import BaseWeights
from tunesmith.serving.mixed_lora import Adapter, Plan, segments

_SIGNATURE = "pnpnnpnpnnn"  # of add_adapters
_RANKS = 4  # RANKS of native/adapters.h: shrunk rows are padded to whole ones


def is_grouped(base: BaseWeights) -> bool:
    """Whether ``Grouped`` was compiled for this base's type of numbers."""
    return compiled("serving", "add_adapters", _SIGNATURE, base.embeddings) is not None


class Grouped(Plan):
    """Stretches of rows, (length, adapter) in order, those of one adapter together.

    ``table`` (adapters, 3) int64: an adapter's first row, its rows and the address of its terms, as the C reads them.
    ``rank``: numbers of a shrunk row.
    """

    def __init__(self, stretches: Sequence[tuple[int, Adapter | None]]) -> None:
        self._embedded = segments(stretches)
        self._adapters: list[Adapter] = []  # kept while their addresses are in use
        found: list[tuple[int, int, int]] = []
        start = 0
        for _, neighbours in groupby(stretches, key=lambda stretch: stretch[1] and stretch[1].key):
            members = list(neighbours)
            rows, adapter = sum(length for length, _ in members), members[0][1]
            if adapter is not None:
                found.append((start, rows, adapter.addresses.data_ptr()))
                self._adapters.append(adapter)
            start += rows
        self.table = torch.tensor(found, dtype=torch.int64).view(-1, 3)
        self.rank = -(-max((adapter.shrunk for adapter in self._adapters), default=0) // _RANKS) * _RANKS

    def embed(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        self._embedded.embed(tokens, out)

    def add(self, group: int, x: torch.Tensor, out: torch.Tensor) -> None:
        if not any(adapter.terms[group] for adapter in self._adapters):
            return
        add_adapters = compiled("serving", "add_adapters", _SIGNATURE, x)
        assert add_adapters is not None
        add_adapters(
            x,
            x.stride(0),
            self.table,
            len(self.table),
            group,
            x.new_empty(len(x), self.rank),
            self.rank,
            out,
            out.stride(0),
            x.shape[1],
            out.shape[1],
        )
