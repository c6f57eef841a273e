"""Threads for work that would hold up the event loop, so many for each kind: a flood of one holds up no other.

asyncio's own threads are few (six on two cores) and for all: as many schemas that take seconds to compile, or loads
that an administrator waits for, would keep every other request from being looked at.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Literal, ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

# plain: requests with a prompt that is at hand; chat: those for a template, which may take seconds; form: those with a
# schema or grammar to compile; load: loads that are waited for; look: what is on disk and in memory; text: long JSON.
Kind = Literal["plain", "chat", "form", "load", "look", "text"]
_MOST: dict[Kind, int] = {"plain": 4, "chat": 4, "form": 2, "load": 4, "look": 2, "text": 2}


class Threads:
    """The threads of one server; each begins when it is first needed."""

    def __init__(self) -> None:
        self._pools = {kind: ThreadPoolExecutor(most, f"serve-{kind}") for kind, most in _MOST.items()}

    async def run(
        self, kind: Kind, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs
    ) -> Result:
        """What ``work`` gives or raises, done in a thread of its kind; as ``asyncio.to_thread`` otherwise."""
        context = copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pools[kind], lambda: context.run(work, *args, **kwargs))
