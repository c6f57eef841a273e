"""Attention over packed rows with a shared prefix, registered with transformers under the name ``tunesmith``.

Model files stay as they are: they look their attention function up by name and pass extra arguments on. A
forward call with ``packing=Layout(...)`` is attended to row by row; any other call as by ``sdpa``.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tunesmith.data.packing import Layout

NAME = "tunesmith"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Layout | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), each row for itself.

    A row's tokens see the shared prefix and, causally, the row's own tokens; the prefix sees itself. That is
    what the row would see alone.

    Args:
        query: shape (1, heads, tokens, head size); key and value with the heads of grouped-query attention.
        attention_mask: not read when ``packing`` is given.
        sliding_window: a token sees this many last tokens of its row, itself included.
        others: what a model's attention asks for beyond this; any that is set is refused.

    Returns:
        Shape (1, tokens, heads, head size), and no attention weights.

    Raises:
        TypeError: an argument that would change the result, such as soft-capping of scores.
    """
    if packing is None:
        others["sliding_window"] = sliding_window
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output, None
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise TypeError(f"packed attention has no {name}")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    sizes = [packing.prefix, *packing.suffixes]
    queries, keys, values = (t.split(sizes, dim=2) for t in (query, key, value))
    outputs = []
    if packing.prefix:
        mask = _mask(0, packing.prefix, sliding_window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(queries[0], keys[0], values[0], attn_mask=mask, **options)
        )
    for row, length in enumerate(packing.suffixes, 1):
        if length:
            seen_keys = torch.cat([keys[0], keys[row]], dim=2)
            seen_values = torch.cat([values[0], values[row]], dim=2)
            mask = _mask(packing.prefix, length, sliding_window, query.device)
            outputs.append(
                F.scaled_dot_product_attention(
                    queries[row], seen_keys, seen_values, attn_mask=mask, **options
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=1024)
def _mask(prefix: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool, shape (length, prefix + length): True where the query may see the key."""
    query = torch.arange(prefix, prefix + length, device=device)[:, None]
    distance = query - torch.arange(prefix + length, device=device)[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def register() -> None:
    """Make the name known to transformers; once or more often is the same."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
