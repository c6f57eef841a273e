"""MLflow's own local store, asked through its own client."""

import math
import shutil
import sys

import pytest

from tunesmith.errors import ConfigError
from tunesmith.tracking.mlflow_sink import MlflowSink
from tunesmith.tracking.scalars import scalars


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # put back by monkeypatch
    monkeypatch.setenv("WANDB_API_KEY", "secret-0123456789abcdef")
    return tmp_path / "mlruns"


def open_sink(store, **changes) -> MlflowSink:
    values = {
        "tracking_uri": str(store),
        "experiment_name": "tunes",
        "create_experiment_if_not_exists": True,
        "run_name": "lora-1",
    }
    return MlflowSink(**{**values, **changes})


def stored(store, sink):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(store))
    return client, client.get_run(sink.run_id)


def test_every_scalar_param_and_the_end_are_in_the_store(store, events):
    sink = open_sink(store)
    for event in events:
        sink.emit(event)
    sink.close()
    client, run = stored(store, sink)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "lora-1"
    assert client.get_experiment(run.info.experiment_id).name == "tunes"
    assert run.data.params["lora_config.r"] == "8"
    assert run.data.params["learning_rate"] == "0.0001"
    expected = [point for event in events for point in scalars(event)]
    for name in {point.name for point in expected}:
        got = [(entry.step, entry.value) for entry in client.get_metric_history(sink.run_id, name)]
        assert sorted(got) == [(point.step, point.value) for point in expected if point.name == name]
    assert not [p for p in store.rglob("*") if p.is_file() and b"secret-0123456789abcdef" in p.read_bytes()]


def test_a_resumed_run_goes_on_under_its_id(store, make):
    first = open_sink(store)
    first.emit(make.started())
    first.emit(make.step(1, 3.0))
    first.close()  # without a word of how it ended: failed
    second = open_sink(store, resumed_id=first.run_id)
    assert second.run_id == first.run_id
    assert stored(store, second)[1].info.status == "RUNNING"
    second.emit(make.started())
    second.emit(make.step(2, 2.0))
    second.close()
    client, run = stored(store, first)
    losses = client.get_metric_history(first.run_id, "train_loss_batch")
    assert [(entry.step, entry.value) for entry in losses] == [(1, 3.0), (2, 2.0)]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_more_metrics_and_params_than_one_call_takes(store, make):
    config = {f"key{number}": number for number in range(230)} | {"a/b:c": {"x": []}, "empty": {}}
    sink = open_sink(store)
    sink.emit(make.started(config=config))
    for step in range(1, 201):  # 2,400 values, most of them waiting for the thread
        sink.emit(make.step(step, math.nan if step == 3 else 1.0))
    sink.close()
    client, run = stored(store, sink)
    assert len(run.data.params) == 232
    assert run.data.params["a_b:c.x"] == "[]"
    losses = client.get_metric_history(sink.run_id, "train_loss_batch")
    assert len(losses) == 200
    assert [entry.step for entry in losses if math.isnan(entry.value)] == [3]


@pytest.mark.parametrize(
    ("status", "expected"), [("interrupted", "KILLED"), ("failed", "FAILED"), (None, "FAILED")]
)
def test_how_a_run_ended(store, make, status, expected):
    from tunesmith.tracking.events import RunFinished

    sink = open_sink(store, run_name=None)
    sink.emit(make.started())
    if status is not None:
        sink.emit(RunFinished(make.record(status=status)))
    sink.close()
    _, run = stored(store, sink)
    assert run.info.status == expected
    assert run.info.run_name == "lora-20260102-030405"


def test_an_experiment_is_made_only_when_asked_and_used_again(store):
    with pytest.raises(
        ConfigError, match=r"experiment_name: there is no experiment 'tunes'.*create_experiment_if"
    ):
        open_sink(store, create_experiment_if_not_exists=False)
    first = open_sink(store)
    second = open_sink(store, create_experiment_if_not_exists=False)
    first.close()
    second.close()
    assert stored(store, first)[1].info.experiment_id == stored(store, second)[1].info.experiment_id


def test_trouble_in_the_middle_of_a_run_warns_once(store, make, caplog):
    sink = open_sink(store)
    shutil.rmtree(store)
    for step in range(1, 4):
        sink.emit(make.step(step))
    sink.close()
    ours = [record.getMessage() for record in caplog.records if record.name == "tunesmith.tracking"]
    assert len(ours) == 1
    assert ours[0].startswith("MLflow: ")


def test_a_server_that_is_not_there_is_an_error_before_training(monkeypatch, store):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="tracking_uri"):
        open_sink("http://127.0.0.1:9")


def test_a_missing_package_names_the_extra(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[mlflow\]'"):
        open_sink(store)
