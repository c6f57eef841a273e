"""Machines without a GPU, this one among them: does a training fit, and how long would it take?"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.assembly import TRAIN_TOKEN_BUDGET
from tunesmith.free_memory import available_bytes, resident_bytes
from tunesmith.models.kernels.reading import UnreadableError
from tunesmith.planning.clusters import micro_batch
from tunesmith.planning.cost import cpu_seconds, workload_flops
from tunesmith.planning.formulae import single_footprint
from tunesmith.planning.hardware import CpuBox, Hardware
from tunesmith.planning.own_trainer import CpuFootprint, OwnTrainer, cpu_footprint, own_trainer
from tunesmith.planning.shapes import Adapter, ModelShape
from tunesmith.planning.workload import Workload

THIS = "this machine"
_TERA = 1e12
# Of the matrices that are multiplied to see how fast a machine is: a product takes so little time that, among many,
# some are not disturbed by other processes.
_SIDE = 512
_SECONDS = 0.3


@dataclass(frozen=True)
class Machine:
    """A machine that trains on its processor; ``memory_bytes`` that one process may take, None: not known."""

    name: str
    memory_bytes: int | None
    peak_tflops: float
    efficiency: float
    price_per_hour: float | None


@dataclass(frozen=True)
class OnMachine:
    """A training on such a machine.

    Attributes:
        basis: how memory was worked out; ``time_basis``: how time was. For people.
        seconds: of training, without evaluation.
    """

    machine: Machine
    footprint: CpuFootprint
    basis: str
    seconds: float
    time_basis: str

    @property
    def money(self) -> float | None:
        """None where no price is known."""
        price = self.machine.price_per_hour
        return self.seconds / 3600 * price if price is not None else None


@dataclass(frozen=True)
class Trained:
    """One method on one model: ``trainer`` is None where the kernels do not compute it, for ``reason``."""

    shape: ModelShape
    adapter: Adapter | None
    trainer: OwnTrainer | None
    reason: str
    checkpointing: bool


def trained(
    model: Any, shape: ModelShape, adapter: Adapter | None, workload: Workload, checkpointing: bool, why_not: str
) -> Trained:  # fmt: skip
    """What of a model on the meta device, whose tensors this replaces, decides its memory on a CPU."""
    if why_not:
        return Trained(shape, adapter, None, why_not, checkpointing)
    try:
        return Trained(shape, adapter, own_trainer(model, workload, checkpointing), "", checkpointing)
    except UnreadableError as error:
        return Trained(shape, adapter, None, str(error), checkpointing)


def machines(hardware: Hardware, price_per_hour: float | None) -> Iterator[Machine]:
    """This machine, then the CPU boxes of a data file."""
    free = available_bytes()
    memory = None if free is None else free + resident_bytes()
    yield Machine(THIS, memory, matrix_tflops(), hardware.this_machine_efficiency, price_per_hour)
    for name, box in hardware.devices.items():
        if isinstance(box, CpuBox):
            yield Machine(
                name, hardware.usable(box), box.peak_tflops, box.efficiency, box.price_per_hour
            )  # fmt: skip


def on_machine(
    machine: Machine, method: Trained, workload: Workload, seed: int, program_bytes: int
) -> OnMachine:
    """Memory and time of a training there."""
    shape, adapter = method.shape, method.adapter
    if method.trainer is not None:
        footprint = cpu_footprint(method.trainer, workload, seed, program_bytes, machine.memory_bytes)
        basis = "memory model of this program"
    else:
        batch = micro_batch(workload, TRAIN_TOKEN_BUDGET, method.checkpointing)
        found = single_footprint(shape, adapter, batch.tokens, batch.targets, batch.checkpointing)
        footprint = CpuFootprint(
            found.weights, found.gradients, found.optimizer, found.activations, found.head, program_bytes,
            TRAIN_TOKEN_BUDGET, False,
        )  # fmt: skip
        fits = machine.memory_bytes is None or footprint.total <= machine.memory_bytes
        footprint, basis = replace(footprint, fits=fits), f"formula, not measured: {method.reason}"
    # One process does what all devices that the configuration asks for would do.
    flops = workload_flops(shape, adapter, workload, method.checkpointing, workload.num_devices)
    seconds = cpu_seconds(flops, machine.peak_tflops, machine.efficiency)
    measured = "measured in products of matrices" if machine.name == THIS else "assumed"
    time_basis = f"{machine.efficiency:.0%} (assumed) of {machine.peak_tflops * 1000:,.0f} GFLOP/s {measured}"
    return OnMachine(machine, footprint, basis, seconds, time_basis)


def matrix_tflops() -> float:
    """How fast this machine multiplies float32 matrices now; takes a third of a second."""
    a = torch.ones(_SIDE, _SIDE)
    out = torch.empty_like(a)
    best, until = 0.0, time.perf_counter() + _SECONDS
    while (begun := time.perf_counter()) < until:
        torch.mm(a, a, out=out)
        best = max(best, 2 * _SIDE**3 / (time.perf_counter() - begun))
    return best / _TERA
