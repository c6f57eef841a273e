"""Where a comparison stands: which training, how many steps of it, and how long it all still takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tunesmith.tracking.formats import duration


@dataclass
class Pace:
    """Seconds a step of each arm, start and evaluation included, from the trainings that are done."""

    seconds: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def add(self, arm: str, seconds: float, steps: int) -> None:
        """Count a training."""
        self.seconds[arm] = self.seconds.get(arm, 0.0) + seconds
        self.steps[arm] = self.steps.get(arm, 0) + steps

    def left(self, steps: dict[str, float]) -> float | None:
        """Seconds for the steps that are left of each arm; an arm not yet seen is taken to be like the others."""
        if not sum(self.steps.values()):
            return None
        mean = sum(self.seconds.values()) / sum(self.steps.values())
        return sum(
            count * (self.seconds[arm] / self.steps[arm] if self.steps.get(arm) else mean)
            for arm, count in steps.items()
        )


class Watch:
    """Shows progress; on no terminal, one line a training."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", total=None, left="")

    def begin(self, what: str, steps: int | None, seconds_left: float | None) -> None:
        """A training or measurement begins."""
        left = f"about {duration(seconds_left)} to go" if seconds_left is not None else ""
        self._progress.reset(self._task, description=what, total=steps, left=left)
        if not self._console.is_terminal:
            self._console.print(f"{what}{f'; {left}' if left else ''}", markup=False, soft_wrap=True)

    def step(self, done: int) -> None:
        """``done`` steps of it are done."""
        self._progress.update(self._task, completed=done)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """A display within the block."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        yield Watch(console, progress)
