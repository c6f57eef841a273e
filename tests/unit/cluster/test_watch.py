"""Signals while a run on several workers is watched: what the driver does, whatever the desk's pace."""

import io
import signal
from collections.abc import Iterator

import pytest
from rich.console import Console

from tunesmith.cluster.desk import News
from tunesmith.cluster.driver import _watch
from tunesmith.cluster.resources import Request


class Line:
    """Answers in turn, the last for ever; Ctrl-C comes before the answer numbered ``signal_at``."""

    def __init__(self, answers: list[News | None], signal_at: int) -> None:
        self._answers, self._signal_at = iter(answers), signal_at
        self._number, self._last = 0, None
        self.asked: list[str] = []

    def news(self) -> News | None:
        if self._number == self._signal_at:
            signal.raise_signal(signal.SIGINT)
        self._number += 1
        self._last = next(self._answers, self._last)
        return self._last

    def ask_to_stop(self, signal_name: str) -> None:
        self.asked.append(signal_name)

    def is_full(self) -> bool:
        return False


class Fit:
    """Alive until its turns are over."""

    def __init__(self, turns: int) -> None:
        self._turns = iter(range(turns))

    def is_alive(self) -> bool:
        return next(self._turns, None) is not None

    def join(self, _seconds: float) -> None:
        pass


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def watch(line: Line, turns: int = 4) -> News:
    return _watch(line, Request(2, {"CPU": 1.0}, {}), Fit(turns), Console(file=io.StringIO()))  # type: ignore[arg-type]


def test_ctrl_c_reaches_a_run_whose_desk_is_busy_at_that_moment():
    """On a busy machine the answer took longer than a second: the run was cut off, its last steps unsaved."""
    at_work, done = News(begun=True, heeds=True), News(begun=True)
    line = Line([at_work, None, at_work, at_work, done], signal_at=1)
    assert watch(line) is done
    assert line.asked == ["SIGINT"]


@pytest.mark.parametrize("before", [None, News(begun=True, heeds=False)])
def test_ctrl_c_ends_what_does_not_heed_it(before):
    """Before the run begins there is nothing to save."""
    line = Line([before, before], signal_at=1)
    with pytest.raises(KeyboardInterrupt):
        watch(line)
    assert line.asked == []
