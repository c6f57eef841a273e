"""Nothing in the exam may hang: each test has its time, after which it fails."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

_SECONDS = 50


def _fail(_signal: int, _frame: Any) -> None:
    raise TimeoutError(f"took more than {_SECONDS} seconds")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """An alarm also ends a wait inside the system, as for the writer of a pipe."""
    before = signal.signal(signal.SIGALRM, _fail)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
