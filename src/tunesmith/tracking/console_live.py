"""The run as a live display on a terminal: two bars and the latest numbers, notices above them."""

from collections.abc import Callable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tunesmith.tracking import events
from tunesmith.tracking.events import (
    CheckpointEvent,
    EvalEvent,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    StepEvent,
)
from tunesmith.tracking.formats import clock, duration, visible
from tunesmith.tracking.pace import Pace, eval_text

_PER_SECOND = 4


class LiveView:
    """Draws on ``console``, which must be a terminal. ``close`` gives it back with its cursor."""

    def __init__(self, console: Console, now: Callable[[], float]) -> None:
        self._console = console
        self._pace = Pace(now)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="cyan"),
            console=console,
            expand=True,
        )
        self._steps: TaskID | None = None
        self._part: TaskID | None = None
        self._live: Live | None = None

    def emit(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case Notice():
                self._above(Text.assemble(("note: ", "yellow"), visible(event.message)))
            case StepEvent():
                self._step(event)
            case events.Progress():
                self._progress(event)
            case EvalEvent():
                self._drop_part()
                best = self._pace.evaluated(event)
                self._above(Text(eval_text(event, best), "green" if best else ""))
            case CheckpointEvent():
                saved = f"saved {visible(event.path)} ({duration(event.seconds)})"
                self._above(Text(saved, "dim"))
            case RunFinished():
                self.close()
                took = clock(event.record.wall_seconds)
                self._above(Text(f"run {event.record.status} after {event.record.steps} steps in {took}"))
            case _:
                pass

    def close(self) -> None:
        """Stop drawing; the last state stays on the screen."""
        self._drop_part()
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _start(self, event: RunStarted) -> None:
        self._pace.started(event)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in event.header.items():
            grid.add_row(Text(visible(label)), Text(visible(value)))
        title = Text(visible(event.tag), "bold cyan")
        self._console.print(Panel(grid, title=title, title_align="left", box=box.ROUNDED))
        self._steps = self._bars.add_task("training", total=event.total_steps, note=self._pace.eta())
        self._draw()

    def _step(self, event: StepEvent) -> None:
        self._drop_part()
        self._pace.stepped(event)
        if self._steps is not None:
            self._bars.update(self._steps, completed=event.step)
        self._draw()

    def _progress(self, event: events.Progress) -> None:
        label = visible(event.label)
        if self._part is None:
            self._part = self._bars.add_task(label, total=event.total, note="")
        self._bars.update(self._part, description=label, completed=event.done, total=event.total)
        self._draw()
        if event.done >= event.total:
            self._drop_part()

    def _drop_part(self) -> None:
        if self._part is not None:
            part, self._part = self._part, None
            self._bars.remove_task(part)

    def _above(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(
                get_renderable=self._display, console=self._console, refresh_per_second=_PER_SECOND
            )
            self._live.start()

    def _display(self) -> RenderableType:
        """The next frame; called by the drawing thread too, so the time left counts down."""
        if self._steps is not None:
            step = self._pace.step
            epoch = f"epoch {step.epoch}/{self._pace.epochs}  " if step is not None else ""
            self._bars.update(self._steps, note=epoch + self._pace.eta())
        line = Text(overflow="fold")
        for label, value in self._pace.numbers():
            line.append(f"{label} ", "dim").append(value, "bold").append("  ")
        return Group(line, self._bars) if line else self._bars
