"""How often and after how long a request is made again."""

import random

import pytest

from tunesmith.storage.retries import ATTEMPTS, longest_wait, retried


class Failing:
    """Fails ``times`` times with ``error``, then gives 7."""

    def __init__(self, times, error=None):
        self.times, self.error, self.calls = times, error or ConnectionError("broken"), 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return 7


@pytest.mark.parametrize("times", range(5))
def test_passing_faults_are_outlasted(times, waits):
    call = Failing(times)
    assert retried(call) == 7
    assert (call.calls, len(waits)) == (times + 1, times)


def test_the_number_of_attempts_is_bounded(waits):
    call = Failing(99)
    with pytest.raises(ConnectionError, match="broken"):
        retried(call)
    assert call.calls == ATTEMPTS == 5
    assert len(waits) == 4


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("x"), ImportError("x"), ValueError("x")]
)
def test_lasting_faults_are_not_tried_again(error, waits):
    call = Failing(1, error)
    with pytest.raises(type(error)):
        retried(call)
    assert (call.calls, waits) == (1, [])


def test_waits_double_up_to_a_bound_and_are_random(waits):
    assert [longest_wait(n) for n in range(1, 8)] == [0.5, 1, 2, 4, 8, 8, 8]
    random.seed(3)
    for _ in range(200):
        with pytest.raises(ConnectionError):
            retried(Failing(99))
    for attempt in range(4):
        some = waits[attempt::4]
        assert 0 <= min(some) < 0.05 * longest_wait(attempt + 1)
        assert 0.95 * longest_wait(attempt + 1) < max(some) <= longest_wait(attempt + 1)
