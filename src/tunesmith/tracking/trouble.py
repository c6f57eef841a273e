"""How a sink's own trouble is handled: said once, never passed on to training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger("tunesmith.tracking")


class Trouble:
    """Catches what goes wrong in one sink and warns the first time.

    A lost metric is not worth a lost run, so every sink does its work inside ``caught()``.

    Args:
        service: the sink's name for people, for example ``"W&B"``.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.warned = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Swallow any ``Exception``; ``KeyboardInterrupt`` and ``SystemExit`` pass."""
        try:
            yield
        except Exception as error:
            self.warn(f"{type(error).__name__}: {error}", error)

    def warn(self, what: str, error: Exception | None = None) -> None:
        """Log ``what`` as a warning, the first time only; the traceback goes to the debug level."""
        if self.warned:
            return
        self.warned = True
        _log.warning("%s: %s; training goes on, values may be missing there", self.service, what)
        if error is not None:
            _log.debug("%s: where it happened", self.service, exc_info=error)
