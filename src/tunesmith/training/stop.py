"""Ctrl-C and SIGTERM: finish the step at hand if that takes no time, then stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# What a step that a signal meets may still take. Most of them are finished then; one that is not is done again when the
# run is resumed, so that stopping takes no longer with a large batch than with a small one.
PATIENCE_SECONDS = 2.0
# Who ends a process may tell it twice, by its id and by its group, as ``timeout`` does. That is no impatience.
ONE_SIGNAL_SECONDS = 1.0
# Between two SIGTERMs the second of which interrupts again: what the first began to clean up may end until then, and a
# library that swallowed the first does not make the process deaf.
_CLEANING_SECONDS = 10.0


class StopRequested(Exception):
    """Ends a step or an evaluation that a signal has made pointless. Never leaves the run."""


@dataclass
class StopRequest:
    """Set by a signal, read within and between steps. A second signal interrupts at once."""

    signal_name: str | None = None
    is_heeded: bool = False  # within stop_on_signals
    noted: float | None = None  # when it was first seen, by time.monotonic()

    def note(self, signal_name: str) -> None:
        """Ask for a stop. Raises KeyboardInterrupt where that was asked for before, and not just now."""
        if self.signal_name is None:
            self.signal_name = signal_name
        elif self._seconds() > ONE_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        self._seconds()

    def check(self) -> None:
        """Raise StopRequested if a signal has come."""
        if self.signal_name:
            raise StopRequested

    def check_step(self) -> None:
        """Raise StopRequested if a signal has come and the step at hand was given its time since."""
        if self.signal_name and self._seconds() > PATIENCE_SECONDS:
            raise StopRequested

    def _seconds(self) -> float:
        now = time.monotonic()
        if self.noted is None:
            self.noted = now
        return now - self.noted


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does: it raises KeyboardInterrupt, once within ten seconds.

    A process may be told twice, by its parent and by the end of its input. The second would break off the cleaning up
    that the first has begun.
    """
    told: float | None = None

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        now = time.monotonic()
        if told is None or now - told > _CLEANING_SECONDS:
            told = now
            raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: somebody else decides about signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM set the request instead of ending the process.

    Args:
        request: one that others may set too; None: a new one.
    """
    request = request or StopRequest()
    request.is_heeded = True

    def note(number: int, _frame: FrameType | None) -> None:
        request.note(signal.Signals(number).name)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: somebody else decides about signals
        try:
            yield request
        finally:
            request.is_heeded = False
        return
    try:
        yield request
    finally:
        request.is_heeded = False
        for number, handler in previous.items():
            signal.signal(number, handler)
