"""The optimizer."""

from collections.abc import Sequence

import torch


def adamw(
    parameters: Sequence[torch.nn.Parameter],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). The loop sets the learning rate of each step."""
    # Fused: one pass over memory in place of a dozen, with the same arithmetic.
    return torch.optim.AdamW(
        list(parameters), lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
    )
