"""Settings that are unknown, missing or of the wrong kind: place, fault and remedy."""

import pytest

from config_faults import fault
from tunesmith.config.load import load_config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: '1e-4'", 'learning_rate is "1e-4"; it should be a valid number; write the number without'),
        ("num_epochs: '3'", 'num_epochs is "3"; it should be a valid integer; write the number without quotes'),
        ("num_epochs: 2.0", "num_epochs is 2.0; it should be a valid integer; change the value"),
        ("num_epochs: true", "num_epochs is true; it should be a valid integer"),
        ("num_epochs: 0", "num_epochs is 0; it should be greater than 0"),
        ("learning_rate: -1", "learning_rate is -1; it should be greater than 0"),
        ("learning_rate: .inf", "learning_rate is Infinity; it should be a finite number"),
        ("seed: -1", "seed is -1; it should be greater than or equal to 0"),
        ("eval_first: yes", 'eval_first is "yes"; it should be true or false'),
        ("precision: fp16", "precision is \"fp16\"; it should be 'auto', 'fp32' or 'bf16'"),
        (
            "train_batch_size_per_device: '8'",
            "train_batch_size_per_device is \"8\"; it should be a valid integer or 'auto'; write the number",
        ),
        ("custom_model_tag: 5", "custom_model_tag is 5; it should be a valid string; put it in quotes"),
        ("optimizer:", "optimizer is null; it should be a group of settings"),
        ("evaluation: record_match", 'evaluation is "record_match"; it should be a group of settings'),
        ("lora_config: 5", "lora_config is 5, not a group of settings"),
        ("optimizer: {weight_decay: .inf}", "optimizer.weight_decay is Infinity; it should be a finite number"),
        ("optimizer: {weight_decay: .nan}", "optimizer.weight_decay is NaN; it should be"),
        ("optimizer: {adam_betas: ['0.9', 0.9]}", 'optimizer.adam_betas.0 is "0.9"; it should be a valid number'),
        ("optimizer: {adam_betas: [0.9, 1]}", "optimizer.adam_betas is [0.9, 1]; it must hold two numbers"),
        ("optimizer: {adam_betas: [0.9]}", "setting optimizer.adam_betas.1 is missing; give every value"),
        ("generation_config: {stopping_sequences: [a, 1]}", "generation_config.stopping_sequences.1 is 1; it should"),
        (
            "generation_config: {prompt_format: {user: U}}",
            'generation_config.prompt_format.user is "U"; it must contain {instruction} exactly once',
        ),
        (
            "generation_config: {prompt_format: {system_in_user: true}}",
            "generation_config.prompt_format must contain {system} exactly once in user, because system_in_user",
        ),
        ("initial_base_model_ckpt_path: 5", "initial_base_model_ckpt_path is 5; it should be a valid string or a gro"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(write, text, message):
    assert fault(write(text + "\n")).startswith(f"c.yaml line 3: {message}")


def test_a_long_value_is_shortened(write):
    assert len(fault(write(f"seed: {'x' * 500}\n"))) < 200


# --- unknown and missing settings


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("lerning_rate: 1e-4", 3, "no setting lerning_rate; closest is learning_rate"),
        ("weight_decay: 0.1", 3, "no setting weight_decay; closest is optimizer.weight_decay"),
        ("qqqq: 1", 3, "no setting qqqq; docs/configuration.md lists every setting"),
        ("<<: {seed: 1}", 3, "no setting <<; docs/configuration.md lists every setting"),
        ("optimizer:\n  weight_decy: 0.1", 4, "no setting optimizer.weight_decy; closest is weight_decay"),
        ("seed: 1\nlora_config:\n  r: 4\n  lora_aplha: 8", 6,
         "no setting lora_config.lora_aplha; closest is lora_alpha"),
        ("logger:\n  provider: wandb\n  provider_config:\n    projct: x", 6,
         "no setting logger.provider_config.projct; closest is project"),
        ("generation_config:\n  prompt_format:\n    usr: x", 5,
         "no setting generation_config.prompt_format.usr; closest is user"),
        ("forward_checkpoint_config: {tagg: x}", 3, "no setting forward_checkpoint_config.tagg; closest is tag"),
        ("initial_base_model_ckpt_path: {repo_id: a, rev: b}", 3, "no setting initial_base_model_ckpt_path.rev; "),
    ],
)  # fmt: skip
def test_unknown_settings_at_any_depth(write, text, line, message):
    assert fault(write(text + "\n")).startswith(f"c.yaml line {line}: {message}")


def test_a_path_to_a_checkpoint_is_text_or_a_repository(write):
    config = load_config(write("initial_base_model_ckpt_path:\n  repo_id: a/b\n")).config
    assert config.model.initial_base_model_ckpt_path.repo_id == "a/b"
    assert fault(write("initial_base_model_ckpt_path: {repo: a}\n")).splitlines() == [
        "c.yaml line 3: setting initial_base_model_ckpt_path.repo_id is missing; add `repo_id: …`",
        "c.yaml line 3: no setting initial_base_model_ckpt_path.repo; closest is repo_id",
    ]


def test_missing_settings(write):
    assert fault(write("seed: 1\n", needed="")).splitlines() == [
        "c.yaml: setting model_id is missing; add `model_id: …`",
        "c.yaml: setting train_path is missing; add `train_path: …`",
    ]
    assert (
        fault(write("logger: {}\n")) == "c.yaml line 3: setting logger.provider is missing; add `provider: …`"
    )
    assert fault(None, "model_id=m") == "--set: setting train_path is missing; add `train_path: …`"
    assert fault(write("", needed="model_id: ''\ntrain_path: t\n")).startswith(
        'c.yaml line 1: model_id is ""'
    )


def test_several_faults_are_told_at_once(write):
    text = "lerning_rate: 1\nnum_epochs: '3'\noptimizer:\n  weight_decay: x\nlora_config:\n  rr: 8\n"
    assert sorted(fault(write(text)).splitlines()) == [
        "c.yaml line 3: no setting lerning_rate; closest is learning_rate",
        'c.yaml line 4: num_epochs is "3"; it should be a valid integer; write the number without quotes',
        'c.yaml line 6: optimizer.weight_decay is "x"; it should be a valid number; change the value',
        "c.yaml line 8: no setting lora_config.rr; closest is r",
    ]


def test_a_setting_given_twice(write):
    assert fault(write("seed: 1\nseed: 2\n")) == "c.yaml line 4: setting seed is given twice; keep one"
