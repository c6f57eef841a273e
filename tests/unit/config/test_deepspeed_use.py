"""``deepspeed`` in a run's file: what its DeepSpeed file sets, what is refused, what is said."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from config_faults import fault
from tunesmith.config.deepspeed_file import Sharding, read_deepspeed
from tunesmith.config.deepspeed_use import gathering, offloads
from tunesmith.config.load import LoadedConfig, load_config
from tunesmith.run_record import config_notices

CONFIG = "deepspeed:\n  config_path: z.json\n"  # lines 3 and 4


@pytest.fixture
def load(write):
    """Loads a run's file with this DeepSpeed file beside it."""

    def from_texts(deepspeed: dict[str, Any], text: str = "", *overrides: str) -> LoadedConfig:
        Path("z.json").write_text(json.dumps(deepspeed, indent=0), encoding="utf-8")
        return load_config(write(CONFIG + text), overrides)

    return from_texts


def said(loaded: LoadedConfig, key: str) -> str:
    (notice,) = [notice for notice in loaded.notices if f": {key} " in notice or f", {key} " in notice]
    return notice


def test_without_the_group_nothing_is_read_or_said(write) -> None:
    for text in ("", "deepspeed:\n", "deepspeed: null\n"):
        loaded = load_config(write(text))
        assert loaded.config.cluster.deepspeed is None
        assert loaded.notices == ()


def test_what_the_file_states_is_set(load) -> None:
    loaded = load(
        {
            "gradient_clipping": 0.5,
            "gradient_accumulation_steps": 4,
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
        }
    )
    settings = loaded.config.optimization
    assert settings.optimizer.max_grad_norm == 0.5
    assert (settings.gradient_accumulation_steps, settings.train_batch_size_per_device) == (4, 2)
    assert loaded.config.model.precision == "bf16"
    assert loaded.place("optimizer.max_grad_norm") == (
        "c.yaml line 4 (gradient_clipping of z.json): optimizer.max_grad_norm"
    )
    assert settings.optimizer.weight_decay == 0.0  # the rest of the group as it was
    assert said(loaded, "gradient_clipping") == (
        "z.json line 2: gradient_clipping 0.5 -> optimizer.max_grad_norm 0.5"
    )


def test_other_settings_of_a_group_are_kept(load) -> None:
    loaded = load({"gradient_clipping": 2}, "optimizer:\n  weight_decay: 0.1\n")
    optimizer = loaded.config.optimization.optimizer
    assert (optimizer.max_grad_norm, optimizer.weight_decay) == (2.0, 0.1)


def test_auto_leaves_a_setting_to_the_run(load) -> None:
    loaded = load(
        {"gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"},
        "optimizer: {max_grad_norm: 0.3}\ntrain_batch_size_per_device: 5\n",
    )
    assert loaded.config.optimization.optimizer.max_grad_norm == 0.3
    assert said(loaded, "gradient_clipping").endswith("optimizer.max_grad_norm of the run, which is 0.3")
    assert said(loaded, "train_micro_batch_size_per_gpu").endswith("which is 5")
    assert said(load({"gradient_clipping": "auto"}), "gradient_clipping").endswith("which is 1.0")


def test_two_values_for_one_setting_are_refused(load) -> None:
    load({"gradient_clipping": 0.5}, "optimizer: {max_grad_norm: 0.5}\n")
    with pytest.raises(Exception, match=r"gradient_clipping is 0\.5, but optimizer\.max_grad_norm is 1\.0"):
        load({"gradient_clipping": 0.5}, "optimizer: {max_grad_norm: 1.0}\n")
    with pytest.raises(Exception, match=r"^z\.json line 2: gradient_clipping is 0.5, but"):
        load({"gradient_clipping": 0.5}, "", "optimizer.max_grad_norm=2")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", 32),
        ("num_devices: 4\n", 8),
        ("num_devices: 4\ngradient_accumulation_steps: 2\n", 4),
        ("num_devices: 4\ngradient_accumulation_steps: 2\ntrain_batch_size_per_device: auto\n", 4),
        ("train_batch_size_per_device: 32\n", 32),
    ],
)
def test_a_stated_whole_batch_gives_the_rows_of_each_worker(load, text: str, rows: int) -> None:
    found = load({"train_batch_size": 32}, text).config.optimization
    assert found.train_batch_size_per_device == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_devices: 3\n", "not so many batches of 3 x 1 alike; take a multiple of 3"),
        ("num_devices: 64\n", "not so many batches of 64 x 1 alike; take a multiple of 64"),
        ("train_batch_size_per_device: 8\n", "batch size, accumulation and 1 workers make 8"),
    ],
)
def test_a_whole_batch_that_cannot_be_had_is_refused(load, text: str, message: str) -> None:
    with pytest.raises(Exception, match=f"^z.json line 2: train_batch_size is 32, .*{message}"):
        load({"train_batch_size": 32}, text)


# --- what is split


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_does_not_shard(load, stage: int) -> None:
    notice = said(load({"zero_optimization": {"stage": stage}}), "zero_optimization.stage")
    assert f"stage {stage}: one process does not shard" in notice
    assert notice.startswith("z.json line 3: ")


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (0, "plain data parallelism, as here: each of the 4 workers holds all weights"),
        (
            1,
            "holds its share of weights, gradients and optimizer state (FSDP2); a layer's weights are gathered for a",
        ),
        (
            2,
            "holds its share of weights, gradients and optimizer state (FSDP2); a layer's weights are gathered for a",
        ),
        (
            3,
            "holds its share of weights, gradients and optimizer state (FSDP2); a layer's weights are gathered only",
        ),
    ],
)
def test_it_is_said_what_several_workers_hold(load, stage: int, text: str) -> None:
    notice = said(
        load({"zero_optimization": {"stage": stage}}, "num_devices: 4\n"), "zero_optimization.stage"
    )
    assert notice.startswith(f"z.json line 3: zero_optimization.stage {stage}: ")
    assert text in notice


@pytest.mark.parametrize(
    ("stage", "hpz", "devices", "gathered"),
    [
        (0, 1, 4, None),
        (1, 1, 4, False),
        (2, 1, 4, False),
        (3, 1, 4, True),
        (3, 1, 1, None),
        (3, 2, 4, 2),
        (3, 8, 16, 8),
        (3, 4, 4, True),  # one group of all
        (3, 3, 4, True),  # no whole number of groups
    ],
)
def test_stages_differ_in_how_long_weights_stay_gathered(
    stage: int, hpz: int, devices: int, gathered
) -> None:
    found = gathering(Sharding(stage, hpz_partition_size=hpz), devices)
    assert (found, type(found)) == (gathered, type(gathered))  # True is 1, and 1 would be groups of one


@pytest.mark.parametrize(
    ("zero", "devices", "moved"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 4, True),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, 4, True),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 4, True),
        ({"stage": 2, "cpu_offload": True}, 4, True),
        ({"stage": 3, "offload_param": {"device": "none"}}, 4, False),
        ({"stage": 3}, 4, False),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, 1, False),
    ],
)
def test_what_is_moved_to_the_hosts_memory_is_what_is_said(load, zero, devices: int, moved: bool) -> None:
    loaded = load({"zero_optimization": zero}, f"num_devices: {devices}\n")
    assert offloads(read_deepspeed("z.json"), devices) is moved
    text = "offload: each worker's shares of weights, gradients and optimizer state lie in its host's memory"
    assert any(text in notice for notice in loaded.notices) is moved


def test_that_more_is_moved_than_was_asked_for_is_said(load) -> None:
    zero: dict[str, object] = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    (notice,) = [n for n in load({"zero_optimization": zero}, "num_devices: 4\n").notices if "offload:" in n]
    assert notice.startswith("z.json line 5: ")
    assert "which FSDP2 moves together" in notice


def test_one_process_moves_nothing_and_it_is_said(load) -> None:
    loaded = load({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    (notice,) = [notice for notice in loaded.notices if "offload needs several workers" in notice]
    assert notice.startswith("z.json line 5: ")


def test_groups_of_workers_are_said(load) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 8}
    key = "zero_optimization.zero_hpz_partition_size"
    assert "split within groups of 8 workers" in said(
        load({"zero_optimization": zero}, "num_devices: 16\n"), key
    )
    assert "has no effect: 12 workers do not make several groups of 8" in said(
        load({"zero_optimization": zero}, "num_devices: 12\n"), key
    )


def test_every_other_key_is_named_once_with_those_of_its_meaning(load) -> None:
    loaded = load(
        {
            "steps_per_print": 10,
            "wall_clock_breakdown": False,
            "fp16": {"enabled": True},
            "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5},
        }
    )
    assert said(loaded, "steps_per_print") == said(loaded, "wall_clock_breakdown")
    assert said(loaded, "zero_optimization.overlap_comm").endswith("which changes no result")
    assert "not honoured: no equivalent" in said(loaded, "fp16.enabled")
    assert "sharding" not in " ".join(loaded.notices)  # no stage is asked for


def test_notices_reach_check_and_run(load) -> None:
    loaded = load({"zero_optimization": {"stage": 2}}, "num_epochs: 1\nnum_warmup_steps: 0\n")
    assert list(config_notices(loaded, 10)) == list(loaded.notices) != []


# --- the file


def test_a_file_that_is_not_there_or_wrong(write) -> None:
    assert fault(write(CONFIG)).startswith("z.json: cannot be read (No such file")
    Path("z.json").write_text('{"gradient_cliping": 1}')
    assert fault(
        write(CONFIG)
    ) == "z.json line 1: DeepSpeed documents no key gradient_cliping; closest is " + ("gradient_clipping")


def test_the_group_is_strict(write) -> None:
    assert fault(write("deepspeed: z.json\n")) == (
        'c.yaml line 3: deepspeed is "z.json"; it should be a group of settings; change the value'
    )
    assert fault(write("deepspeed: {}\n")).startswith(
        "c.yaml line 3: setting deepspeed.config_path is missing"
    )
    assert "closest is config_path" in fault(write("deepspeed: {config_pth: a, config_path: b}\n"))


def test_what_a_run_leaves_is_read_where_the_file_is_gone(load) -> None:
    loaded = load({"gradient_clipping": 0.5, "train_batch_size": 24}, "num_devices: 2\n")
    Path("again.yaml").write_text(loaded.as_yaml(), encoding="utf-8")
    assert load_config("again.yaml").config == loaded.config
    Path("z.json").unlink()
    assert load_config("again.yaml", settled=True).config == loaded.config
    assert fault("again.yaml").startswith("z.json: cannot be read")


def test_it_travels_to_workers(load) -> None:
    loaded = load({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5})
    assert pickle.loads(pickle.dumps(loaded)) == loaded
