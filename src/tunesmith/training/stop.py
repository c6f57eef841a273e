"""Ctrl-C and SIGTERM: finish the step at hand, then stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class StopRequested(Exception):
    """Ends an evaluation that a signal has made pointless. Never leaves the run."""


@dataclass
class StopRequest:
    """Set by a signal, read between steps. A second signal interrupts at once."""

    signal_name: str | None = None
    is_heeded: bool = False  # within stop_on_signals

    def check(self) -> None:
        """Raise StopRequested if a signal has come."""
        if self.signal_name:
            raise StopRequested


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does: it raises KeyboardInterrupt, once.

    A process may be told twice, by its parent and by the end of its input. The second would break off the cleaning up
    that the first has begun.
    """
    told = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
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
        if request.signal_name:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

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
