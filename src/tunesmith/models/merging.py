"""Adapter + base -> one Hugging Face folder, proven on real rows before it is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import CheckpointError
from tunesmith.models.lora import merge

TOLERANCE = 1e-4
# Up to here both sides are computed in float64, from float32 weights: what is compared is then the merged weights,
# not the rounding of two long sums. Beyond it that would take too much memory.
_WIDE_PARAMETERS = 2_000_000_000


def merge_verified(model: Any, prompts: Sequence[Sequence[int]], place: str) -> tuple[Any, float]:
    """Fold the adapter into the base's weights and compare logits before and after.

    Args:
        model: a PEFT model in float32; used up by the merge.
        prompts: token ids of real rows to compare on.
        place: the adapter's name, for the error.

    Returns:
        The merged model, and the largest absolute difference of any logit.

    Raises:
        CheckpointError: the difference exceeds 1e-4.
    """
    wide = sum(parameter.numel() for parameter in model.parameters()) <= _WIDE_PARAMETERS
    if wide:
        model.double()
    before = [_logits(model, prompt) for prompt in prompts]
    merged = merge(model).float()  # as it will be saved
    if wide:
        merged.double()
    difference = max(
        float((_logits(merged, prompt) - old).abs().max())
        for prompt, old in zip(prompts, before, strict=True)
    )
    if not difference <= TOLERANCE:  # a NaN must not pass
        raise CheckpointError(
            place,
            f"merged and unmerged logits differ by up to {difference:.2e}, more than {TOLERANCE:g}",
            "nothing was written; serve the adapter unmerged",
        )
    return merged.float(), difference


def save_merged(merged: Any, tokenizer: Any, generation_config: Any, folder: Path) -> None:
    """Write the merged model with tokenizer, chat template and generation settings."""
    if generation_config is not None:
        merged.generation_config = generation_config
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _logits(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(prompt)], device=device), use_cache=False).logits
    return logits
