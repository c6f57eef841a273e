"""How the rows of a step become micro-batches: packed where the model proves to compute it, else padded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tunesmith.data.batching import pad_rows, split_by_tokens
from tunesmith.data.packing import pack_rows, split_packed
from tunesmith.data.rows import TokenizedRows
from tunesmith.models.loss import Batch, token_losses
from tunesmith.models.packed_attention import NAME, register
from tunesmith.models.probe import TOLERANCE, probe_rows

MicroBatches = Callable[[TokenizedRows, Sequence[int]], Iterator[Batch]]


def packed_batches(token_budget: int, device: torch.device, most_rows: int | None = None) -> MicroBatches:
    """Flat micro-batches without padding, of at most ``token_budget`` computed tokens."""

    def batches(rows: TokenizedRows, chosen: Sequence[int]) -> Iterator[Batch]:
        for group in split_packed(rows, chosen, token_budget, most_rows):
            batch = pack_rows([rows.row(i) for i in group], device)
            yield replace(batch, members=tuple(map(int, group)))

    return batches


def padded_batches(
    token_budget: int, pad_token_id: int, device: torch.device, most_rows: int | None = None
) -> MicroBatches:
    """Padded micro-batches of at most ``token_budget`` tokens, padding included."""

    def batches(rows: TokenizedRows, chosen: Sequence[int]) -> Iterator[Batch]:
        for group in split_by_tokens(chosen, rows.lengths, token_budget, most_rows):
            batch = pad_rows([rows.row(i) for i in group], pad_token_id, device)
            yield replace(batch, members=tuple(map(int, group)))

    return batches


def micro_batches(
    packs: bool, token_budget: int, pad_token_id: int, device: torch.device, most_rows: int | None = None
) -> MicroBatches:
    """Packed or padded micro-batches, as ``prepare_packing`` found the model to compute."""
    if packs:
        return packed_batches(token_budget, device, most_rows)
    return padded_batches(token_budget, pad_token_id, device, most_rows)


def prepare_packing(model: Any, rows: TokenizedRows, pad_token_id: int) -> tuple[bool, str]:
    """Whether this model computes packed rows, and why, for people. If so, it is left ready to.

    Packing is used only where it gives the losses of padded rows on rows of this data set: an architecture that
    mixes tokens in another way than attention, or scores them in another way, trains by the padded path.
    """
    before = model.config._attn_implementation
    if before != "sdpa":
        return False, f"padded rows: this model's attention is {before}"
    device = next(model.parameters()).device
    probe = probe_rows(rows)
    register()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            padded = [pad_rows([row], pad_token_id, device) for row in probe]
            wanted = torch.cat([token_losses(model, batch) for batch in padded])
            model.set_attn_implementation(NAME)
            found = token_losses(model, pack_rows(probe, device))
        difference = float((wanted - found).abs().max())
        if difference <= TOLERANCE:
            return True, "packed rows: no padding, shared prefixes computed once"
        reason = f"packing would change losses by up to {difference:.1e}"
    except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = f"this model cannot pack ({' '.join(str(error).split())[:80]})"
    finally:
        model.train(was_training)
    model.set_attn_implementation(before)
    return False, f"padded rows: {reason}"
