"""Which source of a value wins, where it came from, and what a wrong file is told."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from config_faults import fault
from tunesmith.config.load import LoadedConfig, find_config, load_config
from tunesmith.config.schema import FLAT_SECTIONS, Frequency, FullMethod, LoraMethod, Optimizer, RunConfig

SHIPPED = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
NEEDED = "model_id: m\ntrain_path: t\n"


def origins(loaded: LoadedConfig) -> dict[str, str]:
    return {setting.key: setting.origin for setting in loaded.settings}


# --- which source wins


def test_default_then_file_then_command_line(write):
    file = write("num_warmup_steps: 5\nseed: 7\n")
    config = load_config(file, ["seed=8"]).config.optimization
    assert (config.lr_scheduler_type, config.num_warmup_steps, config.seed) == ("cosine", 5, 8)


def test_the_last_of_two_overrides_wins(write):
    assert load_config(write(), ["seed=8", "seed=9"]).config.optimization.seed == 9


def test_an_override_below_a_group_leaves_its_other_settings(write):
    file = write("optimizer:\n  weight_decay: 0.1\n  max_grad_norm: 2\n")
    optimizer = load_config(file, ["optimizer.weight_decay=0.2"]).config.optimization.optimizer
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.2, 2.0)


def test_an_override_of_a_group_replaces_it(write):
    file = write("optimizer:\n  weight_decay: 0.1\n  max_grad_norm: 2\n")
    loaded = load_config(file, ["optimizer={weight_decay: 0.2}"])
    assert loaded.config.optimization.optimizer == Optimizer(weight_decay=0.2)
    assert origins(loaded)["optimizer.weight_decay"] == "--set"
    assert origins(loaded)["optimizer.max_grad_norm"] == "default"


def test_an_override_makes_the_groups_it_needs(write):
    loaded = load_config(write(), ["checkpoint_and_evaluation_frequency.unit=steps", "lora_config.r=4"])
    assert loaded.config.checkpoints.checkpoint_and_evaluation_frequency == Frequency(unit="steps")
    assert loaded.config.method == LoraMethod(lora_config={"r": 4})


def test_overrides_alone_are_a_configuration():
    config = load_config(None, ["model_id=m", "train_path=t", "learning_rate=1e-3"]).config
    assert (config.model.model_id, config.data.train_path) == ("m", "t")
    assert config.optimization.learning_rate == 1e-3


def test_a_value_may_contain_an_equals_sign(write):
    assert load_config(write(), ["valid_path=s3://b/k?x=1"]).config.data.valid_path == "s3://b/k?x=1"


def test_null_on_the_command_line_takes_a_value_back(write):
    assert load_config(write("num_epochs: 3\n"), ["num_epochs=null"]).config.optimization.num_epochs is None


def test_overriding_does_not_touch_what_was_read(write):
    file = write("optimizer:\n  weight_decay: 0.1\n")
    load_config(file, ["optimizer.weight_decay=0.2"])
    assert load_config(file).config.optimization.optimizer.weight_decay == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: is not of the form key=value; for example --set num_epochs=2"),
        ("=3", "--set =3: is not of the form key=value; for example --set num_epochs=2"),
        (
            "optimizer..x=1",
            "--set optimizer..x=1: is not of the form key=value; for example --set num_epochs=2",
        ),
        ("seed.x=1", "--set seed.x: seed is not a group of settings"),
        ("sed=1", "--set: no setting sed; closest is seed"),
        ("seed=x", '--set: seed is "x"; it should be a valid integer; change the value'),
    ],
)
def test_overrides_that_cannot_be_used(write, override, message):
    assert fault(write("seed: 1\n"), override) == message


def test_a_fault_under_a_name_of_the_users_own_is_told_with_that_name(write):
    file = write("worker_resources:\n  CPU: 1\n  accelerator_type:A10G: -1\n")
    assert re.search(
        r"line 5: worker_resources\.accelerator_type:A10G is -1; it should be greater than or equal to 0",
        fault(file),
    )
    assert fault(write(), "worker_resources.CPU=x").startswith(
        '--set: worker_resources.CPU is "x"; it should be'
    )


def test_an_override_that_is_no_yaml(write):
    assert fault(write(), "seed=[1").startswith("--set seed=[1 line 1: not valid YAML")


# --- where values came from


def test_origins(write):
    file = write("optimizer:\n  weight_decay: 0.1\nlora_config:\n  r: 4\n  lora_alpha: 8\n")
    loaded = load_config(file, ["lora_config.lora_alpha=9", "seed=8"])
    found = origins(loaded)
    assert found["model_id"] == "c.yaml line 1"
    assert found["optimizer.weight_decay"] == "c.yaml line 4"
    assert found["optimizer.adam_epsilon"] == "default"
    assert found["lora_config.r"] == "c.yaml line 6"
    assert found["lora_config.lora_alpha"] == "--set"
    assert found["seed"] == "--set"
    assert found["generation_config"] == "default"
    assert loaded.place("seed") == "--set: seed"
    assert loaded.place("optimizer.weight_decay") == "c.yaml line 4: optimizer.weight_decay"
    assert loaded.place("num_epochs") == "setting num_epochs"
    assert loaded.is_given("optimizer")
    assert loaded.is_given("seed")
    assert not loaded.is_given("num_epochs")
    assert not loaded.is_given("logger")


def test_every_setting_has_an_origin_and_every_default_a_reason(write):
    loaded = load_config(write())
    keys = {s.key for s in loaded.settings}
    assert keys == {key for section in FLAT_SECTIONS.values() for key in section.model_fields}
    assert all(setting.reason for setting in loaded.settings if setting.origin == "default")


# --- the method


def test_lora_if_and_only_if_lora_config_is_there(write):
    assert load_config(write()).config.method == FullMethod()
    assert load_config(write("lora_config:\n  r: 4\n")).config.method == LoraMethod(lora_config={"r": 4})
    for empty in ("lora_config:\n", "lora_config: {}\n"):
        loaded = load_config(write(empty))
        assert loaded.config.method == LoraMethod(lora_config={})
        assert origins(loaded)["lora_config"] == "c.yaml line 3"


def test_default_chooses_lora(write):
    loaded = load_config(write(), default=True)
    assert loaded.config.method == LoraMethod(lora_config={})
    assert origins(loaded)["lora_config"] == "--default"
    kept = load_config(write("lora_config:\n  r: 4\n"), default=True)
    assert kept.config.method == LoraMethod(lora_config={"r": 4})


# --- numbers


def test_a_number_without_a_dot_is_a_number(write):
    config = load_config(
        write("learning_rate: 1e-4\noptimizer: {adam_betas: [0, 0.5], weight_decay: 1}\n")
    ).config
    assert config.optimization.learning_rate == 0.0001
    assert config.optimization.optimizer.adam_betas == (0.0, 0.5)
    assert config.optimization.optimizer.weight_decay == 1.0


# --- the result


def test_a_configuration_is_frozen(write):
    config = load_config(write("generation_config: {stopping_sequences: [a]}\n")).config
    with pytest.raises(ValidationError):
        config.optimization.seed = 1
    with pytest.raises(ValidationError):
        config.optimization = None
    assert config.data.generation_config.stopping_sequences == ("a",)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_load_by_bare_name_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_config(path.name)
    assert isinstance(loaded.config, RunConfig)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded.config.method, LoraMethod) == ("lora_config" in given)
    assert read_again(loaded, tmp_path).config == loaded.config


def test_there_are_shipped_files():
    assert SHIPPED


def test_a_file_here_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = SHIPPED[0].name
    assert find_config(name).resolve() == SHIPPED[0].resolve()
    Path(name).write_text(NEEDED)
    assert find_config(name) == Path(name)


def test_a_name_that_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = SHIPPED[0].name
    wrong = name.replace(".yaml", "r.yaml")
    assert fault(wrong) == f"{wrong}: no such configuration file; closest shipped file is {name}"


def test_the_text_of_a_file_in_place_of_its_name_is_refused() -> None:
    text = fault("model_id: m\n" * 40)
    assert text.startswith('"model_id: m\\nmodel_id: m')
    assert text.endswith("…: is no name of a file; give the path of a YAML file")
    assert "shipped files: " in fault("zzzz")
    assert fault("sub/c.yaml").startswith("sub/c.yaml: cannot be read (No such file")


def read_again(loaded: LoadedConfig, folder: Path) -> LoadedConfig:
    (folder / "again.yaml").write_text(loaded.as_yaml(), encoding="utf-8")
    return load_config(str(folder / "again.yaml"))


# Text that a careless writer of YAML would leave without quotes.
words = st.sampled_from(
    ["1e-4", "1e5", "yes", "null", "12", "0x1F", "1_000", "~", "# x", "a: b", " a ", "é🙂", "a\nb"]
)
slotted = st.sampled_from(["{instruction}", "<|a|>\n{instruction}\n", "U: '{instruction}' {{x}}"])
rates = st.floats(0, 1e6, exclude_min=True)
optional_settings = {
    "valid_path": words,
    "context_length": st.integers(1, 10**6),
    "precision": st.sampled_from(["auto", "fp32", "bf16"]),
    "gradient_checkpointing": st.booleans(),
    "initial_base_model_ckpt_path": words | st.fixed_dictionaries({"repo_id": words}),
    "generation_config": st.fixed_dictionaries(
        {"stopping_sequences": st.lists(words, max_size=3)},
        optional={"prompt_format": st.fixed_dictionaries({"user": slotted, "bos": words})},
    ),
    "num_epochs": st.integers(1, 99),
    "learning_rate": rates,
    "optimizer": st.fixed_dictionaries(
        {}, optional={"adam_epsilon": rates, "adam_betas": st.tuples(*[st.floats(0, 0.999)] * 2).map(list)}
    ),
    "train_batch_size_per_device": st.integers(1, 99) | st.just("auto"),
    "seed": st.integers(0, 2**63 - 1),
    "evaluation": st.none()
    | st.fixed_dictionaries({"metric": words}, optional={"max_rows": st.integers(1, 9)}),
    "logger": st.fixed_dictionaries(
        {"provider": st.sampled_from(["wandb", "mlflow"])},
        optional={"provider_config": st.fixed_dictionaries({"run_name": words})},
    ),
    "custom_model_tag": words,
    "lora_config": st.fixed_dictionaries(
        {},
        optional={
            "r": st.integers(1, 64),
            "lora_dropout": st.floats(0, 1),
            "target_modules": st.lists(words) | words,
            "rank_pattern": st.dictionaries(words, st.integers(1, 8)),
            "init_lora_weights": st.booleans() | words,
        },
    ),
}
configurations = st.fixed_dictionaries({"model_id": words, "train_path": words}, optional=optional_settings)


@settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(configurations)
def test_any_configuration_is_read_back_from_its_own_text(tmp_path, given_settings):
    # JSON is YAML: the file is not written by what is tested.
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(given_settings, ensure_ascii=False), encoding="utf-8")
    loaded = load_config(str(path))
    assert loaded.config.optimization.learning_rate == given_settings.get("learning_rate")
    again = read_again(loaded, tmp_path)
    assert again.config == loaded.config
    assert again.as_yaml() == loaded.as_yaml()
