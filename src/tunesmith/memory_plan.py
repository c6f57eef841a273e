"""How large micro-batches may be, from the memory of this machine: decided before the first step, not by dying.

What is loaded already is measured; what training adds is counted: gradients, AdamW's two moments, and every buffer of
the kernels (``models/kernels/footprint.py``), or what answering held-out rows takes where that is more.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.order import step_rows
from tunesmith.data.packing import Layout, shared_prefix, split_packed
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import RunError
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.footprint import BatchShape, largest_buffers, training_bytes
from tunesmith.training.loop import peak_memory_bytes

# Computed tokens in a micro-batch. Matrix products are efficient from some hundred on; above the first, more tokens
# cost memory and gain nothing that could be measured.
TOKEN_BUDGETS = (1408, 1024, 768, 512, 384, 256, 128)
_STEPS = 100  # looked at for the largest micro-batch
_SLACK = 1.03  # what the allocator and the libraries' own workspaces take beside the counted bytes


@dataclass(frozen=True)
class MemoryPlan:
    """``peak_bytes``: predicted highest resident memory of the process in training; ``buffers``: elements of each."""

    token_budget: int
    peak_bytes: int
    buffers: Mapping[str, int]


def plan_memory(
    decoder: Decoder, rows: TokenizedRows, rows_per_step: int, seed: int, trained_bytes: int,
    token_budgets: Sequence[int] = TOKEN_BUDGETS, longest: int | None = None, answering_bytes: int = 0,
) -> MemoryPlan:  # fmt: skip
    """The largest token budget whose run fits.

    Args:
        decoder: the loaded model, its adapter attached.
        rows, rows_per_step, seed: they decide what stands in a micro-batch.
        trained_bytes: bytes of the trained tensors.
        longest: tokens of a row that must fit too, whether there is one or not.
        token_budgets: those to choose from, the largest first.
        answering_bytes: what answering held-out rows takes, while the buffers of training are given back.

    Raises:
        RunError: even one row at a time does not fit.
    """
    resident, free = resident_bytes(), available_bytes()
    chosen = step_rows(len(rows), rows_per_step, seed, 1)[:_STEPS]
    added = 0
    for budget in token_budgets:
        shapes = [_shape(rows, group) for step in chosen for group in split_packed(rows, step, budget)]
        if longest is not None:
            shapes.append(BatchShape(Layout(0, (longest,)), longest))
        shapes = _largest(shapes)
        # A gradient and two moments for each trained tensor.
        added = int((3 * trained_bytes + max(training_bytes(decoder, shapes), answering_bytes)) * _SLACK)
        if free is None or added <= free:
            peak = max(peak_memory_bytes(), resident + added)
            return MemoryPlan(budget, peak, largest_buffers(decoder, shapes))
    raise RunError(
        "this machine",
        f"training needs about {added / 1e9:.1f} GB more memory and {(free or 0) / 1e9:.1f} GB are free",
        "set gradient_checkpointing: true, lower context_length, train with lora_config, or take a smaller model",
    )


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


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except OSError:
        return 0


def available_bytes(system: Path = Path("/")) -> int | None:
    """Memory that can be had without swapping, a container's limit included; None where the system does not tell."""
    found = []
    with suppress(OSError):
        known = _numbers(system / "proc/meminfo")
        found.append(known["MemAvailable"] * 1024)
    with suppress(OSError):
        group = system / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            # Cached files count as used, and make way when memory is asked for.
            found.append(max(0, int(limit) - used + _numbers(group / "memory.stat")["file"]))
    return min(found, default=None)


def _numbers(file: Path) -> dict[str, int]:
    """The ``name: number`` lines of a file of the kernel."""
    lines = [line.replace(":", " ").split() for line in file.read_text(encoding="ascii").splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
