import math
import sys

import pytest

from tunesmith.errors import ConfigError, OutputError
from tunesmith.tracking.scalars import scalars
from tunesmith.tracking.tensorboard_sink import TensorBoardSink


def read_back(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def test_every_scalar_is_read_back_at_its_step(tmp_path, events):
    sink = TensorBoardSink(directory=tmp_path / "tensorboard")
    for event in events:
        sink.emit(event)
    sink.close()
    stored = read_back(tmp_path / "tensorboard")
    expected = [point for event in events for point in scalars(event)]
    assert set(stored.Tags()["scalars"]) == {point.name for point in expected}
    got = {
        (name, entry.step): entry.value for name in stored.Tags()["scalars"] for entry in stored.Scalars(name)
    }
    assert len(got) == len(expected)
    for point in expected:
        assert got[point.name, point.step] == pytest.approx(point.value, rel=1e-6)  # stored in float32
    text = stored.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert '"learning_rate": 0.0001' in text
    assert '"r": 8' in text


def test_numbers_that_are_not_finite_are_stored(tmp_path, make):
    sink = TensorBoardSink(directory=tmp_path)
    sink.emit(make.step(1, math.nan, grad_norm=math.inf))
    sink.close()
    stored = read_back(tmp_path)
    assert math.isnan(stored.Scalars("train_loss_batch")[0].value)
    assert stored.Scalars("grad_norm")[0].value == math.inf


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path, make):
    for first, loss in ((1, 2.0), (3, 1.0)):
        sink = TensorBoardSink(directory=tmp_path)
        for step in range(first, 6 if first == 1 else 5):
            sink.emit(make.step(step, loss))
        sink.close()
    points = [(entry.step, entry.value) for entry in read_back(tmp_path).Scalars("train_loss_batch")]
    assert points == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)]


def test_trouble_in_the_middle_of_a_run_warns_once(tmp_path, make, caplog):
    sink = TensorBoardSink(directory=tmp_path)
    sink._writer.close()
    sink.emit(make.step(1))
    sink.emit(make.step(2))
    sink.close()
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("TensorBoard: ")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[tensorboard\]'"):
        TensorBoardSink(directory=tmp_path)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        TensorBoardSink(directory=tmp_path / "file" / "tb")
