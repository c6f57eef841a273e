"""The run as plain lines, for logs, pipes and CI."""

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from tunesmith.tracking.events import (
    CheckpointEvent,
    EvalEvent,
    Event,
    Notice,
    Progress,
    RunFinished,
    RunStarted,
    StepEvent,
)
from tunesmith.tracking.formats import clock, duration, visible
from tunesmith.tracking.pace import Pace, eval_text

_SECONDS_BETWEEN = 10.0


class PlainView:
    """Prints whole lines without any control character.

    Steps and progress print the first and then at most one line each in ten seconds, the last step
    always; evaluations, checkpoints and notices each print theirs.
    """

    def __init__(self, console: Console, now: Callable[[], float]) -> None:
        self._console = console
        self._now = now
        self._pace = Pace(now)
        self._next: dict[type, float] = {}  # when each kind of event may print again

    def emit(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._pace.started(event)
                for label, value in event.header.items():
                    self._line(f"{label}: {value}")
            case Notice():
                self._line(event.message)
            case StepEvent():
                self._pace.stepped(event)
                if self._due(StepEvent) or event.step == self._pace.total:
                    self._line(self._step_text(event))
            case Progress():
                if self._due(Progress):
                    self._line(f"{event.label} {event.done}/{event.total}")
            case EvalEvent():
                self._line(eval_text(event, self._pace.evaluated(event)))
            case CheckpointEvent():
                best = ", the best so far" if event.is_best else ""
                self._line(f"saved {event.path} ({duration(event.seconds)}{best})")
            case RunFinished():
                took = clock(event.record.wall_seconds)
                self._line(f"run {event.record.status} after {event.record.steps} steps in {took}")
            case _:
                pass

    def close(self) -> None:
        """Every line is complete already."""

    def _due(self, kind: type) -> bool:
        now = self._now()
        if now < self._next.get(kind, now):
            return False
        self._next[kind] = now + _SECONDS_BETWEEN
        return True

    def _step_text(self, event: StepEvent) -> str:
        listed = "  ".join(f"{label} {value}" for label, value in self._pace.numbers())
        where = f"step {event.step}/{self._pace.total}  epoch {event.epoch}/{self._pace.epochs}"
        return f"{where}  {listed}  {self._pace.eta()}"

    def _line(self, text: str) -> None:
        # soft_wrap: a log has no width; a path cut in two could not be copied.
        self._console.print(Text(visible(text)), soft_wrap=True)
