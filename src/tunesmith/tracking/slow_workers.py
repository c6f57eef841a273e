"""Workers that keep the others waiting, told while the run goes on."""

from collections import deque
from collections.abc import Sequence
from statistics import median

from tunesmith.tracking.events import Event, Notice, Sink, StepEvent
from tunesmith.tracking.fanout import Fanout

WINDOW = 20  # steps
TIMES = 1.5


class SlowWorkers:
    """A sink that tells the other ``sinks`` of a slow worker, once for each.

    Slow is a worker whose median time over the last ``WINDOW`` steps is more than ``TIMES`` the median of the others'.
    Medians, so that one hiccup counts for nothing. Steps in which a worker had no rows are left out.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._others = Fanout(sinks)
        self._steps: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        self._told: set[int] = set()

    def emit(self, event: Event) -> None:
        if not isinstance(event, StepEvent) or len(event.worker_times) < 2 or 0.0 in event.worker_times:
            return
        self._steps.append(event.worker_times)
        if len(self._steps) < WINDOW:
            return
        typical = [median(times) for times in zip(*self._steps, strict=True)]
        for rank, seconds in enumerate(typical):
            others = median(typical[:rank] + typical[rank + 1 :])
            if seconds > TIMES * others and rank not in self._told:
                self._told.add(rank)
                self._others.emit(Notice(_text(rank, seconds, others)))

    def close(self) -> None:
        """The others are closed by whoever opened them."""


def _text(rank: int, seconds: float, others: float) -> str:
    return (
        f"worker {rank} is slow, and all wait for it: its share of a step takes {seconds:.3g} s, that of the others "
        f"{others:.3g} s (medians of the last {WINDOW} steps)"
    )
