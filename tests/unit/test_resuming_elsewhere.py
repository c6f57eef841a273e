"""Going on with a run on another number of workers: a step keeps its rows."""

from pathlib import Path

import pytest

from tunesmith.config.load import LoadedConfig, load_config
from tunesmith.errors import ConfigError
from tunesmith.resuming import config_differences, unfinished_run, with_step_of


def loaded(**changed: object) -> LoadedConfig:
    settings = {"model_id": "m", "train_path": "rows.jsonl", **changed}
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def run_of(folder: Path, **changed: object) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(loaded(**changed).as_yaml(), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("began", "now", "batch", "turns"),
    [
        ({"num_devices": 4}, {"num_devices": 2}, "auto", 2),  # 32 rows
        ({"num_devices": 2}, {"num_devices": 4}, 4, 1),
        ({"num_devices": 4}, {}, "auto", 4),
        (
            {"num_devices": 4, "train_batch_size_per_device": 3, "gradient_accumulation_steps": 2},
            {"num_devices": 8, "train_batch_size_per_device": 3, "gradient_accumulation_steps": 2},
            3,
            1,
        ),
        # The user has seen to it: nothing is changed.
        ({"num_devices": 4}, {"num_devices": 2, "gradient_accumulation_steps": 2}, "auto", 2),
    ],
)
def test_on_other_devices_a_step_has_the_same_rows(tmp_path, began, now, batch, turns):
    run = run_of(tmp_path / "run", **began)
    found = with_step_of(run, loaded(**now))
    optimization = found.config.optimization
    assert (optimization.train_batch_size_per_device, optimization.gradient_accumulation_steps) == (
        batch,
        turns,
    )
    assert list(config_differences(loaded(**began).resolved(), found.resolved())) == []


def test_rows_that_cannot_be_shared_out_evenly_are_refused(tmp_path):
    run = run_of(tmp_path / "run", num_devices=4)
    with pytest.raises(ConfigError, match="are 3, which cannot share the 32 rows of this run's steps evenly"):
        with_step_of(run, loaded(num_devices=3))


def test_other_rows_in_a_step_are_another_run(tmp_path):
    run_of(tmp_path / "run", num_devices=4)
    other = loaded(num_devices=2, gradient_accumulation_steps=4)
    assert list(config_differences(loaded(num_devices=4).resolved(), other.resolved())) == [
        "rows of a step: 32 then, 64 now"
    ]
    assert unfinished_run(tmp_path, other.resolved()) is None


def test_auto_finds_the_run_whatever_the_number_of_workers(tmp_path):
    run = run_of(tmp_path / "run", num_devices=4)
    for now in ({"num_devices": 2}, {"num_devices": 4}, {}):
        assert unfinished_run(tmp_path, loaded(**now).resolved()) == run


def test_a_run_of_before_there_were_workers_had_one():
    then = loaded().resolved()
    for key in ("num_devices", "worker_resources", "trainer_resources"):
        del then[key]
    assert list(config_differences(then, loaded().resolved())) == []
