"""From an engine's thread to the event loop: what one step makes for many requests, by one wake-up."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref


class Handover:
    """Calls made in the loop's thread, in the order in which any threads asked for them.

    Waking a loop costs a system call and a turn of it; sixteen tokens that are made together need one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._is_awake = False

    def call(self, function: Callable[[Any], object], argument: Any) -> None:
        """Soon ``function(argument)`` in the loop's thread; never, if the loop is closed by then."""
        self._calls.append((function, argument))
        if not self._is_awake:
            self._is_awake = True
            try:
                self._loop.call_soon_threadsafe(self._run)
            except RuntimeError:  # closed: nobody waits any more
                self._calls.clear()

    def _run(self) -> None:
        # First: who appends from here on wakes the loop again, though this may take what it brings.
        self._is_awake = False
        while self._calls:
            function, argument = self._calls.popleft()
            function(argument)


# Weak on both sides: what is left of a loop that was stopped goes with those who wait in it.
_HANDOVERS: "WeakKeyDictionary[asyncio.AbstractEventLoop, ref[Handover]]" = WeakKeyDictionary()


def handover() -> Handover:
    """To the running loop; one for all who hold it at a time."""
    loop = asyncio.get_running_loop()
    known = _HANDOVERS.get(loop)
    found = known() if known else None
    if found is None:
        found = Handover(loop)
        _HANDOVERS[loop] = ref(found)
    return found
