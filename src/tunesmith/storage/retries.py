"""The same request again, a bounded number of times, each time after a longer wait of random length.

The waits are "full jitter" (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): many clients
that a busy store has turned away do not come back at the same moment.
"""

import random
from collections.abc import Callable
from time import sleep
from typing import TypeVar

from tunesmith.storage.faults import is_passing

ATTEMPTS = 5  # the waits between them are 7.5 s at most, half of it on average
_FIRST_SECONDS = 0.5
_MOST_SECONDS = 8.0

_T = TypeVar("_T")


def retried(call: Callable[[], _T], attempts: int = ATTEMPTS) -> _T:
    """What ``call`` returns; called up to ``attempts`` times while its faults are passing ones.

    Raises:
        Exception: what the last call raised, or the first fault that does not pass.
    """
    for attempt in range(1, attempts):
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            sleep(random.uniform(0, longest_wait(attempt)))
    return call()


def longest_wait(attempt: int) -> float:
    """Seconds after the ``attempt``-th failure, from 1."""
    return float(min(_MOST_SECONDS, _FIRST_SECONDS * 2 ** (attempt - 1)))
