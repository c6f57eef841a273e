"""The cache of keys and values while answers are made, in memory that is taken once.

transformers' own cache grows by joining: every token copies all of it, and the heap fills with chunks that are just
too small for the next copy (twice the cache was seen). Here each layer has room for the longest answer from the start,
all of them in one piece: between what a pass over prompts takes and gives back, pieces of their own would tear holes
that fit nothing (300 MB were seen).
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Room:
    """Memory for the keys and values of ``layers`` layers, ``rows`` rows of ``places`` places each."""

    def __init__(self, layers: int, rows: int, places: int) -> None:
        self.rows, self._places, self._left = rows, places, 2 * layers
        self._rooms: torch.Tensor | None = None

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, heads, places, size) for states of (any, heads, any, size), of their type and on their device."""
        _, heads, _, size = states.shape
        shape = (self.rows, heads, self._places, size)
        if self._rooms is None:
            self._rooms = states.new_empty(self._left, *shape)
        if not self._left or self._rooms.shape[1:] != shape or not _alike(self._rooms, states):
            return states.new_empty(shape)  # a layer unlike the first
        self._left -= 1
        return self._rooms[self._left]


class RoomyLayer(DynamicLayer):
    """Keys and values, (rows, heads, places, size), as views into ``room``; for a while, of some of the rows."""

    def __init__(self, room: _Room) -> None:
        super().__init__()
        self._common = room
        self._room: dict[str, torch.Tensor] = {}
        self._part = slice(0, room.rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of further places; all states so far. As ``DynamicLayer.update``, to the bit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        self.keys = self._with("keys", begin, key_states)
        self.values = self._with("values", begin, value_states)
        return self.keys, self.values

    def _with(self, name: str, begin: int, states: torch.Tensor) -> torch.Tensor:
        count = states.shape[2]
        if name not in self._room:
            self._room[name] = self._common.take(states)
        room = self._room[name][self._part]
        room[:, :, begin : begin + count] = states
        return room[:, :, : begin + count]

    def turn_to(self, part: slice, places: int) -> None:
        """Be the cache of these rows, of which ``places`` places are filled."""
        self._part = part
        if self._room:
            self.keys, self.values = (self._room[name][part, :, :places] for name in ("keys", "values"))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows, in ascending order, and give no memory back before the batch ends."""
        if not self.is_initialized:
            return
        for name, states in (("keys", self.keys), ("values", self.values)):
            kept = states.index_select(0, beam_idx.to(states.device))
            room = self._room[name][: len(kept), :, : kept.shape[2]]
            room.copy_(kept)
            setattr(self, name, room)
        self._part = slice(0, len(beam_idx))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.dtype == other.dtype and one.device == other.device)


def answer_cache(model: Any, rows: int, places: int) -> DynamicCache:
    """An empty cache for ``model`` with room for ``rows`` rows of ``places`` tokens.

    Layers with a window or with states of another kind keep the cache that transformers gives them.
    """
    cache = DynamicCache(config=model.config)
    # Without layer types in its config a model's cache makes plain layers as they are needed.
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers, cache.layer_class_to_replicate = [DynamicLayer() for _ in range(count)], None
    room = _Room(sum(type(layer) is DynamicLayer for layer in cache.layers), rows, places)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def parts(cache: DynamicCache, rows: int, most: int, places: int) -> Iterator[slice]:
    """Stretches of at most ``most`` rows in which prompts of ``places`` tokens are to be read into an empty cache.

    While one is read, the cache is that of its rows alone; after the last it is that of all. Where a layer keeps
    another kind of cache, all rows are one stretch.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, RoomyLayer)]
    if len(layers) < len(cache.layers):
        most = rows
    for start in range(0, rows, most):
        part = slice(start, min(start + most, rows))
        for layer in layers:
            layer.turn_to(part, 0)
        yield part
    for layer in layers:
        layer.turn_to(slice(0, rows), places)
