"""The cache of keys and values while answers are made, in memory that is taken once.

transformers' own cache grows by joining: every token copies all of it, and the heap fills with chunks that are just
too small for the next copy (twice the cache was seen). Here each layer has room for the longest answer from the start.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values, (rows, heads, places, size), as views into memory for ``places`` places."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self._places = places
        self._room: dict[str, torch.Tensor] = {}

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
        rows, heads, count, size = states.shape
        if name not in self._room:
            self._room[name] = states.new_empty(rows, heads, self._places, size)
        room = self._room[name]
        room[:, :, begin : begin + count] = states
        return room[:, :, : begin + count]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows, in ascending order, and give no memory back before the batch ends."""
        if not self.is_initialized:
            return
        for name, states in (("keys", self.keys), ("values", self.values)):
            kept = states.index_select(0, beam_idx.to(states.device))
            self._room[name] = self._room[name][: len(kept)]
            room = self._room[name][:, :, : kept.shape[2]]
            room.copy_(kept)
            setattr(self, name, room)


def answer_cache(model: Any, places: int) -> DynamicCache:
    """An empty cache for ``model`` with room for ``places`` tokens a row.

    Layers with a window or with states of another kind keep the cache that transformers gives them.
    """
    cache = DynamicCache(config=model.config)
    # Without layer types in its config a model's cache makes plain layers as they are needed.
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers, cache.layer_class_to_replicate = [DynamicLayer() for _ in range(count)], None
    cache.layers = [RoomyLayer(places) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
