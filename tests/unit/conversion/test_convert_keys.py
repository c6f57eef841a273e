"""What single keys of other tools become: expected values follow from what the keys mean there."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from conversion_names import AXOLOTL, LLAMA_FACTORY, TRL
from tunesmith.config.load import load_config
from tunesmith.conversion.convert import TOOLS, Converted, convert_file
from tunesmith.errors import ConfigError

NEEDED: dict[str, dict[str, Any]] = {
    "axolotl": {"base_model": "m", "datasets": [{"path": "rows.jsonl", "type": "chat_template"}]},
    "llamafactory": {"model_name_or_path": "m", "dataset": "rows.jsonl"},
    "trl": {"model_name_or_path": "m", "dataset_name": "rows.jsonl"},
}


def converted(folder: Path, tool: str, **keys: Any) -> Converted:
    file = folder / "theirs.yaml"
    file.write_text(yaml.safe_dump({**NEEDED[tool], **keys}, sort_keys=False), encoding="utf-8")
    return convert_file(str(file), tool)


def ours(result: Converted) -> dict[str, Any]:
    """Values of the converted file, by dotted name."""
    flat: dict[str, Any] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(yaml.safe_load(result.text), "")
    return flat


LORA = {
    "axolotl": {"adapter": "lora"},
    "llamafactory": {"finetuning_type": "lora"},
    "trl": {"use_peft": True},
}

CARRIED = [
    ("axolotl", {"sequence_len": 4096}, {"context_length": 4096, "on_too_long": "drop"}),
    ("axolotl", {"sequence_len": 8, "excess_length_strategy": "raise"}, {"on_too_long": "error"}),
    ("axolotl", {"micro_batch_size": 2, "batch_size": 8},
     {"train_batch_size_per_device": 2, "gradient_accumulation_steps": 4}),
    ("axolotl", {"micro_batch_size": 2, "gradient_accumulation_steps": 3},
     {"train_batch_size_per_device": 2, "gradient_accumulation_steps": 3}),
    ("axolotl", {"learning_rate": "2e-5"}, {"learning_rate": 2e-5}),
    ("axolotl", {"train_on_inputs": True}, {"task": "causal_lm"}),
    ("axolotl", {"train_on_inputs": "no"}, {"task": "instruction_tuning"}),
    ("axolotl", {"test_datasets": [{"path": "held.jsonl"}]}, {"valid_path": "held.jsonl"}),
    ("axolotl", {"datasets": [{"path": "json", "data_files": "a.jsonl", "type": "completion"}]},
     {"train_path": "a.jsonl", "task": "causal_lm"}),
    ("axolotl", {"adapter": "lora", "lora_target_linear": True}, {"lora_config.target_modules": "all-linear"}),
    ("axolotl", {"adapter": "lora", "lora_target_modules": ["q_proj", "o_proj"]},
     {"lora_config.target_modules": ["q_proj", "o_proj"], "lora_config.lora_dropout": 0.0}),
    ("axolotl", {"adapter": "lora"}, {"lora_config.target_modules": ["q_proj", "v_proj"]}),
    ("axolotl", {"adapter": "lora", "peft_use_dora": True, "lora_r": 32},
     {"lora_config.use_dora": True, "lora_config.r": 32}),
    ("axolotl", {"adapter": "lora", "lora_model_dir": "out/a"}, {"initial_adapter_model_ckpt_path": "out/a"}),
    ("axolotl", {"bf16": "auto"}, {"precision": "auto"}),
    ("axolotl", {"bf16": True}, {"precision": "bf16"}),
    ("axolotl", {"float32": True}, {"precision": "fp32"}),
    ("axolotl", {"wandb_project": "p", "wandb_name": "n"},
     {"logger.provider": "wandb", "logger.provider_config.project": "p", "logger.provider_config.run_name": "n"}),
    ("axolotl", {"use_mlflow": True, "mlflow_experiment_name": "e"},
     {"logger.provider": "mlflow", "logger.provider_config.experiment_name": "e"}),
    ("axolotl", {"saves_per_epoch": 1}, {"checkpoint_and_evaluation_frequency.unit": "epochs"}),
    ("axolotl", {"eval_steps": 50, "save_steps": 50},
     {"checkpoint_and_evaluation_frequency.unit": "steps", "checkpoint_and_evaluation_frequency.frequency": 50}),
    ("axolotl", {"warmup_steps": 20}, {"num_warmup_steps": 20}),
    ("axolotl", {"lr_scheduler": "constant"}, {"lr_scheduler_type": "constant", "num_warmup_steps": 0}),
    ("axolotl", {"pad_to_sequence_len": True}, {"padding": "max_length"}),
    ("axolotl", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"embedding_scaling_technique": "linear"}),
    ("axolotl", {"use_ray": True, "ray_num_workers": 4}, {"num_devices": 4}),
    ("axolotl", {}, {"num_epochs": 1, "context_length": 512, "train_batch_size_per_device": 1}),
    ("llamafactory", {}, {
        "learning_rate": 5e-5, "num_epochs": 3, "train_batch_size_per_device": 8, "context_length": 2048,
        "on_too_long": "truncate", "lr_scheduler_type": "linear", "num_warmup_steps": 0,
        "task": "instruction_tuning", "lora_config.lora_alpha": 16, "lora_config.lora_dropout": 0.0,
        "lora_config.target_modules": "all-linear",
    }),
    ("llamafactory", {"lora_rank": 64}, {"lora_config.r": 64, "lora_config.lora_alpha": 128}),
    ("llamafactory", {"lora_target": "q_proj,v_proj"}, {"lora_config.target_modules": ["q_proj", "v_proj"]}),
    ("llamafactory", {"lora_rank": "64"}, {"lora_config.r": 64, "lora_config.lora_alpha": 128}),
    ("llamafactory", {"pissa_init": True, "pissa_iter": "4"}, {"lora_config.init_lora_weights": "pissa_niter_4"}),
    ("llamafactory", {"eval_strategy": "steps", "logging_steps": 20},
     {"checkpoint_and_evaluation_frequency.unit": "steps", "checkpoint_and_evaluation_frequency.frequency": 20}),
    ("llamafactory", {"eval_strategy": "steps", "logging_steps": 20, "eval_steps": 30},
     {"checkpoint_and_evaluation_frequency.frequency": 30}),
    ("trl", {"evaluation_strategy": "steps", "eval_steps": 30},
     {"checkpoint_and_evaluation_frequency.unit": "steps", "checkpoint_and_evaluation_frequency.frequency": 30}),
    ("axolotl", {"save_steps": 30, "logging_steps": 1}, {"checkpoint_and_evaluation_frequency.frequency": 30}),
    ("axolotl", {"bf16": "full"}, {"precision": "bf16"}),
    ("trl", {"max_length": None}, {
        "context_length": None, "on_too_long": None, "embedding_scaling_technique": "none",
    }),
    ("llamafactory", {"stage": "pt"}, {"task": "causal_lm"}),
    ("llamafactory", {"train_on_prompt": True}, {"task": "causal_lm"}),
    ("llamafactory", {"disable_gradient_checkpointing": False}, {"gradient_checkpointing": True}),
    ("llamafactory", {"pissa_init": True}, {"lora_config.init_lora_weights": "pissa_niter_16"}),
    ("llamafactory", {"adapter_name_or_path": "a"}, {"initial_adapter_model_ckpt_path": "a"}),
    ("llamafactory", {"dataset": "rows.jsonl", "dataset_dir": "d/"}, {"train_path": "d/rows.jsonl"}),
    ("llamafactory", {"adam_beta1": 0.8}, {"optimizer.adam_betas": [0.8, 0.999]}),
    ("llamafactory", {"adam_beta2": 0.95, "adam_beta1": 0.8}, {"optimizer.adam_betas": [0.8, 0.95]}),
    ("llamafactory", {"report_to": "mlflow", "run_name": "r"},
     {"logger.provider": "mlflow", "logger.provider_config.run_name": "r"}),
    ("llamafactory", {"template": "chatml", "default_system": "Be short."}, {
        "generation_config.prompt_format.assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
        "generation_config.prompt_format.default_system_message": "Be short.",
        "generation_config.stopping_sequences": ["<|im_end|>"],
    }),
    ("llamafactory", {"max_steps": 500}, {"min_update_steps": 500}),
    ("llamafactory", {"weight_decay": 0.1}, {"optimizer.weight_decay": 0.1}),
    ("llamafactory", {"deepspeed": "deepspeed_configs/zero_2.json"},
     {"deepspeed.config_path": "deepspeed_configs/zero_2.json"}),
    ("axolotl", {"deepspeed": "deepspeed_configs/zero_3.json"},
     {"deepspeed.config_path": "deepspeed_configs/zero_3.json"}),
    ("trl", {}, {
        "learning_rate": 2e-5, "context_length": 1024, "on_too_long": "truncate", "task": "causal_lm",
        "num_epochs": 3, "lr_scheduler_type": "linear", "num_warmup_steps": 0,
    }),
    ("trl", {"assistant_only_loss": True}, {"task": "instruction_tuning"}),
    ("trl", {"use_peft": True}, {
        "lora_config.r": 16, "lora_config.lora_alpha": 32, "lora_config.target_modules": ["q_proj", "v_proj"],
    }),
    ("trl", {"eval_strategy": "steps", "eval_steps": 25},
     {"checkpoint_and_evaluation_frequency.unit": "steps", "checkpoint_and_evaluation_frequency.frequency": 25}),
    ("trl", {"eval_on_start": True, "seed": 7, "max_grad_norm": 0.3},
     {"eval_first": True, "seed": 7, "optimizer.max_grad_norm": 0.3}),
    ("trl", {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
     {"lr_scheduler_type": "constant", "num_warmup_steps": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "keys", "expected"), CARRIED)
def test_a_key_becomes(tmp_path: Path, tool: str, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    values = ours(converted(tmp_path, tool, **keys))
    assert {key: values.get(key) for key in expected} == expected


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_a_deepspeed_file_need_not_be_there_until_the_file_is_checked(tmp_path: Path, tool: str) -> None:
    result = converted(tmp_path, tool, deepspeed="ds/zero9.json")
    assert ours(result)["deepspeed.config_path"] == "ds/zero9.json"
    assert "deepspeed" not in {finding.key for finding in result.lost}
    (tmp_path / "ours.yaml").write_text(result.text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^ds/zero9\.json: cannot be read"):
        load_config(str(tmp_path / "ours.yaml"))


def test_of_two_keys_for_one_setting_both_are_named(tmp_path: Path) -> None:
    result = converted(tmp_path, "llamafactory", adam_beta1=0.8, adam_beta2=0.9)
    assert ours(result)["optimizer.adam_betas"] == [0.8, 0.9]
    assert "adam_beta2: said with adam_beta1 already" in result.text


LOST = [
    ("axolotl", {"adapter": "qlora"}, "adapter", "QLoRA is not carried"),
    ("axolotl", {"load_in_4bit": True}, "load_in_4bit", "QLoRA is not carried"),
    ("axolotl", {"val_set_size": 0.05}, "val_set_size", "valid_path"),
    ("axolotl", {"sample_packing": True}, "sample_packing", "train_batch_size_per_device"),
    ("axolotl", {"warmup_ratio": 0.1}, "warmup_ratio", "num_warmup_steps"),
    ("axolotl", {}, "warmup_steps (left out; axolotl's default)", "3 % of the steps"),
    ("axolotl", {"optimizer": "adamw_bnb_8bit"}, "optimizer", "float32 state"),
    ("axolotl", {"evals_per_epoch": 4}, "evals_per_epoch", "every n steps or epochs"),
    ("axolotl", {"num_epochs": 0.5}, "num_epochs", "num_epochs 1 is written"),
    ("axolotl", {"deepspeed": {"zero_optimization": {}}}, "deepspeed", "deepspeed_configs/"),
    (
        "axolotl",
        {"datasets": [{"path": "org/name", "type": "alpaca"}]},
        "datasets",
        "train_path name.jsonl is written",
    ),
    ("axolotl", {"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}, "datasets", "has to be rewritten"),
    (
        "axolotl",
        {"datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]},
        "datasets[1]",
        "a folder or a glob",
    ),
    ("axolotl", {"datasets": [{"path": "a.jsonl", "shards": 4}]}, "datasets[0].shards", "all of them"),
    ("axolotl", {"eval_steps": 50, "save_steps": 100}, "save_steps", "every 50 steps"),
    ("axolotl", {"lr_scheduler": "rex"}, "lr_scheduler", "cosine"),
    ("axolotl", {"lerning_rate": 1e-4}, "lerning_rate", "closest is learning_rate"),
    ("llamafactory", {"template": "llama3"}, "template", "the model's own chat template"),
    ("llamafactory", {"template": "default"}, "template", "the model's own chat template"),
    ("llamafactory", {"template": "empty"}, "template", "the model's own chat template"),
    (
        "axolotl",
        {"datasets": [{"path": "a.jsonl", "type": "input_output"}]},
        "datasets",
        "has to be rewritten",
    ),
    ("axolotl", {"datasets": [{"path": "./a.parquet"}]}, "datasets", "has to be rewritten"),
    ("trl", {"dataset_name": "s3://bucket/a.csv"}, "dataset_name", "has to be rewritten"),
    ("llamafactory", {"quantization_bit": 4}, "quantization_bit", "QLoRA is not carried"),
    (
        "llamafactory",
        {"dataset": "identity,alpaca_en_demo"},
        "dataset",
        "train_path identity.jsonl is written",
    ),
    ("llamafactory", {"packing": True}, "packing", "counts examples"),
    ("llamafactory", {"fp16": True}, "fp16", "precision"),
    ("llamafactory", {"max_steps": 10}, "max_steps", "min_update_steps 10 is written"),
    ("llamafactory", {"neftune_noise_alpha": 5}, "neftune_noise_alpha", "no noise"),
    ("llamafactory", {"finetuning_type": "full", "weight_decay": 0.1}, "weight_decay", "every weight decays"),
    ("trl", {"packing": True}, "packing", "counts examples"),
    ("trl", {"completion_only_loss": True}, "completion_only_loss", "messages"),
    ("trl", {"report_to": ["wandb", "tensorboard"]}, "report_to", "tensorboard"),
    ("trl", {"push_to_hub": True}, "push_to_hub", "remote_uri"),
    ("trl", {"average_tokens_across_devices": False}, "average_tokens_across_devices", "counts alike"),
]


@pytest.mark.parametrize(("tool", "keys", "key", "says"), LOST)
def test_a_key_that_cannot_be_carried_is_named(
    tmp_path: Path, tool: str, keys: dict[str, Any], key: str, says: str
) -> None:
    texts = [finding.text for finding in converted(tmp_path, tool, **keys).lost if finding.key == key]
    assert len(texts) >= 1
    assert any(says in text for text in texts), texts


REFUSED = [
    ("axolotl", {"rl": "dpo"}, "rl is"),
    ("axolotl", {"adapter": "llama-adapter"}, "adapter is"),
    ("axolotl", {"reward_model": True}, "reward_model is true, which tunesmith does not train"),
    ("axolotl", {"unfrozen_parameters": ["^lm_head.weight$"]}, "unfrozen_parameters is"),
    ("axolotl", {"batch_size": 7, "micro_batch_size": 2}, "batch_size is 7"),
    ("axolotl", {"micro_batch_size": "two"}, "micro_batch_size is"),
    ("axolotl", {"datasets": "rows.jsonl"}, "datasets is"),
    ("axolotl", {"learning_rate": -1}, "learning_rate is -1"),
    ("axolotl", {"learning_rate": "9" * 5000}, "learning_rate is "),
    ("axolotl", {"warmup_steps": 10, "adam_beta1": 1.5}, "adam_beta1 is 1.5"),
    ("llamafactory", {"stage": "dpo"}, "stage is"),
    ("llamafactory", {"pissa_init": True, "pissa_iter": "many"}, "pissa_iter should be a whole number"),
    ("llamafactory", {"finetuning_type": "freeze"}, "finetuning_type is"),
    ("llamafactory", {"num_train_epochs": 0}, "num_train_epochs is 0"),
    ("trl", {"adam_epsilon": 0}, "adam_epsilon cannot be optimizer.adam_epsilon"),
    ("trl", {"seed": 2**63}, "seed"),
]


@pytest.mark.parametrize(("tool", "keys", "says"), REFUSED)
def test_what_cannot_be_said_here_is_refused_by_name(
    tmp_path: Path, tool: str, keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, tool, **keys)
    (line,) = str(caught.value).splitlines()
    assert says in line
    assert "theirs.yaml line " in line


@pytest.mark.parametrize(
    ("tool", "names", "further"),
    [
        (
            "llamafactory",
            LLAMA_FACTORY,
            {"activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order",
             "dataloader_multiprocessing_context", "evaluation_strategy", "group_by_length"},
        ),
        (
            "trl",
            TRL,
            {"evaluation_strategy", "group_by_length", "logging_dir", "overwrite_output_dir", "torch_dtype",
             "warmup_ratio"},
        ),
        (
            "axolotl",
            AXOLOTL,
            {"cut_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy",
             "liger_glu_activation", "liger_layer_norm", "liger_rms_norm", "liger_rms_norm_gated", "liger_rope",
             "liger_swiglu", "liger_use_token_scaling"},
        ),
    ],
)  # fmt: skip
def test_the_table_has_every_key_of_the_tool(tool: str, names: list[str], further: set[str]) -> None:
    # The further ones are names of other versions, of plug-ins and of transformers that the three share.
    assert len(names) > 150
    assert set(TOOLS[tool].handlers) == set(names) | further


@pytest.mark.parametrize("tool", LORA)
def test_settings_of_an_adapter_say_nothing_without_one(tmp_path: Path, tool: str) -> None:
    keys = {"finetuning_type": "full", "lora_rank": 4} if tool == "llamafactory" else {"lora_r": 4}
    result = converted(tmp_path, tool, **keys)
    assert "lora_config" not in yaml.safe_load(result.text)
    assert "no adapter is trained" in [finding.text for finding in result.needless]
    assert "lora_config" in yaml.safe_load(converted(tmp_path, tool, **LORA[tool]).text)
