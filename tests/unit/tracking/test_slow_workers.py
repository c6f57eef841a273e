"""When a worker is called slow, and that it is called so once."""

import pytest

from tunesmith.tracking.events import Event, Notice
from tunesmith.tracking.slow_workers import SlowWorkers


class Kept:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def emit(self, event: Event) -> None:
        assert isinstance(event, Notice)
        self.messages.append(event.message)

    def close(self) -> None:
        raise AssertionError("not its to close")


@pytest.fixture
def told(make):
    """What is told of steps with these times of the workers."""

    def emit(*steps: tuple[float, ...]) -> list[str]:
        kept = Kept()
        sink = SlowWorkers([kept])
        for number, times in enumerate(steps, start=1):
            sink.emit(make.step(number, worker_times=times))
        sink.close()
        return kept.messages

    return emit


def test_a_slow_worker_is_named_once_after_twenty_steps(told):
    assert told(*[(1.0, 1.6, 1.0, 0.9)] * 19) == []
    wanted = (
        "worker 1 is slow, and all wait for it: its share of a step takes 1.6 s, that of the others 1 s "
        "(medians of the last 20 steps)"
    )
    assert told(*[(1.0, 1.6, 1.0, 0.9)] * 20) == [wanted]
    assert told(*[(1.0, 1.6, 1.0, 0.9)] * 200) == [wanted]


@pytest.mark.parametrize(
    ("times", "slow"),
    [
        ((1.0, 1.0), []),
        ((1.0, 1.5), []),  # not more than one and a half times
        ((1.0, 1.51), [1]),  # of two workers the other one is the measure
        ((1.51, 1.0), [0]),
        ((1.0, 1.0, 3.0, 3.0), [2, 3]),
        ((1.0, 1.0, 1.0, 3.0, 3.0), [3, 4]),
        ((0.001, 0.01, 0.001), [1]),
        ((1.0, 0.0), []),  # a worker without rows
        ((1.0,), []),
        ((), []),
    ],
)
def test_what_is_slow(told, times, slow):
    assert [int(message.split()[1]) for message in told(*[times] * 25)] == slow


def test_one_hiccup_is_none_and_one_that_lasts_is_seen_within_the_window(told):
    even, late = (1.0, 1.0, 1.0), (1.0, 1.0, 60.0)
    assert told(*[even] * 20, late, *[even] * 30) == []
    assert told(*[even] * 20, *[late] * 9) == []
    assert len(told(*[even] * 20, *[late] * 11)) == 1


def test_another_slow_worker_is_named_too(told):
    messages = told(*[(2.0, 1.0, 1.0)] * 20, *[(1.0, 1.0, 2.0)] * 20)
    assert [message.split()[1] for message in messages] == ["0", "2"]


def test_steps_in_which_a_worker_had_nothing_to_do_are_left_out(told):
    # As at the end of each epoch: the last step may have too few rows for all.
    epoch = [(1.0, 2.0)] * 4 + [(1.0, 0.0)]
    assert told(*epoch * 4) == []  # sixteen steps that count
    assert len(told(*epoch * 5)) == 1
