"""Events to the console: a live display on a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable

from rich.console import Console

from tunesmith.tracking.console_live import LiveView
from tunesmith.tracking.console_plain import PlainView
from tunesmith.tracking.events import Event, Sink
from tunesmith.tracking.trouble import Trouble


class ConsoleSink:
    """Shows a run on ``console``.

    Args:
        console: where to print; ``console.is_terminal`` decides how.
        now: seconds on a clock that never goes back, for the time left.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        live = console.is_terminal and not console.is_dumb_terminal
        self._view: Sink = LiveView(console, now) if live else PlainView(console, now)
        self._trouble = Trouble("console")

    def emit(self, event: Event) -> None:
        with self._trouble.caught():
            self._view.emit(event)

    def close(self) -> None:
        """Leave the terminal as it was found, cursor shown; safe to call twice and after an error."""
        with self._trouble.caught():
            self._view.close()
