"""Model and micro-batch -> the loss of each trained token; never a mean.

The mean over an optimizer step is taken once, by the global count of trained tokens, so that neither the
split into micro-batches nor unequal counts can weigh a token differently.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.data.batching import MicroBatch
from tunesmith.data.packing import PackedBatch

Batch = MicroBatch | PackedBatch


def token_losses(model: Any, batch: Batch, autocast: torch.dtype | None = None) -> torch.Tensor:
    """-log p of every trained token, shape (trained tokens,), row by row from left to right.

    Token t is predicted from position t - 1. The head runs through the model's own forward, so soft-capping
    and scaling of logits are the model's, and only where some row has a target.

    Args:
        model: a causal LM of transformers, or PEFT around one.
        batch: padded rows for any model; packed rows for a model prepared by ``packed_attention``.
        autocast: lower precision for the matrix products, where hardware is fast at it.
    """
    with torch.autocast(batch.input_ids.device.type, dtype=autocast, enabled=autocast is not None):
        logits, targets = (
            _packed_logits(model, batch) if isinstance(batch, PackedBatch) else _padded_logits(model, batch)
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


def _packed_logits(model: Any, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    ids, positions = batch.input_ids[None], batch.position_ids[None]
    output = model(
        input_ids=ids,
        position_ids=positions,
        # A mask with four dimensions counts as made by the caller: transformers builds none of its own.
        attention_mask=ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
        use_cache=False,
        logits_to_keep=batch.sources,
        packing=batch.layout,
    )
    return output.logits[0], batch.targets


def _padded_logits(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    is_source = torch.zeros_like(batch.trained)
    is_source[:, :-1] = batch.trained[:, 1:]
    columns = is_source.any(dim=0).nonzero().squeeze(1)
    kept = {"logits_to_keep": columns} if _can_keep(model) else {}
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **kept
    ).logits
    if not kept:
        logits = logits[:, columns]
    return logits[is_source[:, columns]], batch.input_ids[batch.trained]


def _can_keep(model: Any) -> bool:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(plain.forward).parameters
