"""Memory of this program's own trainer on a CPU, by the same count that a run makes at its start (``memory_plan``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.evaluation.generation_memory import generation_bytes, sizes_of
from tunesmith.memory_plan import TOKEN_BUDGETS, added_bytes, shapes_beside
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.footprint import largest_buffers
from tunesmith.models.kernels.reading import read_decoder
from tunesmith.models.method import trainable_parameters
from tunesmith.planning.shapes import without_memory
from tunesmith.planning.workload import Workload

_SINGLE = 4


@dataclass(frozen=True)
class CpuFootprint:
    """Bytes of a training in float32, by what they are for.

    Attributes:
        other: the program itself, its libraries and what allocators waste.
        token_budget: computed tokens in a micro-batch, the largest budget that fits, or the smallest of all.
        fits: whether ``total`` is no more than there is.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    other: int
    token_budget: int
    fits: bool

    @property
    def total(self) -> int:
        """Highest resident memory of the process."""
        return sum((self.weights, self.gradients, self.optimizer, self.activations, self.head, self.other))


@dataclass(frozen=True)
class OwnTrainer:
    """A model as the kernels read it, without memory, and what is trained of it.

    ``weight_bytes``: of the model with its adapter; ``answering_bytes``: what answering held-out rows takes.
    """

    decoder: Decoder
    weight_bytes: int
    trained_bytes: int
    answering_bytes: int


def own_trainer(model: Any, workload: Workload, checkpointing: bool) -> OwnTrainer:
    """The trainer of a model on the meta device, whose tensors this replaces.

    Raises:
        UnreadableError: the kernels do not compute this model; through autograd its memory is not counted.
    """
    model = without_memory(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    decoder = read_decoder(model)  # first: of what it does not know, no sizes are looked up
    answering = 0
    if workload.asked:
        sizes = sizes_of(model)
        answering = max(generation_bytes(sizes, asked.prompts, asked.new_tokens) for asked in workload.asked)
    return OwnTrainer(
        decoder,
        _SINGLE * sum(p.numel() for p in model.parameters()),
        _SINGLE * sum(p.numel() for p in trainable_parameters(model)),
        answering,
    )


def cpu_footprint(
    trainer: OwnTrainer, workload: Workload, seed: int, program_bytes: int, memory_bytes: int | None,
    budgets: Sequence[int] = TOKEN_BUDGETS,
) -> CpuFootprint:  # fmt: skip
    """The largest micro-batches that fit, or the smallest there are, and their memory.

    Args:
        program_bytes: what the process takes before weights are loaded.
        memory_bytes: that the process may take; None: the system does not tell.
    """
    found = None
    for budget in budgets:
        found = _footprint(trainer, workload, seed, program_bytes, budget)
        if memory_bytes is None or found.total <= memory_bytes:
            break
    assert found is not None
    fits = memory_bytes is None or found.total <= memory_bytes
    return CpuFootprint(**{**found.__dict__, "fits": fits})


def _footprint(
    trainer: OwnTrainer, workload: Workload, seed: int, program_bytes: int, budget: int
) -> CpuFootprint:
    shapes = shapes_beside(workload.examples, workload.rows_of_step, seed, budget, workload.beside)
    added = added_bytes(trainer.decoder, shapes, trainer.trained_bytes, trainer.answering_bytes)
    buffers = largest_buffers(trainer.decoder, shapes)
    head = _SINGLE * _head(buffers)
    states = 3 * trainer.trained_bytes
    activations = max(_SINGLE * sum(buffers.values()), trainer.answering_bytes) - head
    return CpuFootprint(
        weights=trainer.weight_bytes,
        gradients=trainer.trained_bytes,
        optimizer=2 * trainer.trained_bytes,
        activations=activations,
        head=head,
        other=program_bytes + added - states - activations - head,
        token_budget=budget,
        fits=False,
    )


def _head(buffers: Mapping[str, int]) -> int:
    return buffers.get("logits", 0)
