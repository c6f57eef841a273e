"""One sink in front of many."""

from collections.abc import Sequence
from types import TracebackType

from tunesmith.tracking.events import Event, Sink
from tunesmith.tracking.trouble import Trouble


class Fanout:
    """Passes every event to all sinks, in order; a context manager that closes them all.

    Sinks handle their own trouble. Should one raise all the same, that is a fault of ours: it is
    logged once for that sink, and the other sinks and the training go on.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = [(sink, Trouble(type(sink).__name__)) for sink in sinks]
        self._closed = False

    def emit(self, event: Event) -> None:
        for sink, trouble in self._sinks:
            with trouble.caught():
                sink.emit(event)

    def close(self) -> None:
        """Close every sink once. A Ctrl-C meanwhile is passed on after all are closed."""
        if self._closed:
            return
        self._closed = True
        stop: BaseException | None = None
        for sink, trouble in self._sinks:
            try:
                with trouble.caught():
                    sink.close()
            except BaseException as error:
                stop = error
        if stop is not None:
            raise stop

    def __enter__(self) -> "Fanout":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
