"""DeepSpeed files: what is read from them, said of them, and refused in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config.deepspeed_file import Sharding, describe, read_deepspeed, refuse_contradictions
from tunesmith.errors import ConfigError

PRESETS = Path(__file__).parents[3] / "deepspeed_configs"


def keys_of(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all keys that hold no group."""
    names: list[str] = []
    for key, value in values.items():
        names += keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return names


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write_file(values: Any) -> str:
        text = values if isinstance(values, str) else json.dumps(values, indent=2)
        Path("ds.json").write_text(text, encoding="utf-8")
        return "ds.json"

    return write_file


def fault(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(name)
    (line,) = str(caught.value).splitlines()
    return line


# --- the shipped presets


@pytest.mark.parametrize(
    ("name", "stage", "optimizer", "parameters", "group"),
    [
        ("zero_2", 2, False, False, 1),
        ("zero_3", 3, False, False, 1),
        ("zero_3_hpz", 3, False, False, 8),
        ("zero_3_offload_optim", 3, True, False, 1),
        ("zero_3_offload_optim+param", 3, True, True, 1),
    ],
)
def test_a_preset_says_what_its_name_says(
    name: str, stage: int, optimizer: bool, parameters: bool, group: int
) -> None:
    plan = read_deepspeed(PRESETS / f"{name}.json")
    found = (plan.stage, plan.offload_optimizer, plan.offload_parameters, plan.hpz_partition_size)
    assert found == (stage, optimizer, parameters, group)
    assert (dict(plan.settings), plan.train_batch_size, plan.not_honoured) == ({}, None, ())
    values = json.loads((PRESETS / f"{name}.json").read_text())
    assert [meaning.key for meaning in plan.meanings] == keys_of(values)


def test_there_are_five_presets() -> None:
    assert len(list(PRESETS.glob("*.json"))) == 5


def test_a_preset_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed("deepspeed_configs/zero_3.json").stage == 3
    assert read_deepspeed("../../deepspeed_configs/zero_3_hpz.json").hpz_partition_size == 8
    assert read_deepspeed("zero_2.json").stage == 2
    assert fault("other/zero_2.json").startswith("other/zero_2.json: cannot be read")
    assert "shipped files: zero_2.json, zero_3.json, " in fault("zero_4.json")


def test_a_file_of_the_same_name_wins_over_the_preset(write) -> None:
    Path("zero_2.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert read_deepspeed("zero_2.json").stage == 1


# --- what is read and said


FULL = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/x", "ratio": 0.5},
        "zero_quantized_weights": True,
        "stage3_max_live_parameters": 1e9,
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "gradient_clipping": 0.5,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": "auto",
    "train_batch_size": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "steps_per_print": 10,
}


def test_numbers_that_a_run_has_too_come_under_our_names(write) -> None:
    plan = read_deepspeed(write(FULL))
    assert dict(plan.settings) == {
        "precision": "bf16",
        "optimizer.max_grad_norm": 0.5,
        "train_batch_size_per_device": 4,
    }
    assert plan.train_batch_size == 32
    assert plan.offload_optimizer  # into the host's memory, for want of NVMe


def test_what_has_no_equivalent_is_named(write) -> None:
    plan = read_deepspeed(write(FULL))
    assert [(meaning.place, meaning.key) for meaning in plan.not_honoured] == [
        ("ds.json line 5", "zero_optimization.offload_optimizer.device"),
        ("ds.json line 7", "zero_optimization.offload_optimizer.ratio"),
        ("ds.json line 9", "zero_optimization.zero_quantized_weights"),
        ("ds.json line 23", "optimizer"),
    ]


def test_each_key_has_a_line(write) -> None:
    lines = describe(read_deepspeed(write(FULL)), {"gradient_accumulation_steps": 2})
    assert lines[0] == (
        "zero_optimization.stage 3 -> fully sharded: weights, gradients and optimizer state are split over the "
        "workers (FSDP2)"
    )
    assert "gradient_clipping 0.5 -> optimizer.max_grad_norm 0.5" in lines
    assert (
        'gradient_accumulation_steps "auto" -> gradient_accumulation_steps of the run, which is 2'
    ) in lines
    assert len(lines) == len(keys_of({**FULL, "optimizer": 0}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Sharding()),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, Sharding(1, True)),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, Sharding(3, False, True)),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, Sharding(2)),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None}}, Sharding(2)),
    ],
)
def test_older_and_emptier_files(write, values: dict[str, Any], expected: Sharding) -> None:
    plan = read_deepspeed(write(values))
    found = (plan.stage, plan.offload_optimizer, plan.offload_parameters)
    assert found == (expected.stage, expected.offload_optimizer, expected.offload_parameters)


def test_what_is_off_asks_for_nothing(write) -> None:
    off = {"amp": {"enabled": False}, "sparse_gradients": False, "communication_data_type": None}
    assert read_deepspeed(write(off)).not_honoured == ()
    on = {"amp": {"enabled": True}, "sparse_gradients": True, "communication_data_type": "fp32"}
    assert [meaning.key for meaning in read_deepspeed(write(on)).not_honoured] == list(on)


def test_the_text_of_a_file_in_place_of_its_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(File name too long\)"):
        read_deepspeed("{" * 300)


def test_fp16_is_named_and_not_done(write) -> None:
    plan = read_deepspeed(write({"fp16": {"enabled": True}}))
    assert "precision" not in plan.settings
    assert [meaning.key for meaning in plan.not_honoured] == ["fp16.enabled"]


def test_no_clipping_is_no_clipping(write) -> None:
    plan = read_deepspeed(write({"gradient_clipping": 0}))
    assert plan.settings == {"optimizer.max_grad_norm": 0.0}
    assert describe(plan) == ["gradient_clipping 0 -> optimizer.max_grad_norm 0: no clipping"]


# --- contradictions with the run


def test_a_run_that_says_otherwise_is_refused(write) -> None:
    plan = read_deepspeed(write(FULL))
    with pytest.raises(ConfigError) as caught:
        refuse_contradictions(plan, {"optimizer.max_grad_norm": 1.0})
    assert str(caught.value) == (
        'ds.json line 19: gradient_clipping is 0.5, but optimizer.max_grad_norm is 1.0; keep one, or write "auto" there'
    )
    refuse_contradictions(plan, {"optimizer.max_grad_norm": 0.5, "precision": "auto"})


def test_the_whole_batch_has_to_be_the_product(write) -> None:
    plan = read_deepspeed(write(FULL))
    refuse_contradictions(plan, {"gradient_accumulation_steps": 2}, num_devices=4)  # 4 x 2 x 4 = 32
    with pytest.raises(ConfigError) as caught:
        refuse_contradictions(plan, {"gradient_accumulation_steps": 2}, num_devices=8)
    assert str(caught.value).startswith("ds.json line 22: train_batch_size is 32, but ")
    assert "8 workers make 64" in str(caught.value)


# --- what is refused


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"zero_optimisation": {"stage": 3}}, "line 2: DeepSpeed documents no key zero_optimisation; closest is"),
        ({"zero_optimization": {"stge": 3}}, "line 3: DeepSpeed documents no key zero_optimization.stge; closest"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; it should be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage is "3"'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true"),
        ({"zero_optimization": {"stage": [3]}}, "zero_optimization.stage is [3]"),
        ({"zero_optimization": 3}, "zero_optimization is 3; it should be a group of settings"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3, not 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, 'device is "disk"; it should be'),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled is 1; it should be true"),
        ({"bf16": {"enabled": 0.0}}, "bf16.enabled is 0.0; it should be true"),
        ({"bf16": {"enabled": 1.0}}, "bf16.enabled is 1.0; it should be true"),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, "bf16 and bfloat16 are both enabled"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1; it should be a number"),
        ({"gradient_clipping": True}, "gradient_clipping is true"),
        ({"train_batch_size": 0}, "train_batch_size is 0; it should be a whole number above 0"),
        ("[1]", "is not a group of settings"),
        ("", "is not valid JSON"),
        ('{"a": 1,}', "ds.json line 1: is not valid JSON"),
        ('{"bf16": {}, "bf16": {}}', 'is not valid JSON: "bf16" is given twice'),
        ('{"gradient_clipping": NaN}', "NaN is no number in JSON"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line_with_its_place(write, values: Any, says: str) -> None:
    line = fault(write(values))
    assert line.startswith("ds.json")
    assert says in line


def test_tabs_and_a_byte_order_mark_are_read_and_lines_kept(write) -> None:
    assert read_deepspeed(write('\ufeff{\n\t"zero_optimization": {\n\t\t"stage": 2\n\t}\n}\n')).stage == 2
    assert fault(write('{\n\t"zero_optimization": {\n\t\t"stage": 7\n\t}\n}\n')).startswith(
        "ds.json line 3: "
    )


def test_bytes_that_are_no_text_are_refused(write) -> None:
    name = write("{}")
    Path(name).write_bytes(b'{"a": "\xff"}')
    assert fault(name) == "ds.json: is not UTF-8 (byte 7); save it as UTF-8"


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 9), st.sampled_from(["auto", "cpu", "none"]), st.floats(0, 2)
)
ZERO = st.dictionaries(
    st.sampled_from(
        ["stage", "overlap_comm", "zero_hpz_partition_size", "offload_param", "offload_optimizer"]
    ),
    st.one_of(LEAVES, st.dictionaries(st.sampled_from(["device", "pin_memory"]), LEAVES, max_size=2)),
)
FILES = st.dictionaries(
    st.sampled_from(
        ["zero_optimization", "bf16", "fp16", "gradient_clipping", "train_batch_size", "scheduler"]
    ),
    st.one_of(LEAVES, ZERO, st.dictionaries(st.just("enabled"), LEAVES)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=FILES)
def test_every_key_is_accounted_for_or_the_file_is_refused(write, values: dict[str, Any]) -> None:
    plan, refusal = None, ""
    try:
        plan = read_deepspeed(write(values))
    except ConfigError as error:
        refusal = str(error)
    if plan is None:
        assert len(refusal.splitlines()) == 1
        assert refusal.startswith("ds.json")
        return
    told = [meaning.key for meaning in plan.meanings]
    groups = ("zero_optimization", "bf16", "fp16", "offload_param", "offload_optimizer")
    wanted = [key for key in keys_of(values) if key.rpartition(".")[2] not in groups]
    assert [key for key in wanted if not any(key == t or key.startswith(f"{t}.") for t in told)] == []
    assert all("->" in line for line in describe(plan))
