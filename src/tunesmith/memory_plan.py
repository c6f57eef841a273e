"""How large micro-batches may be, from the memory of this machine: decided before the first step, not by dying.

What is loaded already is measured; what training adds is counted: gradients, AdamW's two moments, and every buffer of
the kernels (``models/kernels/footprint.py``), or what answering held-out rows takes where that is more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.order import step_rows
from tunesmith.data.packing import Layout, shared_prefix, split_packed
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import RunError
from tunesmith.free_memory import available_bytes, give_back_memory, resident_bytes
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.footprint import BatchShape, largest_buffers, training_bytes
from tunesmith.planning.nearest import NOTHING, Beside, nearest
from tunesmith.training.loop import peak_memory_bytes

# Computed tokens in a micro-batch. Matrix products are efficient from some hundred on; above the first, more tokens
# cost memory and gain nothing that could be measured.
TOKEN_BUDGETS = (1408, 1024, 768, 512, 384, 256, 128)
_STEPS = 100  # looked at for the largest micro-batch
_SLACK = 1.03  # what the allocator and the libraries' own workspaces take beside the counted bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Micro-batches that fit, and what they take.

    Attributes:
        token_budget: most computed tokens of a micro-batch in training.
        evaluation_budget: the same where only losses are taken; no more than training ever has, as buffers stay.
        peak_bytes: predicted highest resident memory of the process.
        buffers: elements of each.
    """

    token_budget: int
    evaluation_budget: int
    peak_bytes: int
    buffers: Mapping[str, int]


def plan_memory(
    decoder: Decoder, rows: TokenizedRows, rows_per_step: int, seed: int, trained_bytes: int,
    token_budgets: Sequence[int] = TOKEN_BUDGETS, beside: Beside = NOTHING, sharers: int = 1,
) -> MemoryPlan:  # fmt: skip
    """The largest token budget whose run fits.

    Args:
        decoder: the loaded model, its adapter attached.
        rows, rows_per_step, seed: they decide what stands in a micro-batch.
        trained_bytes: bytes of the trained tensors.
        token_budgets: those to choose from, the largest first.
        beside: what must fit too.
        sharers: processes like this one that are to fit into what is free.

    Raises:
        RunError: even one row at a time does not fit.
    """
    give_back_memory()  # what loading the model has freed would be counted as taken, and as not free
    resident, available = resident_bytes(), available_bytes()
    free = None if available is None else available // sharers
    added = 0
    for budget in token_budgets:
        shapes = shapes_beside(rows, rows_per_step, seed, budget, beside)
        added = added_bytes(decoder, shapes, trained_bytes, beside.answering)
        if free is None or added <= free:
            peak = max(peak_memory_bytes(), resident + added)
            most = max(shape.tokens for shape in shapes)
            return MemoryPlan(budget, most, peak, largest_buffers(decoder, shapes))
    assert free is not None

    def needs(other: Decoder, data: TokenizedRows, trained: int, others: Beside) -> int:
        shapes = shapes_beside(data, rows_per_step, seed, token_budgets[-1], others)
        return added_bytes(other, shapes, trained, others.answering)

    raise RunError(
        "this machine",
        f"training needs about {added / 1e9:.1f} GB more memory and {free / 1e9:.1f} GB are free",
        nearest(needs, decoder, rows, trained_bytes, free, beside),
    )


def added_bytes(
    decoder: Decoder, shapes: Sequence[BatchShape], trained_bytes: int, answering_bytes: int = 0
) -> int:
    """What training adds to a loaded model whose micro-batches have these shapes, arguments as of ``plan_memory``.

    Of the decoder only sizes are read, so its tensors need no memory.
    """
    # A gradient and two moments for each trained tensor.
    added = 3 * trained_bytes + max(training_bytes(decoder, shapes), answering_bytes)
    return int(added * _SLACK)


def shapes_beside(
    rows: TokenizedRows, rows_per_step: int, seed: int, token_budget: int, beside: Beside
) -> list[BatchShape]:
    """Micro-batches among which the largest of each buffer are, those of ``beside`` too; see ``plan_memory``."""
    chosen = step_rows(len(rows), rows_per_step, seed, 1)[:_STEPS]
    shapes = [_shape(rows, group) for step in chosen for group in split_packed(rows, step, token_budget)]
    if beside.padded:
        # All of it answer: the most that a row of this length can take.
        shapes.append(BatchShape(Layout(0, (beside.padded,)), beside.padded))
    shapes = _largest(shapes)
    if beside.evaluated:
        # Held-out rows stand in micro-batches as large as those of training, or alone in a larger one.
        count = max(1, max(shape.tokens for shape in shapes) // beside.evaluated)
        predicted = count * min(beside.predicted, beside.evaluated)
        shapes.append(BatchShape(Layout(0, (beside.evaluated,) * count), predicted, is_trained=False))
    return shapes


def _shape(rows: TokenizedRows, group: Sequence[int]) -> BatchShape:
    examples = [rows.row(i) for i in group]
    prefix = shared_prefix(examples)
    ends = [int(example.trained.nonzero()[0][-1]) for example in examples]
    trained = sum(int(example.trained.sum()) for example in examples)
    return BatchShape(Layout(prefix, tuple(end - prefix for end in ends)), trained)


def _largest(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """A few shapes among which the largest of each buffer are: by tokens, by targets, by the longest row."""
    keys = (
        lambda shape: shape.tokens,
        lambda shape: shape.trained,
        lambda shape: max(shape.layout.suffixes),
        lambda shape: len(shape.layout.suffixes) * (shape.layout.prefix + max(shape.layout.suffixes)),
    )
    return [max(shapes, key=key) for key in keys]
