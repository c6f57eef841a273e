"""What every engine with a desk and a thread does alike: all that callers use but loading and facts."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic

from tunesmith.serving.desk import A, Desk, Request
from tunesmith.serving.seam import AdapterKey, Deliver, EngineError, EngineLimits, Sampling, Ticket

_LOG = logging.getLogger(__name__)


class DeskEngine(ABC, Generic[A]):
    """``Engine`` of seam.py as far as its desk and its one thread are all that it takes."""

    def __init__(self, desk: Desk[A], name: str) -> None:
        """Start the thread; so whatever ``_work`` reads has to be there before."""
        self._desk = desk
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Sequence[int], adapter: AdapterKey | None, sampling: Sampling, deliver: Deliver
    ) -> Ticket:
        """See ``Engine``."""
        return self._desk.submit(prompt, adapter, sampling, deliver)

    def cancel(self, ticket: Ticket) -> None:
        """See ``Engine``."""
        self._desk.cancel(ticket)

    def unload(self, key: AdapterKey) -> None:
        """See ``Engine``."""
        self._desk.unload(key)

    @property
    def limits(self) -> EngineLimits:
        """See ``Engine``."""
        return self._desk.limits

    def close(self) -> None:
        """See ``Engine``."""
        self._desk.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @abstractmethod
    def _work(self) -> None:
        """What the thread does until the desk is closed; ends every request then."""

    @contextmanager
    def _guarded(self, requests: Sequence[Request[A]]) -> Iterator[None]:
        """A pass that fails ends its own requests, not the engine."""
        try:
            yield
        except Exception as error:
            _LOG.exception("a forward pass failed")
            for request in requests:
                if not request.is_over:
                    self._desk.end(request, EngineError(f"the forward pass failed ({type(error).__name__})"))
