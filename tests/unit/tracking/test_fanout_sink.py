import pytest

from tunesmith.tracking.events import Notice
from tunesmith.tracking.fanout import Fanout


class Recorder:
    def __init__(self, log, name, *, fails=None):
        self.log, self.name, self.fails = log, name, fails

    def emit(self, event):
        self.log.append((self.name, event.message))
        if self.fails:
            raise self.fails

    def close(self):
        self.log.append((self.name, "closed"))
        if self.fails:
            raise self.fails


def test_events_reach_all_sinks_in_order_and_all_are_closed_once():
    log = []
    with Fanout([Recorder(log, "a"), Recorder(log, "b")]) as fanout:
        fanout.emit(Notice("1"))
        fanout.emit(Notice("2"))
        fanout.close()
    assert log == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2"), ("a", "closed"), ("b", "closed")]


def test_a_sink_that_fails_stops_neither_the_others_nor_the_run_and_warns_once(caplog):
    log = []
    with Fanout([Recorder(log, "bad", fails=OSError("disk gone")), Recorder(log, "good")]) as fanout:
        fanout.emit(Notice("1"))
        fanout.emit(Notice("2"))
    assert [entry for entry in log if entry[0] == "good"] == [
        ("good", "1"),
        ("good", "2"),
        ("good", "closed"),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "Recorder: OSError: disk gone; training goes on, values may be missing there"
    ]


def test_an_error_of_the_run_closes_all_and_passes():
    log = []
    with pytest.raises(ZeroDivisionError), Fanout([Recorder(log, "a"), Recorder(log, "b")]):
        raise ZeroDivisionError
    assert log == [("a", "closed"), ("b", "closed")]


def test_ctrl_c_while_closing_passes_after_all_are_closed():
    log = []
    fanout = Fanout([Recorder(log, "slow", fails=KeyboardInterrupt()), Recorder(log, "b")])
    with pytest.raises(KeyboardInterrupt):
        fanout.close()
    assert log == [("slow", "closed"), ("b", "closed")]
