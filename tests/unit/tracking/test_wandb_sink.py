"""W&B's own offline mode: the run file it leaves is read back record by record."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.errors import ConfigError
from tunesmith.tracking.scalars import scalars
from tunesmith.tracking.wandb_sink import WandbSink, wandb_wanted

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B offline, with settings and login files of its own, and a key that must not leak."""
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    import wandb

    yield tmp_path / "run"
    wandb.teardown()  # it keeps the environment of its first use


def records(directory: Path) -> list:
    """The records of a finished run; W&B's own process may write the last a moment after ``finish``."""
    for _ in range(200):
        found = parsed(directory)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError("the run file never came to its exit record")


def parsed(directory: Path) -> list:
    """The records of the one ``.wandb`` file: LevelDB's log format, blocks of 32 KiB, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole, found = 7, b"", []
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def history(found) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.setdefault(int(items["_step"]), {}).update(items)
    return rows


def test_an_offline_run_holds_name_config_every_scalar_and_no_key(offline, events):
    sink = WandbSink(project="tunes", run_name="lora-1", directory=offline)
    for event in events:
        sink.emit(event)
    assert sink.url is None
    sink.close()
    found = records(offline)
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("tunes", "lora-1")
    rows = history(found)
    for point in (point for event in events for point in scalars(event)):
        assert rows[point.step][point.name] == pytest.approx(point.value)
    updates = [item for record in found for item in (*record.run.config.update, *record.config.update)]
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    assert config["lora_config"] == {"r": 8}
    assert config["learning_rate"] == 0.0001
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [0]
    files = [path for path in offline.parent.rglob("*") if path.is_file()]
    assert len(files) > 2
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_run_that_did_not_finish_is_failed_and_named_after_the_run(offline, make):
    sink = WandbSink(project="tunes", run_name=None, directory=offline)
    sink.emit(make.started())
    sink.emit(make.step(1, float("nan")))
    sink.close()
    sink.close()
    found = records(offline)
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [1]
    names = [record.run.display_name for record in found if record.WhichOneof("record_type") == "run"]
    assert names[-1] == "lora-20260102-030405"


def test_trouble_in_the_middle_of_a_run_warns_once(offline, make, caplog):
    sink = WandbSink(project="tunes", run_name="x", directory=offline)
    sink._run.finish()
    sink.emit(make.step(1))
    sink.emit(make.step(2))
    sink.close()
    ours = [record.getMessage() for record in caplog.records if record.name == "tunesmith.tracking"]
    assert len(ours) == 1
    assert ours[0].startswith("W&B: ")


def test_no_key_and_no_terminal_to_ask_on_is_an_error_before_training(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY")
    program = (
        "import pathlib, sys; from tunesmith.tracking.wandb_sink import WandbSink;"
        "WandbSink(project='tunes', run_name='x', directory=pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(offline)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tunesmith.errors.ConfigError: logger (W&B): ")
    assert last.endswith("; check WANDB_API_KEY and the network, or set WANDB_MODE=offline")


def test_a_missing_package_names_the_extra(offline, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[wandb\]'"):
        WandbSink(project="tunes", run_name="x", directory=offline)


def test_the_provider_or_a_key_turns_it_on():
    assert wandb_wanted("wandb", {})
    assert wandb_wanted(None, {"WANDB_API_KEY": KEY})
    assert wandb_wanted("mlflow", {"WANDB_API_KEY": KEY})
    assert not wandb_wanted(None, {"WANDB_API_KEY": " "})
    assert not wandb_wanted("tensorboard", {})


def test_a_resumed_run_goes_on_under_its_id(offline, make):
    first = WandbSink(project="tunes", run_name="lora-1", directory=offline)
    first.emit(make.step(1, 3.0))
    first.close()
    second = WandbSink(project="tunes", run_name="lora-1", directory=offline, resumed_id=first.run_id)
    assert second.run_id == first.run_id
    second.emit(make.step(2, 2.0))
    second.close()
    folders = sorted(path.name for path in offline.rglob("offline-run-*") if path.is_dir())
    # W&B names a folder after the second; two begun in one second differ by a counter at the end.
    assert [name.split("-")[3] for name in folders] == [first.run_id] * len(folders)
