"""What signals ask for, and how often they must be told."""

import signal

import pytest

from tunesmith.training import stop
from tunesmith.training.stop import StopRequest, StopRequested, stop_on_signals, terminate_as_interrupt


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one item is the time that ``stop`` sees."""
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    return now


def test_a_step_gets_a_little_time_after_a_signal_and_no_more(clock: list[float]):
    request = StopRequest()
    request.check_step()
    request.note("SIGTERM")
    request.check_step()
    with pytest.raises(StopRequested):
        request.check()
    clock[0] += stop.PATIENCE_SECONDS + 0.1
    with pytest.raises(StopRequested):
        request.check_step()


def test_a_request_set_from_elsewhere_counts_from_when_it_is_seen(clock: list[float]):
    request = StopRequest(signal_name="SIGTERM")
    request.check_step()
    clock[0] += stop.PATIENCE_SECONDS + 0.1
    with pytest.raises(StopRequested):
        request.check_step()


def test_a_process_told_twice_at_once_saves_all_the_same(clock: list[float]):
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGINT)  # as of `timeout -s INT`: the process, then its group
        signal.raise_signal(signal.SIGINT)
        assert request.signal_name == "SIGINT"
        clock[0] += stop.ONE_SIGNAL_SECONDS + 0.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_a_library_has_swallowed_can_be_sent_again(clock: list[float]):
    with terminate_as_interrupt():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # in the midst of cleaning up
        clock[0] += 60
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
