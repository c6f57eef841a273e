"""Memory of the cache of keys and values: what is used is taken, and no more."""

import sys

import pytest
import torch

from tunesmith.free_memory import resident_bytes
from tunesmith.models.kernels.arrangement import Shape
from tunesmith.serving.kv_cache import KvCache


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_idle_capacity_takes_no_memory() -> None:
    shapes = [Shape(heads=9, groups=3, size=64, scale=1.0, window=None)] * 12
    before = resident_bytes()
    cache = KvCache(shapes, slots=16, capacity=2048)
    for layer in cache.layers:
        layer.view(16, 2048, -1)[:, :64] = 1.0
    used = 12 * 16 * 64 * 2 * 3 * 64 * 4  # 19 MB of 604
    assert 0.9 * used < resident_bytes() - before < 1.5 * used
    keys, values = cache.view(11, 2, 3, 65)
    assert torch.equal(keys[:, :, :64], torch.ones(3, 3, 64, 64))
    assert not values[:, :, 64].any()
