"""Keys and values of running requests, and of prompts that may come again.

A slot is one request's stretch of ``capacity`` tokens in every layer. A token's keys and values lie side by side, so
that a pass writes them by one copy out of the projection's output. All memory is taken at once as zero pages, which
the operating system backs at first touch: nothing is moved while requests grow, and idle capacity costs nothing.
Zeroed, because a masked score times a NaN would still be a NaN.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.models.kernels.arrangement import Shape
from tunesmith.serving.pages import small_pages

BLOCK = 16  # tokens of a block of the prefix cache


class KvCache:
    """``slots`` stretches of ``capacity`` tokens a layer; free slots are given lowest first, so used ones lie close."""

    def __init__(self, shapes: Sequence[Shape], slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._shapes = shapes
        self.layers = [small_pages(slots * capacity, 2 * shape.groups * shape.size) for shape in shapes]
        self._free = list(range(slots))

    def take(self) -> int | None:
        """A free slot, None where there is none."""
        if not self._free:
            return None
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def give(self, slot: int) -> None:
        """Free a slot; its content is garbage from here on."""
        self._free.append(slot)

    def clear(self, slot: int, tokens: int) -> None:
        """Zero the first ``tokens`` of a slot, which may not be finite: the next request's padding must be."""
        for layer in self.layers:
            layer[slot * self.capacity :][:tokens].zero_()

    def view(self, layer: int, first: int, slots: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first ``tokens`` of ``slots`` slots, each (slots, groups, tokens, size)."""
        shape = self._shapes[layer]
        whole = self.layers[layer].view(self.slots, self.capacity, 2, shape.groups, shape.size)
        both = whole[first : first + slots, :tokens]
        return both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)


@dataclass(frozen=True)
class _Block:
    serial: int  # names this block as a parent
    place: int  # in the pool


class PrefixCache:
    """Keys and values of past prompts, block by block, least recently used ones given up first.

    A block is found by its parent and its tokens, the first by the adapter: equal keys mean equal adapters and equal
    tokens from the start, compared in full and not by a hash. A parent is always used later than its children, so
    the ends of long prompts go first.
    """

    def __init__(self, cache: KvCache, tokens: int) -> None:
        self._cache = cache
        self._blocks: OrderedDict[tuple[str | int, tuple[int, ...]], _Block] = OrderedDict()
        places = tokens // BLOCK
        self._pools = [small_pages(places, BLOCK, layer.shape[1]) for layer in cache.layers]
        self._free = list(range(places))
        self._serial = 0

    @property
    def tokens(self) -> int:
        """Tokens that are kept now."""
        return len(self._blocks) * BLOCK

    def restore(self, adapter: str, prompt: Sequence[int], slot: int) -> int:
        """Copy the longest known prefix into ``slot``; how many tokens that are.

        The last token is always left over: its pass gives the first logits.
        """
        found = self._find(adapter, prompt, (len(prompt) - 1) // BLOCK)
        if not found:
            return 0
        places = torch.tensor([block.place for block in found])
        start, count = slot * self._cache.capacity, len(found) * BLOCK
        for layer, pool in zip(self._cache.layers, self._pools, strict=True):
            layer[start : start + count] = pool.index_select(0, places).view(count, -1)
        return count

    def keep(self, adapter: str, tokens: Sequence[int], slot: int) -> None:
        """Keep the whole blocks of ``tokens``, whose keys and values ``slot`` holds."""
        if not self._pools or not len(self._pools[0]):
            return
        wanted = min(len(tokens) // BLOCK, len(self._pools[0]))
        found = self._find(adapter, tokens, wanted)
        sources, places, parent = [], [], self._parent(adapter, found)
        for number in range(len(found), wanted):
            place = self._place()
            self._serial += 1
            self._blocks[(parent, _block(tokens, number))] = _Block(self._serial, place)
            sources.append(number)
            places.append(place)
            parent = self._serial
        if not sources:
            return
        start, count = slot * self._cache.capacity, wanted * BLOCK
        for layer, pool in zip(self._cache.layers, self._pools, strict=True):
            rows = layer[start : start + count].view(wanted, BLOCK, -1)[len(found) :]
            pool.index_copy_(0, torch.tensor(places), rows)
        self._touch(adapter, tokens, wanted)

    def _find(self, adapter: str, tokens: Sequence[int], most: int) -> list[_Block]:
        found: list[_Block] = []
        for number in range(most):
            block = self._blocks.get((self._parent(adapter, found), _block(tokens, number)))
            if block is None:
                break
            found.append(block)
        self._touch(adapter, tokens, len(found))
        return found

    def _touch(self, adapter: str, tokens: Sequence[int], count: int) -> None:
        keys, parent = [], self._parent(adapter, [])
        for number in range(count):
            key = (parent, _block(tokens, number))
            keys.append(key)
            parent = self._blocks[key].serial
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _place(self) -> int:
        """A free place in the pool, else that of the block that was not used for longest."""
        if self._free:
            return self._free.pop()
        _, block = self._blocks.popitem(last=False)
        return block.place

    @staticmethod
    def _parent(adapter: str, found: Sequence[_Block]) -> str | int:
        return found[-1].serial if found else adapter


def _block(tokens: Sequence[int], number: int) -> tuple[int, ...]:
    return tuple(tokens[number * BLOCK : (number + 1) * BLOCK])
