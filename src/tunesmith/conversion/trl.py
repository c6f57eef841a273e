"""TRL's YAML for supervised fine-tuning (``SFTConfig``, ``ModelConfig``, ``ScriptArguments`` of 1.16.0) -> ours."""

from typing import Any

from tunesmith.conversion.shared import data_path, length, lost_flags
from tunesmith.conversion.sheet import Handler, Sheet, Tool, flag, lost, needless, to, to_lora
from tunesmith.conversion.trainer import TRAINER, TRAINER_ASSUMED, TRAINER_DEFAULTS
from tunesmith.errors import shown_value


def _use_peft(sheet: Sheet, key: str, value: Any) -> None:
    is_on = sheet.read(key, value, "flag")
    if is_on:
        sheet.carry(key, {"lora_config": {}}, "its presence selects LoRA")
    elif is_on is not None:
        sheet.pass_over(key, "a file without lora_config trains every weight")


def _assistant_only(sheet: Sheet, key: str, value: Any) -> None:
    """Off by default there: of a chat every token is trained, the questions too."""
    is_on = sheet.read(key, value, "flag")
    if is_on is not None:
        task = "instruction_tuning" if is_on else "causal_lm"
        sheet.carry(key, {"task": task}, "" if is_on else "every token of a chat is trained there")


def _completion_only(sheet: Sheet, key: str, value: Any) -> None:
    if value is None:
        sheet.pass_over(key, "the rows decide")
    else:
        sheet.lose(
            key, "rows of prompt and completion, and whether the prompt is trained",
            "rows of messages, of which the assistant's turns are trained (task: instruction_tuning)",
        )  # fmt: skip


def _targets(sheet: Sheet, key: str, value: Any) -> None:
    if not sheet.trains_lora:
        sheet.pass_over(key, "no adapter is trained")
    elif value == "all-linear" or value == ["all-linear"]:
        sheet.carry(key, {"lora_config.target_modules": "all-linear"}, "all linear layers but the head")
    elif not sheet.is_given(key):
        note = "PEFT's choice for Llama, Mistral, Gemma and Qwen; other families have other names"
        sheet.carry(key, {"lora_config.target_modules": value}, note)
    else:
        to_lora("target_modules", "names")(sheet, key, value)


def _dataset_name(sheet: Sheet, key: str, value: Any) -> None:
    name = sheet.read(key, value, "text")
    if name is not None:
        data_path(sheet, key, name, "train_path", None)


def _datasets(sheet: Sheet, key: str, value: Any) -> None:
    """A mixture: a list of data sets, of which one can be carried."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        sheet.fault(
            key, f"is {shown_value(value)}; it should be a list of data sets", "see TRL's DatasetConfig"
        )
        return
    if sheet.get("dataset_name") is not None:
        sheet.lose(key, "a mixture of data sets", "train_path, which dataset_name says")
        return
    first, path = value[0], value[0].get("path")
    files = first.get("data_files")
    name = files if isinstance(files, str) else files[0] if isinstance(files, list) and files else path
    if not isinstance(name, str) or not name.strip():
        sheet.fault(f"{key}[0]", "names no path", "give it a path, or data_files")
        return
    data_path(sheet, key, name, "train_path", None)
    if len(value) > 1 or (isinstance(files, list) and len(files) > 1):
        sheet.lose(key, "further data sets or files", "train_path may be a folder or a glob of several files")
    for part in first:
        if part not in ("path", "data_files") and first[part] not in (None, "train"):
            sheet.lose(f"{key}[0].{part}", "a part of the data set", "the whole file")


def _attention(sheet: Sheet, key: str, value: Any) -> None:
    if isinstance(value, str) and value.startswith(("flash_attention", "kernels-community/")):
        sheet.carry(key, {"flash_attention_2": True})
    else:
        sheet.pass_over(key, "how attention is computed, which changes no result")


def _dtype(sheet: Sheet, key: str, value: Any) -> None:
    names = {"auto": "auto", "bfloat16": "bf16", "float32": "fp32"}
    if isinstance(value, str) and value in names:
        sheet.pass_over(key, "bf16 decides; trained weights are float32")
    else:
        sheet.lose(key, f"weights in {shown_value(value)}", "precision auto, fp32 or bf16")


def _loss_type(sheet: Sheet, key: str, value: Any) -> None:
    if value in ("nll", "chunked_nll"):
        sheet.pass_over(key, "cross-entropy of the trained tokens")
    else:
        sheet.lose(key, f"the loss {shown_value(value)}", "cross-entropy of the trained tokens")


def _truncation(sheet: Sheet, key: str, value: Any) -> None:
    if value == "keep_start":
        sheet.pass_over(key, "long rows are cut at their end")
    else:
        sheet.lose(key, "long rows lose their beginning", "on_too_long truncate cuts their end")


def _max_length(sheet: Sheet, key: str, value: Any) -> None:
    if value is None:
        sheet.carry(
            key, {"embedding_scaling_technique": "none"}, "no row is cut there, and positions are not scaled"
        )
    else:
        length(sheet, key, value, "truncate")


_HANDLERS: dict[str, Handler] = {
    **TRAINER,
    "model_name_or_path": to("model_id", "text"),
    **lost(["model_revision"], "one commit of the model", "model_id with a folder of that commit", off=("main",)),
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "attn_implementation": _attention,
    **lost_flags(["trust_remote_code"], "runs code that comes with the model", "it is never run"),
    **lost(["model_init_kwargs"], "how the model is made", "model_id alone"),
    "use_peft": _use_peft,
    "lora_r": to_lora("r", "count"),
    "lora_alpha": to_lora("lora_alpha", "count"),
    "lora_dropout": to_lora("lora_dropout", "number"),
    "lora_target_modules": _targets,
    "lora_target_parameters": to_lora("target_parameters", "names"),
    "lora_modules_to_save": to_lora("modules_to_save", "names"),
    "lora_task_type": to_lora("task_type", "text"),
    "use_rslora": to_lora("use_rslora", "flag"),
    "use_dora": to_lora("use_dora", "flag"),
    **lost_flags(
        ["load_in_8bit", "load_in_4bit"],
        "the frozen base is quantised (QLoRA)",
        "QLoRA is not carried: the base keeps the run's number format and needs that much more memory",
    ),
    **needless(["bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"], "see load_in_4bit"),
    "dataset_name": _dataset_name,
    "datasets": _datasets,
    **lost(["dataset_config"], "a part of the data set", "the whole file"),
    **lost(["dataset_train_split"], "another split of the data set", "train_path", off=("train",)),
    **needless(["dataset_test_split"], "valid_path, a file of rows of its own, is needed for evaluation"),
    **lost(["test_split_size"], "a share of the training rows is held out", "valid_path, rows of its own"),
    **lost_flags(
        ["dataset_streaming", "streaming"], "rows are read while training", "all rows, shuffled each epoch"
    ),
    **lost(["dataset_text_field"], "another name for a row's text", "`text`", off=("text",)),
    **lost(["dataset_kwargs"], "how rows are prepared", "the chat template and the tokenizer alone"),
    "max_length": _max_length,
    "truncation_mode": _truncation,
    **lost(["chat_template_path"], "another chat template", "generation_config.prompt_format"),
    **lost(["eos_token", "pad_token"], "another special token", "generation_config.stopping_sequences"),
    **lost_flags(
        ["packing"],
        "a batch's rows are filled up to max_length with several examples",
        "train_batch_size_per_device counts examples; raise it to as many as one batch held there",
    ),
    **needless(["packing_strategy", "eval_packing", "padding_free"], "how rows are laid out, see packing"),
    **needless(["pad_to_multiple_of", "dataset_num_proc"], "how rows are prepared, which changes no result"),
    **needless(["shuffle_dataset"], "rows are shuffled each epoch"),
    "completion_only_loss": _completion_only,
    "assistant_only_loss": _assistant_only,
    "loss_type": _loss_type,
    **lost(["router_aux_loss_coef"], "a loss that balances experts", "the loss of the trained tokens alone"),
    **needless(["activation_offloading", "ignore_bias_buffers"], "how something is computed"),
}  # fmt: skip

TRL = Tool(
    name="trl",
    title="TRL 1.16.0",
    handlers=_HANDLERS,
    defaults={
        **TRAINER_DEFAULTS,
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "max_length": 1024,
        "assistant_only_loss": False,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": ["q_proj", "v_proj"],
    },
    assumed=TRAINER_ASSUMED,
    nulls=frozenset({"max_length"}),
    trains_lora=lambda sheet: flag(sheet.get("use_peft")) is True,
)
