"""The processes that train one model together: who they are, and the few things they tell each other.

One process alone is the ordinary case and uses nothing of ``torch.distributed``. Several take different micro-batches
of the same steps and add their gradients. They hold the same weights, and every one of them steps alike; or each holds
a share of every tensor (``sharded_group``), and steps that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from tunesmith.errors import TunesmithError

T = TypeVar("T")


class Workers(Protocol):
    """This process's place among those that train together.

    Except for ``rank``, ``world`` and ``here`` every member is to be called by all workers, in the same order.

    Attributes:
        rank: from 0; the worker of rank 0 is the first, the one that writes.
        world: how many there are.
        here: how many of them share this machine, this one included.
        in_step: whether all must pass through the model as often as each other, at the same time: its tensors are
            gathered for each pass.
    """

    rank: int
    world: int
    here: int
    in_step: bool

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Put the sum over all workers into each ``.grad``; None stays where no worker has one."""

    def sum_numbers(self, *numbers: float) -> tuple[float, ...]:
        """The sums over all workers, in float64."""

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the first worker's values into ``tensors``, which are whole."""

    def shard(self, model: Any) -> None:
        """Leave each worker its share of every tensor of ``model``, where this kind of group does that."""

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """``tensors``, each in one piece, on the first worker; what others get is of no use."""

    def put(
        self, tensors: Mapping[str, torch.Tensor], read: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        """Write what ``read`` gives on the first worker, whole tensors by the same names, into everyone's.

        Raises:
            TunesmithError: the first worker's, on all of them; nothing has been written.
        """

    def gather(self, item: T) -> list[T]:
        """Everyone's item, in the order of ranks."""

    def barrier(self) -> None:
        """Wait until all have come here."""

    def agree(self, flag: bool) -> bool:
        """Whether any worker says so."""


class Alone:
    """One process: nobody to ask."""

    rank, world, here, in_step = 0, 1, 1, False

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        pass

    def sum_numbers(self, *numbers: float) -> tuple[float, ...]:
        return numbers

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def shard(self, model: Any) -> None:
        pass

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return tensors

    def put(
        self, tensors: Mapping[str, torch.Tensor], read: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        write(tensors, read())

    def gather(self, item: T) -> list[T]:
        return [item]

    def barrier(self) -> None:
        pass

    def agree(self, flag: bool) -> bool:
        return flag


ALONE = Alone()


def on_first(workers: Workers, action: Callable[[], T]) -> T:
    """What ``action`` gives on the first worker, told to all; an error of ours there is raised on all.

    The result must be small: it is copied to every worker.
    """
    result: T | None = None
    error: TunesmithError | None = None
    if workers.rank == 0:
        try:
            result = action()
        except TunesmithError as found:
            if workers.world == 1:
                raise
            error = found
    result, error = workers.gather((result, error))[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # T may itself allow None


def write(into: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copy ``values`` into the tensors of the same names, in their own layout."""
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(values[name])


def first_then_others(workers: Workers, action: Callable[[], T]) -> T:
    """``action`` on the first worker, then on the others, which find what it left in a cache.

    Raises:
        TunesmithError: the first worker's, on all of them.
    """
    done: list[T] = []
    on_first(workers, lambda: done.append(action()))
    return done[0] if done else action()
