"""Dropout by drawing the few elements that fall, in place of one random number for each that stays.

In a row of independent trials with probability p, the gaps between successes are geometrically distributed:
P(gap > k) = (1 - p)^k, so a gap is 1 + floor(log(u) / log(1 - p)) for u uniform in (0, 1] (Devroye 1986,
"Non-Uniform Random Variate Generation", X.2). The mask has the distribution of Bernoulli draws at a twentieth of the
random numbers for p = 0.05, and its memory is the places that fell.
"""

import math

import torch

from tunesmith.native import compiled


def draw_dropped(size: int, probability: float) -> torch.Tensor:
    """Places in ``range(size)`` that fall, each independently with ``probability``; int64, ascending.

    Random numbers come from torch's global CPU generator, or from one that it seeds anew for every call.
    """
    if probability <= 0 or size == 0:
        return torch.empty(0, dtype=torch.int64)
    if probability >= 1:
        return torch.arange(size)
    parts: list[torch.Tensor] = []
    last = -1
    while last < size:
        expected = (size - last) * probability
        count = int(expected + 6 * math.sqrt(expected) + 8)
        places = _places_above(last, count, 1 / math.log1p(-probability))
        parts.append(places)
        last = int(places[-1])
    drawn = torch.cat(parts) if len(parts) > 1 else parts[0]
    return drawn[: int(torch.searchsorted(drawn, size))]


def _places_above(last: int, count: int, factor: float) -> torch.Tensor:
    """``count`` ascending places, with gaps of 1 + floor(factor log(u))."""
    if native := compiled("training", "draw_places", "nnxpn"):
        places = torch.empty(count, dtype=torch.int64)
        native(int(torch.randint(2**63 - 1, ())), last, factor, places, count)
        return places
    # 1 - u lies in (0, 1], where the logarithm is finite.
    gaps = (1 - torch.rand(count)).log_().mul_(factor).floor_()
    return gaps.to(torch.int64).add_(1).cumsum_(0).add_(last)
