"""What workers tell each other at the end of their share of a step: its loss, the time it took, the memory in use."""

from dataclasses import dataclass

from tunesmith.training.workers import Workers


@dataclass(frozen=True)
class Shares:
    """The shares of one step.

    Attributes:
        total: sum of the losses of all of them.
        seconds: of each worker, by rank, computed before it waited for the others; 0 where it had no rows. Empty in
            one process.
        peak_memory: bytes, of the worker that has used most so far.
    """

    total: float
    seconds: tuple[float, ...]
    peak_memory: int

    @property
    def slowest(self) -> int | None:
        """Rank of the worker that took longest; None in one process."""
        return max(range(len(self.seconds)), key=self.seconds.__getitem__, default=None)

    @property
    def longest(self) -> float | None:
        return max(self.seconds, default=None)

    @property
    def mean(self) -> float | None:
        return sum(self.seconds) / len(self.seconds) if self.seconds else None


def tell_share(workers: Workers, total: float, seconds: float, peak_memory: int) -> Shares:
    """Put the shares of all workers together, by the one sum that the loss needs anyway.

    Each puts its own numbers into places of its own, where the others add zero, which changes no bit of them.
    """
    if workers.world == 1:
        return Shares(total, (), peak_memory)
    times, peaks = [0.0] * workers.world, [0.0] * workers.world
    times[workers.rank], peaks[workers.rank] = seconds, float(peak_memory)
    total, *told = workers.sum_numbers(total, *times, *peaks)
    return Shares(total, tuple(told[: workers.world]), int(max(told[workers.world :])))
