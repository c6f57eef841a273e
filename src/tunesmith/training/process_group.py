"""Workers that reach each other through ``torch.distributed``: gloo on CPUs, NCCL on GPUs."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tunesmith.training.workers import on_first, write

T = TypeVar("T")

# Elements of one all-reduce: large enough that latency does not count, small enough to be no matter of memory.
_BUCKET = 2**24


class WorkerLostError(Exception):
    """Another worker cannot be reached: this process cannot go on, a new set of workers can."""


class ProcessGroup:
    """The workers of the default process group, which must have been set up. See ``Workers``.

    Args:
        here: how many of the workers share this machine.
    """

    in_step = False

    def __init__(self, here: int) -> None:
        self.rank, self.world, self.here = dist.get_rank(), dist.get_world_size(), here
        # NCCL moves tensors of GPUs only; with offload gloo is there beside it ("cpu:gloo,cuda:nccl").
        self.device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """One flat sum for each run of parameters of one type, in their order, so in equal pieces on all workers.

        Each piece ends with a mark for each parameter: how many workers had a gradient. Where none had, as for an
        expert that no token chose, it stays None, and AdamW leaves the tensor alone as it does in one process.
        """
        for piece in _pieces(parameters):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in piece]
            marks = torch.tensor([p.grad is not None for p in piece], dtype=grads[0].dtype)
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), marks.to(grads[0].device)])
            with peers():
                dist.all_reduce(flat)
            found = flat[-len(piece) :].tolist()
            sums = flat.split([*(grad.numel() for grad in grads), len(piece)])
            for parameter, grad, total, count in zip(piece, grads, sums, found, strict=False):
                parameter.grad = grad.copy_(total.view_as(grad)) if count else None

    def sum_numbers(self, *numbers: float) -> tuple[float, ...]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with peers():
            dist.all_reduce(tensor)
        return tuple(tensor.tolist())

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor in tensors:
                sent = tensor.detach().to(self.device).contiguous()
                with peers():
                    dist.broadcast(sent, 0)
                if sent.data_ptr() != tensor.data_ptr():
                    tensor.copy_(sent)

    def shard(self, model: Any) -> None:
        pass

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return tensors

    def put(
        self, tensors: Mapping[str, torch.Tensor], read: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        on_first(self, lambda: write(tensors, read()))
        self.share(list(tensors.values()))

    def gather(self, item: T) -> list[T]:
        found: list[Any] = [None] * self.world
        with peers():
            dist.all_gather_object(found, item)
        return found

    def barrier(self) -> None:
        self.sum_numbers(0.0)

    def agree(self, flag: bool) -> bool:
        return self.sum_numbers(float(flag))[0] > 0


@contextmanager
def process_group(rank: int, world: int, address: str) -> Iterator[ProcessGroup]:
    """A gloo group of processes of this machine, for the block.

    Args:
        address: ``file:///…`` or ``tcp://host:port``, the same for all.
    """
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    try:
        yield ProcessGroup(here=world)
    finally:
        dist.destroy_process_group()


def workers_here() -> int:
    """How many workers of the group that a launcher has set up share this machine; told by the environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


@contextmanager
def peers() -> Iterator[None]:
    """Within the block what a lost worker looks like is raised as ``WorkerLostError``."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError and what gloo raises are kinds of it
        raise WorkerLostError(str(error)) from error


def tells_of_loss(error: BaseException) -> bool:
    """Whether ``error`` is what a lost worker looks like where ``peers`` does not stand: inside a pass of FSDP2."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _pieces(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in their order, cut where type or device changes and where a piece would grow too large."""
    for _, alike in groupby(parameters, key=lambda p: (p.dtype, p.device)):
        piece: list[torch.nn.Parameter] = []
        filled = 0
        for parameter in alike:
            if piece and filled + parameter.numel() > _BUCKET:
                yield piece
                piece, filled = [], 0
            piece.append(parameter)
            filled += parameter.numel()
        yield piece
