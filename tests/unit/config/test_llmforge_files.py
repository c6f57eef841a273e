"""Files of LLMForge, unchanged: old names, keys without an effect here, numbers with underscores."""

from pathlib import Path

import pytest

from config_faults import fault
from tunesmith.config.load import load_config
from tunesmith.config.schema import FLAT_SECTIONS, DeepSpeed, Frequency, LoraMethod
from tunesmith.run_record import config_notices

WHOLE = Path(__file__).with_name("llmforge.yaml")
NEW = {"precision", "on_too_long", "seed", "best_metric", "evaluation"}  # settings that LLMForge did not have


def lines() -> dict[str, int]:
    text = WHOLE.read_text(encoding="utf-8").splitlines()
    return {line.partition(":")[0]: number for number, line in enumerate(text, 1) if line[0] not in " #"}


def test_a_file_with_every_key_of_llmforge_loads_unchanged() -> None:
    loaded = load_config(str(WHOLE))
    config = loaded.config
    assert config.model.context_length == 4096
    assert config.model.gradient_checkpointing is True
    assert config.optimization.min_update_steps == 100
    assert config.checkpoints.checkpoint_and_evaluation_frequency == Frequency(unit="epochs", frequency=1)
    assert config.checkpoints.num_checkpoints_to_keep == 2
    assert config.output.custom_model_tag == "org/llama:orders"
    assert config.cluster.trainer_resources == {"memory": 37580963840}
    assert config.cluster.deepspeed == DeepSpeed(
        config_path="deepspeed_configs/zero_3_offload_optim+param.json"
    )
    assert isinstance(config.method, LoraMethod)
    assert config.method.lora_config["bias"] == "none"
    every = {key for section in FLAT_SECTIONS.values() for key in section.model_fields}
    assert {key for key in every if not loaded.is_given(key)} == NEW


def test_each_key_that_is_read_otherwise_has_one_notice_with_its_line() -> None:
    notices = list(config_notices(load_config(str(WHOLE)), total_steps=1000))
    for key in (
        "no_gradient_checkpoint", "checkpoint_every_n_epochs", "max_num_checkpoints", "min_num_update_steps",
        "model_tag", "dataset_size_scaling_factor", "num_data_blocks_per_device", "webhook_config",
    ):  # fmt: skip
        (said,) = [notice for notice in notices if notice.startswith(f"{WHOLE} line {lines()[key]}: {key} ")]
        assert ("old name" in said) != ("has no effect here" in said)
    for key in ("flash_attention_2", "torch_compile"):
        assert any(
            notice.startswith(f"{WHOLE} line {lines()[key]}: {key} has no effect") for notice in notices
        )
    assert any("each of the 16 workers holds its share of weights" in notice for notice in notices)


def test_what_the_run_keeps_has_todays_names_and_says_nothing_of_old_ones(tmp_path: Path) -> None:
    loaded = load_config(str(WHOLE))
    (tmp_path / "again.yaml").write_text(loaded.as_yaml(), encoding="utf-8")
    again = load_config(str(tmp_path / "again.yaml"))
    assert again.config == loaded.config
    assert again.notices == tuple(n for n in loaded.notices if str(WHOLE) not in n)


# --- old names


@pytest.mark.parametrize(
    ("old", "new", "value", "reads"),
    [
        ("no_gradient_checkpoint: true", "gradient_checkpointing", False, "gradient_checkpointing: false"),
        ("no_gradient_checkpoint: false", "gradient_checkpointing", True, "gradient_checkpointing: true"),
        ("max_num_checkpoints: 3", "num_checkpoints_to_keep", 3, "num_checkpoints_to_keep: 3"),
        ("min_num_update_steps: 7", "min_update_steps", 7, "min_update_steps: 7"),
        ("min_num_update_steps: 1_000", "min_update_steps", 1000, 'min_update_steps: "1_000"'),
        ("model_tag: a:b", "custom_model_tag", "a:b", 'custom_model_tag: "a:b"'),
        ("model_tag: null", "custom_model_tag", None, "custom_model_tag: null"),
        ("checkpoint_every_n_epochs: 2", "checkpoint_and_evaluation_frequency.frequency", 2,
         'checkpoint_and_evaluation_frequency: {"unit": "epochs", "frequency": 2}'),
    ],
)  # fmt: skip
def test_an_old_name_is_read_as_the_new_one(write, old: str, new: str, value: object, reads: str) -> None:
    loaded = load_config(write(f"{old}\n"))
    key = old.partition(":")[0]
    (setting,) = [setting for setting in loaded.settings if setting.key == new]
    assert (setting.value, setting.origin) == (value, f"c.yaml line 3 ({key})")
    assert loaded.notices == (f"c.yaml line 3: {key} is an old name, read as {reads}",)
    assert loaded.is_given(new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel_tag: a\ncustom_model_tag: b\n",
         "c.yaml line 4: model_tag is the old name of custom_model_tag, which is set too (c.yaml line 5); keep one"),
        ("gradient_checkpointing: true\nno_gradient_checkpoint: false\n",
         "c.yaml line 4: no_gradient_checkpoint is the old name of gradient_checkpointing, which is set too "
         "(c.yaml line 3); keep one"),
        ("checkpoint_and_evaluation_frequency: {unit: steps}\ncheckpoint_every_n_epochs: 1\n",
         "c.yaml line 4: checkpoint_every_n_epochs is the old name of checkpoint_and_evaluation_frequency, which is "
         "set too (c.yaml line 3); keep one"),
        ("no_gradient_checkpoint: 1\n",
         "c.yaml line 3: no_gradient_checkpoint is 1; it should be true or false; change the value"),
        ("max_num_checkpoints: 0\n",
         "c.yaml line 3 (max_num_checkpoints): num_checkpoints_to_keep is 0; it should be greater than 0; change the "
         "value"),
        ("checkpoint_every_n_epochs: [1]\n",
         "c.yaml line 3 (checkpoint_every_n_epochs): checkpoint_and_evaluation_frequency.frequency is [1]; it should "
         "be a valid integer; change the value"),
    ],
)  # fmt: skip
def test_old_names_that_cannot_be_read(write, text: str, message: str) -> None:
    assert fault(write(text)) == message


def test_the_command_line_wins_by_either_name(write) -> None:
    for file, override in (
        ("model_tag: a", "custom_model_tag=b"),
        ("custom_model_tag: a", "model_tag=b"),
        ("model_tag: a", "model_tag=b"),
    ):
        assert load_config(write(f"{file}\n"), [override]).config.output.custom_model_tag == "b"
    loaded = load_config(
        write("checkpoint_every_n_epochs: 2\n"), ["checkpoint_and_evaluation_frequency.unit=steps"]
    )
    assert loaded.config.checkpoints.checkpoint_and_evaluation_frequency == Frequency(
        unit="steps", frequency=2
    )


def test_old_names_on_the_command_line(write) -> None:
    loaded = load_config(write(), ["no_gradient_checkpoint=false", "webhook_config.url=x"])
    assert loaded.config.model.gradient_checkpointing is True
    assert loaded.place("gradient_checkpointing") == "--set (no_gradient_checkpoint): gradient_checkpointing"
    assert [notice.partition(" ")[2].partition(" ")[0] for notice in loaded.notices] == [
        "no_gradient_checkpoint", "webhook_config",
    ]  # fmt: skip
    for both in (("model_tag=a", "custom_model_tag=b"), ("custom_model_tag=b", "model_tag=a")):
        assert fault(write(), *both) == (
            "--set: model_tag is the old name of custom_model_tag, which is set too (--set); keep one"
        )
    assert fault(write(), "model_tag.x=1") == "--set model_tag.x: model_tag is not a group of settings"


# --- keys without an effect


@pytest.mark.parametrize(
    "text", ["webhook_config: {url: u, lst: [1]}", "webhook_config: null", "webhook_config: x"]
)
def test_a_key_without_effect_is_left_out_whatever_it_says(write, text: str) -> None:
    loaded = load_config(write(f"{text}\n"))
    assert loaded.config == load_config(write()).config
    (notice,) = load_config(write(f"{text}\n")).notices
    assert notice.startswith("c.yaml line 3: webhook_config has no effect here: nothing is sent")


# --- numbers with underscores


def test_a_number_with_underscores_is_read_where_a_number_is_wanted(write) -> None:
    config = load_config(
        write(
            "context_length: 4_096\nseed: 1_0\ntrain_batch_size_per_device: 1_2\n"
            "optimizer: {weight_decay: 1_000, adam_betas: [0.5, 0.9]}\nevaluation: {max_rows: 2_000}\n"
            "worker_resources: {memory: 53_687_091_200}\n"
        )
    ).config
    assert (config.model.context_length, config.optimization.seed) == (4096, 10)
    assert config.optimization.train_batch_size_per_device == 12
    assert config.optimization.optimizer.weight_decay == 1000.0
    assert config.checkpoints.evaluation is not None
    assert config.checkpoints.evaluation.max_rows == 2000
    assert config.cluster.worker_resources == {"memory": 53687091200.0}


def test_text_stays_text(write) -> None:
    file = write(
        "valid_path: 2024_01\ncustom_model_tag: 1_000\ninitial_base_model_ckpt_path: 1_0\n"
        "generation_config: {stopping_sequences: [1_0]}\nlora_config: {target_modules: [1_0]}\n"
    )
    loaded = load_config(file)
    config = loaded.config
    assert isinstance(config.method, LoraMethod)
    found = [
        config.data.valid_path, config.output.custom_model_tag, config.model.initial_base_model_ckpt_path,
        *config.data.generation_config.stopping_sequences, *config.method.lora_config["target_modules"],
    ]  # fmt: skip
    assert found == ["2024_01", "1_000", "1_0", "1_0", "1_0"]
    assert {type(text) for text in found} == {str}
    Path("again.yaml").write_text(loaded.as_yaml(), encoding="utf-8")
    assert load_config("again.yaml").config == config


@pytest.mark.parametrize(
    "text", ["'4_096'", '"4_096"', "_4096", "4096_", "4__096", "0_7", "4_096.5", "0x1_F"]
)
def test_what_is_no_plain_whole_number_is_refused(write, text: str) -> None:
    assert fault(write(f"context_length: {text}\n")).startswith("c.yaml line 3: context_length is ")


def test_a_quoted_number_with_underscores_has_its_remedy(write) -> None:
    assert fault(write("context_length: '4_096'\n")).endswith("; write the number without quotes")


def test_bounds_hold_for_numbers_with_underscores(write) -> None:
    assert fault(write("context_length: -1_0\n")) == (
        "c.yaml line 3: context_length is -10; it should be greater than 0; change the value"
    )
