"""FLOPs, seconds and money of a training, by formula.

A matrix product with P weights takes 2 P FLOPs a token forward, 2 P for the gradient of its input and 2 P for that of
its weights, which frozen weights do without (Kaplan et al. 2020, arXiv:2001.08361; LoRA: Hu et al. 2021,
arXiv:2106.09685). Attention takes 2 x queries x length forward where half of it is masked, and twice that backward.
Seconds are the larger of computing and of reading the weights (the roofline of Williams et al. 2009), then what is
moved between devices and to main memory, which is not taken to overlap.

Between N devices each sends (N - 1) / N of what is reduced or gathered (Rajbhandari et al. 2020, arXiv:1910.02054,
section 7). Up to stage 1 gradients are reduced and what was trained is gathered once a step. From stage 2 on a device
keeps no more than its share of the gradients, so that they are reduced after every micro-batch; stage 3 gathers all
weights for each way through the layers instead.
"""

from dataclasses import dataclass

from tunesmith.planning.formulae import Sharding
from tunesmith.planning.hardware import Gpu
from tunesmith.planning.shapes import Adapter, ModelShape
from tunesmith.planning.workload import Workload

_GIGA, _TERA = 1e9, 1e12
_ADAM_BYTES = 28  # float32: weight, gradient and two moments are read, all but the gradient written
_HALF, _SINGLE = 2, 4


@dataclass(frozen=True)
class Cost:
    """``seconds`` of training without evaluation; ``money``: of all devices, in the data file's currency."""

    seconds: float
    steps: int
    money: float


def training_flops(
    shape: ModelShape, adapter: Adapter | None, tokens: float, targets: float, attended: float, checkpointing: bool
) -> float:  # fmt: skip
    """FLOPs of computing ``tokens`` in rows of ``attended`` tokens, ``targets`` of them predicted, and gradients."""
    attention = 2 * shape.layers * shape.queries * attended * tokens
    low = 2 * adapter.matrices * tokens if adapter else 0
    low_head = 2 * adapter.head * targets if adapter else 0
    layers, head = 2 * shape.matrices * tokens, 2 * shape.head * targets
    forward = layers + attention + low
    times = 2 if adapter is None else 1  # of a frozen matrix only the gradient of its input is taken
    backward = times * (layers + head) + 2 * (attention + low + low_head)
    return forward + head + low_head + backward + (forward if checkpointing else 0)


def workload_flops(
    shape: ModelShape, adapter: Adapter | None, workload: Workload, checkpointing: bool, devices: int
) -> float:
    """FLOPs of all epochs on so many devices together; tokens that rows share are computed once."""
    epoch = training_flops(
        shape,
        adapter,
        workload.tokens * workload.computed,
        workload.targets,
        workload.attended,
        checkpointing,
    )
    return workload.plan(devices).epochs * epoch


def gpu_cost(
    gpu: Gpu, shape: ModelShape, adapter: Adapter | None, workload: Workload, tokens: int, checkpointing: bool,
    sharding: Sharding, devices: int,
) -> Cost:  # fmt: skip
    """Time and money on ``devices`` GPUs; ``tokens``: of a micro-batch."""
    plan = workload.plan(devices)
    steps = plan.total_steps
    passes = max(plan.epochs * workload.tokens * workload.computed / devices / tokens, steps)
    flops = workload_flops(shape, adapter, workload, checkpointing, devices) / devices
    weights = _HALF * shape.parameters
    rounds = 3 if checkpointing else 2  # through the layers, forward and backward
    computing = flops / (gpu.peak_tflops * _TERA * gpu.efficiency)
    reading = passes * rounds * weights / (gpu.bandwidth_gb_s * _GIGA)
    trained = adapter.parameters if adapter else shape.parameters
    gradient = trained * (_SINGLE if adapter else _HALF)
    share = devices if sharding.stage else 1
    moved = steps * trained * _ADAM_BYTES / share
    host = 0.0
    if sharding.offloads_optimizer:  # gradients go over the link, and come back as weights
        host = steps * 2 * gradient / share
    if sharding.offloads_weights:
        host += passes * rounds * weights / devices
    # What was trained is as large as its gradients, in either method.
    reduced = (passes if sharding.stage >= 2 else steps) * gradient
    gathered = passes * rounds * weights if sharding.stage == 3 else steps * gradient
    network = (reduced + gathered) * (devices - 1) / devices
    # A processor reads and writes main memory about as fast as the link does: an assumption like the others.
    optimizer_gb_s = gpu.host_link_gb_s if sharding.offloads_optimizer else gpu.bandwidth_gb_s
    seconds = (
        max(computing, reading)
        + moved / (optimizer_gb_s * _GIGA)
        + host / (gpu.host_link_gb_s * _GIGA)
        + network / (gpu.link_gb_s * _GIGA)
    )
    return Cost(seconds, steps, seconds / 3600 * gpu.price_per_hour * devices)


def cpu_seconds(flops: float, peak_tflops: float, efficiency: float) -> float:
    """Time of a machine without a GPU."""
    return flops / (peak_tflops * _TERA * efficiency)
