import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import OutputError, UserError
from tunesmith.tracking.events import CheckpointEvent, Notice, Progress
from tunesmith.tracking.jsonl import JsonlSink, event_object, plain, read_events


def strict(line: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is not strict JSON")

    return json.loads(line, parse_constant=refuse)


def test_each_event_is_one_line_with_its_kind_first(tmp_path, events):
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonlSink(path)
    for event in events:
        sink.emit(event)
    sink.close()
    lines = [strict(line) for line in path.read_text().splitlines()]
    assert all(next(iter(line)) == "event" for line in lines)
    kinds = [line["event"] for line in lines]
    assert kinds[:3] == ["run_started", "notice", "step"]  # no progress
    assert kinds[-4:] == ["eval", "checkpoint", "epoch", "run_finished"]
    assert kinds.count("step") == 20
    assert lines[2]["train_loss_batch"] == 1.95
    assert lines[-1]["record"]["before"]["interval"] == [0.04, 0.22]
    assert read_events(path) == lines


def test_a_line_can_be_read_before_the_file_is_closed(tmp_path, make):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.emit(make.step(1))
    assert [event["step"] for event in read_events(tmp_path / "m.jsonl")] == [1]
    sink.close()


def test_numbers_that_are_not_finite_are_strings_in_the_file_and_floats_when_read(tmp_path, make):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.emit(make.step(1, math.nan, grad_norm=math.inf))
    sink.emit(make.eval(1, -math.inf, perplexity=0.0, metrics={"f1": math.nan}))
    sink.close()
    first, second = (strict(line) for line in path.read_text().splitlines())
    assert (first["train_loss_batch"], first["grad_norm"]) == ("NaN", "Infinity")
    assert (second["eval_loss"], second["metrics"]) == ("-Infinity", {"f1": "NaN"})
    step, evaluation = read_events(path)
    assert math.isnan(step["train_loss_batch"])
    assert step["grad_norm"] == math.inf
    assert evaluation["eval_loss"] == -math.inf
    assert math.isnan(evaluation["metrics"]["f1"])


def test_the_word_nan_in_a_message_stays_text(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.emit(Notice("NaN"))
    sink.close()
    assert read_events(tmp_path / "m.jsonl") == [{"event": "notice", "message": "NaN"}]


@given(cut=st.integers(1, 60))
def test_a_torn_last_line_is_left_out_and_cut_off_on_resume(cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        for message in ("one", "two " + "x" * 40):
            sink = JsonlSink(path)
            sink.emit(Notice(message))
            sink.close()
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        left = [event["message"] for event in read_events(path)]
        # Without its newline only, the second line is still complete.
        assert left == (["one", "two " + "x" * 40] if cut == 1 else ["one"])
        sink = JsonlSink(path)
        sink.emit(Notice("three"))
        sink.close()
        assert [event["message"] for event in read_events(path)] == ["one", "three"]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"event": "notice", "message": "a"}\n{"event": "no\n{"event": "notice", "message": "b"}\n'
    )
    with pytest.raises(UserError, match=r"m\.jsonl line 2: is not an event"):
        read_events(path)
    path.write_text('[1]\n{"event": "notice", "message": "b"}\n')
    with pytest.raises(UserError, match="line 1"):
        read_events(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        read_events(tmp_path / "nowhere.jsonl")


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="output_dir"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl")


def test_a_full_disk_warns_once_and_does_not_stop_the_run(caplog):
    if not Path("/dev/full").exists():
        pytest.skip("needs the device /dev/full")
    sink = JsonlSink(Path("/dev/full"))
    sink.emit(Notice("a"))
    sink.emit(Notice("b"))
    sink.close()
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_what_a_disk_full_for_a_while_did_not_take_comes_later_and_whole(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.emit(Notice("one"))

    class NearlyFull:
        """Takes 5 bytes of a line, as a file on a full disk."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:5])

        def __getattr__(self, name):
            return getattr(self.file, name)

    whole, sink._file = sink._file, NearlyFull(sink._file)
    sink.emit(Notice("two"))
    assert [event["message"] for event in read_events(path)] == ["one"]
    assert path.read_bytes().endswith(b"\n")
    sink.emit(Notice("three"))
    sink._file = whole
    sink.emit(Notice("four"))
    sink.close()
    assert [event["message"] for event in read_events(path)] == ["one", "two", "three", "four"]
    assert len(caplog.records) == 1


def test_after_close_nothing_is_written(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.close()
    sink.emit(Notice("late"))
    sink.close()
    assert path.read_bytes() == b""


@given(text=st.text(st.characters(), max_size=30))
def test_any_text_is_one_line_and_comes_back(text):
    line = json.dumps(event_object(Notice(text)))
    assert "\n" not in line
    assert line.isascii()
    assert json.loads(line)["message"] == text


def test_plain_turns_what_json_lacks_into_what_it_has():
    assert plain({1: (True, None, {"a"}), "p": Path("x") / "y"}) == {
        "1": [True, None, ["a"]],
        "p": str(Path("x") / "y"),
    }
    assert plain(CheckpointEvent(3, "p", False, 0.5)) == {
        "step": 3,
        "path": "p",
        "is_best": False,
        "seconds": 0.5,
    }


def test_progress_has_no_line():
    assert event_object(Progress("scoring", 1, 2)) is None
