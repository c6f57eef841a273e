"""Which GPUs a training fits on, and how many of them it needs at least."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.planning.cost import Cost, gpu_cost
from tunesmith.planning.formulae import SHARDINGS, Footprint, Sharding, gpu_footprint
from tunesmith.planning.hardware import GIB, Gpu, Hardware
from tunesmith.planning.shapes import Adapter, ModelShape
from tunesmith.planning.workload import Workload

COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class MicroBatch:
    """What a GPU computes at once: ``tokens``, ``targets`` of them predicted."""

    tokens: int
    targets: int
    checkpointing: bool


@dataclass(frozen=True)
class Cluster:
    """So many GPUs of a kind; ``usable``: bytes of each, ``host``: of main memory for each."""

    gpu: str
    devices: int
    sharding: Sharding
    footprint: Footprint
    usable: int
    host: int
    cost: Cost

    @property
    def fits(self) -> bool:
        """Whether the training does, on the devices and in main memory."""
        return self.footprint.total <= self.usable and self.footprint.host <= self.host

    @property
    def name(self) -> str:
        """``4 x A100-80 with ZeRO-3``."""
        what = f"{self.devices} x {self.gpu}"
        return what if not self.sharding.stage else f"{what} with {self.sharding.name}"


def micro_batch(workload: Workload, token_budget: int, checkpointing: bool) -> MicroBatch:
    """As the trainer cuts it: rows up to the budget, or one longer row."""
    longest = workload.longest
    tokens = min(max(token_budget, longest), workload.rows_per_step * longest)
    targets = max(workload.most_targets, -(-tokens * workload.targets // workload.tokens))
    return MicroBatch(tokens, min(tokens, targets), checkpointing)


def smallest(
    name: str, gpu: Gpu, hardware: Hardware, shape: ModelShape, adapter: Adapter | None, workload: Workload,
    batch: MicroBatch, sharding: Sharding, counts: Sequence[int] = COUNTS,
) -> Cluster | None:  # fmt: skip
    """The fewest GPUs, a power of two, that hold the training sharded in one way; None: 64 do not."""
    for devices in counts if sharding.stage else counts[:1]:
        found = of_size(name, gpu, hardware, shape, adapter, workload, batch, sharding, devices)
        if found.fits:
            return found
    return None


def of_size(
    name: str, gpu: Gpu, hardware: Hardware, shape: ModelShape, adapter: Adapter | None, workload: Workload,
    batch: MicroBatch, sharding: Sharding, devices: int,
) -> Cluster:  # fmt: skip
    """So many GPUs, whether the training fits or not."""
    footprint = gpu_footprint(
        shape, adapter, batch.tokens, batch.targets, batch.checkpointing, sharding, devices
    )
    cost = gpu_cost(gpu, shape, adapter, workload, batch.tokens, batch.checkpointing, sharding, devices)
    host = int(gpu.host_memory_gib * GIB)
    return Cluster(name, devices, sharding, footprint, hardware.usable(gpu), host, cost)


def clusters(
    hardware: Hardware, shape: ModelShape, adapter: Adapter | None, workload: Workload, batch: MicroBatch
) -> Mapping[str, Mapping[Sharding, Cluster | None]]:
    """For each GPU of the data file and each way to shard, the smallest cluster."""
    return {
        name: {
            sharding: smallest(name, gpu, hardware, shape, adapter, workload, batch, sharding)
            for sharding in SHARDINGS
        }
        for name, gpu in gpus(hardware)
    }


def best(found: Mapping[Sharding, Cluster | None]) -> Cluster | None:
    """The one to take on a kind of GPU: without offloading if it can be, the fewest, sharded the least."""
    there = [cluster for cluster in found.values() if cluster is not None]
    offloads = ("none", "optimizer", "all")
    return min(
        there,
        key=lambda c: (offloads.index(c.sharding.offload), c.devices, c.sharding.stage),
        default=None,
    )


def gpus(hardware: Hardware) -> Iterator[tuple[str, Gpu]]:
    """The GPUs of a data file, by name."""
    for name, device in hardware.devices.items():
        if isinstance(device, Gpu):
            yield name, device
