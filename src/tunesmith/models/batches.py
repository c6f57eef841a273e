"""How the rows of a step become micro-batches: packed where the model proves to compute it, else padded."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.data.batching import pad_rows, split_by_tokens
from tunesmith.data.packing import pack_rows, split_packed
from tunesmith.data.rows import TokenizedRows
from tunesmith.models.device import computing_device
from tunesmith.models.loss import Batch, token_losses
from tunesmith.models.packed_attention import NAME, register
from tunesmith.models.probe import TOLERANCE, probe_rows

MicroBatches = Callable[[TokenizedRows, Sequence[int]], Iterator[Batch]]
_EVEN_TURNS = 8  # of more micro-batches a worker, one more or less is no matter


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a step are this process's: those numbered ``rank``, ``rank + world`` and so on.

    ``in_step``: a process that runs out before the others passes through the model all the same, see ``_shortest``.
    """

    rank: int = 0
    world: int = 1
    in_step: bool = False

    def of(self, split: Callable[[int], list[list[int]]], rows: int, token_budget: int) -> list[list[int]]:
        """This process's groups of ``split(token budget)``, which cuts ``rows`` rows alike on every worker.

        All wait for the worker with the most to do. Where an ordinary cut leaves some of them a group short, it is made
        finer, so that each has as many, and at least one where there are as many rows as workers. An empty group is a
        turn that only others have something for.
        """
        groups = split(token_budget)
        turns = -(-len(groups) // self.world)
        if len(groups) % self.world and turns <= _EVEN_TURNS:
            wanted = min(rows, turns * self.world)
            # The largest budget that gives so many: the smaller it is, the more groups.
            finer = bisect_left(
                range(token_budget), True, key=lambda cut: len(split(token_budget - cut)) >= wanted
            )
            finer_groups = split(max(1, token_budget - finer))
            # Rows of one length may jump past the number wanted: twice as many halves are no gain.
            if len(finer_groups) <= wanted or len(groups) < min(rows, self.world):
                groups = finer_groups
        mine = groups[self.rank :: self.world]
        idle = -(-len(groups) // self.world) - len(mine) if self.in_step else 0
        return mine + [[]] * idle


ALL = Share()


def packed_batches(
    token_budget: int, device: torch.device, most_rows: int | None = None, share: Share = ALL
) -> MicroBatches:
    """Flat micro-batches without padding, of at most ``token_budget`` computed tokens."""

    def batches(rows: TokenizedRows, chosen: Sequence[int]) -> Iterator[Batch]:
        def split(budget: int) -> list[list[int]]:
            return split_packed(rows, chosen, budget, most_rows)

        for group in share.of(split, len(chosen), token_budget):
            if group:
                batch = pack_rows([rows.row(i) for i in group], device)
                yield replace(batch, members=tuple(map(int, group)))
            else:
                batch = pack_rows([rows.row(_shortest(rows, chosen))], device)
                yield replace(
                    batch, sources=batch.sources[:0], targets=batch.targets[:0], rows=0, real_tokens=0
                )

    return batches


def padded_batches(
    token_budget: int,
    pad_token_id: int,
    device: torch.device,
    most_rows: int | None = None,
    share: Share = ALL,
) -> MicroBatches:
    """Padded micro-batches of at most ``token_budget`` tokens, padding included."""

    def batches(rows: TokenizedRows, chosen: Sequence[int]) -> Iterator[Batch]:
        lengths = rows.lengths

        def split(budget: int) -> list[list[int]]:
            return split_by_tokens(chosen, lengths, budget, most_rows)

        for group in share.of(split, len(chosen), token_budget):
            if group:
                batch = pad_rows([rows.row(i) for i in group], pad_token_id, device)
                yield replace(batch, members=tuple(map(int, group)))
            else:
                batch = pad_rows([rows.row(_shortest(rows, chosen))], pad_token_id, device)
                untrained = torch.zeros_like(batch.trained)
                yield replace(batch, trained=untrained, rows=0, real_tokens=0, trained_tokens=0)

    return batches


def micro_batches(
    packs: bool, token_budget: int, pad_token_id: int, device: torch.device,
    most_rows: int | None = None, share: Share = ALL,
) -> MicroBatches:  # fmt: skip
    """Packed or padded micro-batches, as ``prepare_packing`` found the model to compute; those of this process."""
    if packs:
        return packed_batches(token_budget, device, most_rows, share)
    return padded_batches(token_budget, pad_token_id, device, most_rows, share)


def _shortest(rows: TokenizedRows, chosen: Sequence[int]) -> int:
    """What an idle worker passes through the model, with nothing to predict in it: its gradient is exactly 0."""
    return min(chosen, key=lambda row: int(rows.lengths[row]))


def prepare_packing(model: Any, rows: TokenizedRows, pad_token_id: int) -> tuple[bool, str]:
    """Whether this model computes packed rows, and why, for people. If so, it is left ready to.

    Packing is used only where it gives the losses of padded rows on rows of this data set: an architecture that
    mixes tokens in another way than attention, or scores them in another way, trains by the padded path.
    """
    before = model.config._attn_implementation
    if before != "sdpa":
        return False, f"padded rows: this model's attention is {before}"
    device = computing_device(model)
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
