"""How long each worker took for its share of a step, told to all."""

import pytest

from tunesmith.training.worker_times import Shares, tell_share
from tunesmith.training.workers import ALONE
from worker_parts import Crew
from worker_time_parts import SLEEP, events_of, told


class Mute:
    """One process that may not talk to anybody."""

    rank, world, here = 0, 1, 1


def test_one_process_tells_nobody_anything():
    alone = tell_share(Mute(), 1.5, 0.25, 1000)
    assert alone == Shares(1.5, (), 1000)
    assert (alone.slowest, alone.longest, alone.mean) == (None, None, None)
    events, calls = events_of(ALONE, None)
    assert "sum_numbers" not in calls
    for event in events:
        assert event.worker_times == ()
        assert (event.slowest_worker, event.slowest_worker_time, event.mean_worker_time) == (None, None, None)


@pytest.mark.parametrize("world", [2, 4])
def test_all_hear_of_all(crew: Crew, world: int):
    for shares in crew(world, told):
        assert shares.total == sum(10.0 + rank for rank in range(world))
        assert shares.seconds == (0.25, 0.5, 0.25, 0.25)[:world]
        assert shares.peak_memory == 2**40
        assert (shares.slowest, shares.longest) == (1, 0.5)
        assert shares.mean == (0.25 * world + 0.25) / world


def test_a_slow_worker_shows_in_every_step_in_which_it_has_something_to_do(crew: Crew):
    (first, calls), (second, _) = crew(2, events_of, 1)
    # 13 rows in steps of 6: three steps, the last of one row, which is the first worker's.
    assert len(first) == len(second) == 3
    # By the sum that the loss needed before: no further call in a step.
    assert calls["sum_numbers"] == 3
    assert calls.keys() <= {"sum_numbers", "sum_gradients"}
    for event, same in zip(first, second, strict=True):
        assert event.worker_times == same.worker_times
        assert event.slowest_worker_time == max(event.worker_times)
        assert event.mean_worker_time == pytest.approx(sum(event.worker_times) / 2)
        # Who is slowest takes its share's time at least; who is faster may have begun the first step later, and waits.
        assert max(event.train_time_per_step, same.train_time_per_step) >= max(event.worker_times)
    for event in first[:2]:
        quick, slow = event.worker_times
        assert slow >= SLEEP
        assert quick > 0
        assert event.slowest_worker == 1
    assert first[2].worker_times[1] == 0.0
    assert first[2].slowest_worker == 0


def test_the_memory_of_a_step_is_that_of_the_worker_with_most(crew: Crew):
    (first, _), (second, _) = crew(2, events_of, None)
    # What each had used when the shares were told is in both; its own may grow before the step is over.
    told_last = min(first[-1].peak_memory, second[-1].peak_memory)
    assert told_last >= max(first[0].peak_memory, second[0].peak_memory) > 2**20
