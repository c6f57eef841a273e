"""LLaMA-Factory's YAML (arguments of version 0.9.5) -> ours."""

from typing import Any

from tunesmith.conversion.shared import (
    chat_template,
    data_path,
    default_system,
    knows,
    length,
    lost_flags,
    numbers,
    rope,
    switch,
)
from tunesmith.conversion.sheet import OFF, Handler, Sheet, Tool, flag, lost, needless, number, to, to_lora
from tunesmith.conversion.trainer import TRAINER, TRAINER_ASSUMED, TRAINER_DEFAULTS
from tunesmith.errors import shown_value

_PREFERENCES = "tunesmith trains sft and pt"


def _trains_lora(sheet: Sheet) -> bool:
    return bool(sheet.get("finetuning_type") == "lora")


def _stage(sheet: Sheet, key: str, value: Any) -> None:
    if value not in ("sft", "pt"):
        sheet.fault(
            key, f"is {shown_value(value)}, which tunesmith does not train", "sft and pt are converted"
        )
    elif value == "pt" or flag(sheet.get("train_on_prompt")):
        sheet.carry(key, {"task": "causal_lm"})
    else:
        sheet.carry(key, {"task": "instruction_tuning"})


def _finetuning_type(sheet: Sheet, key: str, value: Any) -> None:
    if value == "lora":
        sheet.carry(key, {"lora_config": {}}, "its presence selects LoRA")
    elif value == "full":
        sheet.pass_over(key, "a file without lora_config trains every weight")
    else:
        sheet.fault(
            key, f"is {shown_value(value)}, which tunesmith does not train", "lora and full are converted"
        )


def _alpha(sheet: Sheet, key: str, value: Any) -> None:
    """Twice the rank, where the file does not say."""
    if value == "2 x lora_rank":
        rank = number(sheet.get("lora_rank"))  # a fault of its own where it is none
        value = 16 if rank is None else rank * 2
    to_lora("lora_alpha", "count")(sheet, key, value)


def _target(sheet: Sheet, key: str, value: Any) -> None:
    if sheet.trains_lora and value == "all":
        sheet.carry(key, {"lora_config.target_modules": "all-linear"}, "all linear layers but the head")
    else:
        to_lora("target_modules", "names")(sheet, key, value)


def _pissa(sheet: Sheet, key: str, value: Any) -> None:
    if not sheet.read(key, value, "flag") or not sheet.trains_lora:
        sheet.pass_over(key, "off")
        return
    steps = number(sheet.get("pissa_iter"))
    if steps is None or steps != int(steps) or not (steps == -1 or steps > 0):
        sheet.fault("pissa_iter", "should be a whole number above 0, or -1", "change the value")
        return
    name = "pissa" if steps == -1 else f"pissa_niter_{int(steps)}"
    sheet.carry(key, {"lora_config.init_lora_weights": name})


def _one_dataset(setting: str) -> Handler:
    def handle(sheet: Sheet, key: str, value: Any) -> None:
        names = sheet.read(key, value, "names")
        if names is None:
            return
        form = "rows as dataset_info.json describes them, alpaca or sharegpt unless it says otherwise"
        folder = sheet.get("dataset_dir")
        name = names[0]
        if isinstance(folder, str) and name.endswith((".json", ".jsonl")):
            name = f"{folder.rstrip('/')}/{name}"
        data_path(sheet, key, name, setting, form)
        if len(names) > 1:
            others = ", ".join(names[1:])
            sheet.lose(
                key, f"further data sets: {others}", f"{setting} may be a folder or a glob of several files"
            )

    return handle


def _adapter(sheet: Sheet, key: str, value: Any) -> None:
    names = sheet.read(key, value, "names")
    if names is None:
        return
    if not sheet.trains_lora:
        sheet.lose(key, "an adapter that is merged into the base first", "`tunesmith merge`, then model_id")
        return
    sheet.carry(key, {"initial_adapter_model_ckpt_path": names[-1]})
    if len(names) > 1:
        sheet.lose(key, "adapters before the last are merged into the base first", "`tunesmith merge`")


def _attention(sheet: Sheet, key: str, value: Any) -> None:
    if value in ("fa2", "fa3"):
        sheet.carry(key, {"flash_attention_2": True})
    else:
        sheet.pass_over(key, "how attention is computed, which changes no result")


def _no_checkpointing(sheet: Sheet, key: str, value: Any) -> None:
    is_off = sheet.read(key, value, "flag")
    if is_off is not None:
        sheet.carry(key, {"gradient_checkpointing": not is_off})


def _workers(sheet: Sheet, key: str, value: Any) -> None:
    if knows("num_devices"):
        to("num_devices", "count")(sheet, key, value)
    else:
        sheet.lose(key, "workers of a Ray cluster", "one process")


def _val_size(sheet: Sheet, key: str, value: Any) -> None:
    if value in OFF:
        sheet.pass_over(key, "off")
    else:
        sheet.lose(key, "a share of the training rows is held out", "valid_path, a file of rows of its own")


_HANDLERS: dict[str, Handler] = {
    **TRAINER,
    "model_name_or_path": to("model_id", "text"),
    "adapter_name_or_path": _adapter,
    **lost(["model_revision"], "one commit of the model", "model_id with a folder of that commit", off=("main",)),
    "stage": _stage,
    "finetuning_type": _finetuning_type,
    "lora_rank": to_lora("r", "count"),
    "lora_alpha": _alpha,
    "lora_dropout": to_lora("lora_dropout", "number"),
    "lora_target": _target,
    "additional_target": to_lora("modules_to_save", "names"),
    "use_rslora": to_lora("use_rslora", "flag"),
    "use_dora": to_lora("use_dora", "flag"),
    "pissa_init": _pissa,
    **needless(["pissa_iter", "pissa_convert"], "see pissa_init"),
    **lost(["create_new_adapter"], "a further adapter on top of the given one", "that one is trained on"),
    "dataset": _one_dataset("train_path"),
    "eval_dataset": _one_dataset("valid_path"),
    **needless(["dataset_dir"], "where dataset_info.json lies; see dataset"),
    "val_size": _val_size,
    "cutoff_len": lambda sheet, key, value: length(sheet, key, value, "truncate"),
    "rope_scaling": rope,
    # Left out, it is the model's own; "default" and "empty" are two of LLaMA-Factory's.
    "template": lambda sheet, key, value: chat_template(sheet, key, value, (), "default_system"),
    "default_system": default_system("template"),
    **needless(["train_on_prompt"], "it is in task"),
    **lost_flags(["mask_history"], "only the last turn is trained", "every turn of the assistant is trained"),
    **lost_flags(
        ["packing", "neat_packing"],
        "a batch's rows are filled up to cutoff_len with several examples",
        "train_batch_size_per_device counts examples; raise it to as many as one batch held there",
    ),
    **lost(["max_samples"], "only the first rows are used", "all rows of the file"),
    **lost_flags(["streaming"], "rows are read while training, in about random order", "all rows, shuffled"),
    **lost(
        ["mix_strategy", "interleave_probs"],
        "how several data sets are mixed",
        "one file, folder or glob, all rows shuffled",
        off=("concat",),
    ),
    **lost(["tool_format"], "how calls of tools become text", "the chat template's way"),
    **lost_flags(["preserve_thinking"], "earlier thoughts stay in chats", "the chat template's way"),
    **needless(["enable_thinking"], "the chat template decides"),
    **lost_flags(["eval_on_each_dataset"], "data sets are evaluated one by one", "valid_path as a whole"),
    **lost(["tokenized_path"], "rows that are tokenised already", "train_path, tokenised once and cached"),
    **needless(
        [
            "buffer_size", "overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers",
            "ignore_pad_token_for_loss", "data_shared_file_system", "eval_num_beams", "media_dir",
        ],
        "how rows are prepared, which changes no result",
    ),
    **numbers(["pure_bf16"], []),
    "flash_attn": _attention,
    "enable_liger_kernel": switch("liger_kernel.enabled"),
    "disable_gradient_checkpointing": _no_checkpointing,
    "ray_num_workers": _workers,
    **lost(["ray_init_kwargs"], "how Ray is started", "the Ray cluster at hand, or a local one"),
    **needless(["master_addr", "master_port"], "workers find each other through Ray"),
    **lost(
        ["quantization_bit", "quantization_method", "quantization_type", "double_quantization"],
        "the frozen base is quantised (QLoRA)",
        "QLoRA is not carried: the base keeps the run's number format and needs that much more memory",
        off=("bnb", "nf4", True),
    ),
    **needless(["quantization_device_map"], "see quantization_bit"),
    **lost_flags(
        ["resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"],
        "tokens are added to the vocabulary",
        "the model's own tokens",
    ),
    **needless(["init_special_tokens"], "see add_special_tokens"),
    **lost_flags(
        ["split_special_tokens"],
        "text that spells a control token is split",
        "so it is here always, within messages",
    ),
    **lost_flags(["shift_attn"], "LongLoRA's shifted attention", "exact attention"),
    **lost(["mixture_of_depths"], "tokens skip layers", "every token passes every layer"),
    **lost(["moe_aux_loss_coef"], "a loss that balances experts", "the loss of the trained tokens alone"),
    **lost_flags(["upcast_layernorm", "upcast_lmhead_output"], "parts are computed in float32", "precision"),
    **lost_flags(["train_from_scratch"], "random weights instead of the model's", "the model's weights"),
    **lost(["loraplus_lr_ratio"], "a learning rate of its own for B (LoRA+)", "one learning rate"),
    **needless(["loraplus_lr_embedding"], "see loraplus_lr_ratio"),
    **lost_flags(
        [
            "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_mca",
            "use_hyper_parallel", "use_llama_pro", "use_kt",
        ],
        "another optimizer or training engine",
        "AdamW and tunesmith's own loop",
    ),
    **lost_flags(
        ["use_dft_loss", "use_asft_loss", "use_eaft_loss"], "another loss", "cross-entropy of the trained tokens"
    ),
    **lost_flags(["disable_shuffling"], "rows come in the file's order", "rows are shuffled each epoch"),
    **lost(["early_stopping_steps"], "training ends where the metric no longer improves", "the best is kept"),
    **lost_flags(["fp8", "fp8_enable_fsdp_float8_all_gather"], "products in float8", "precision"),
    **lost(
        ["swanlab_project", "use_swanlab"], "tracks with SwanLab", "logger: wandb, mlflow or tensorboard",
        off=("llamafactory",),
    ),
    **lost_flags(["predict_with_generate", "compute_accuracy"], "answers are scored", "the `evaluation` group"),
    **needless(
        [
            "galore_target", "galore_rank", "galore_update_interval", "galore_scale", "galore_proj_type",
            "galore_layerwise", "apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale",
            "apollo_proj", "apollo_proj_type", "apollo_scale_type", "apollo_layerwise", "apollo_scale_front",
            "badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval", "badam_update_ratio",
            "badam_mask_mode", "badam_verbose", "asft_alpha", "eaft_alpha", "hyper_parallel_args",
            "kt_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts", "kt_lora_expert_num",
            "kt_lora_expert_intermediate_size", "swanlab_workspace", "swanlab_run_name", "swanlab_mode",
            "swanlab_api_key", "swanlab_logdir", "swanlab_lark_webhook_url", "swanlab_lark_secret", "fp8_backend",
        ],
        "a setting of an optimizer, loss, engine or tracker that its own switch turns on",
    ),
    **needless(
        [
            "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "module_dropout",
            "oft_rank", "oft_block_size", "oft_target",
        ],
        "a setting of another finetuning_type",
    ),
    **needless(
        [
            "pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing", "kto_chosen_weight",
            "kto_rejected_weight", "simpo_gamma", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target",
            "ppo_whiten_rewards", "ref_model", "ref_model_adapters", "ref_model_quantization_bit", "reward_model",
            "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type", "ld_alpha",
        ],
        "a setting of another stage",
    ),
    **needless(
        [
            "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model", "image_max_pixels",
            "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels",
            "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video", "audio_sampling_rate",
        ],
        "rows have no pictures, films or sound",
    ),
    **needless(
        [
            "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens",
            "repetition_penalty", "length_penalty", "skip_special_tokens", "sortish_sampler",
            "generation_max_length", "generation_num_beams", "generation_config",
        ],
        "how answers are drawn, not how they are learned",
    ),
    **needless(
        [
            "export_dir", "export_size", "export_device", "export_quantization_bit",
            "export_quantization_dataset", "export_quantization_nsamples", "export_quantization_maxlen",
            "export_legacy_format", "export_hub_model_id", "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager",
            "vllm_max_lora_rank", "vllm_config", "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size",
            "sglang_config", "sglang_lora_backend", "infer_backend", "infer_dtype",
        ],
        "for exporting and serving, not for training",
    ),
    **needless(
        [
            "cache_dir", "adapter_folder", "use_fast_tokenizer", "low_cpu_mem_usage", "offload_folder",
            "use_kv_cache", "use_v1_kernels", "use_unsloth", "use_unsloth_gc", "use_reentrant_gc",
            "print_param_status", "device_map", "compute_dtype", "model_max_length", "block_diag_attn",
            "hf_hub_token", "ms_hub_token", "om_hub_token",
        ],
        "how the model is fetched and computed, which changes no result",
    ),
    **lost_flags(["trust_remote_code"], "runs code that comes with the model", "it is never run"),
    **needless(
        [
            "plot_loss", "include_effective_tokens_per_second", "enable_torch_profiler",
            "profiler_output_dir", "profiler_wait_steps", "profiler_warmup_steps", "profiler_active_steps",
            "profiler_repeat", "profiler_record_shapes", "profiler_profile_memory", "profiler_with_stack",
            "profile_modules",
        ],
        "each run has loss.png and metrics.jsonl",
    ),
}  # fmt: skip

LLAMA_FACTORY = Tool(
    name="llamafactory",
    title="LLaMA-Factory 0.9.5",
    handlers=_HANDLERS,
    defaults={
        **TRAINER_DEFAULTS,
        "finetuning_type": "lora",
        "stage": "sft",
        "learning_rate": 5e-5,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "cutoff_len": 2048,
        "lora_alpha": "2 x lora_rank",
        "lora_dropout": 0.0,
        "lora_target": "all",
    },
    assumed={**TRAINER_ASSUMED, "lora_rank": 8, "pissa_iter": 16, "dataset_dir": "data", "report_to": "none"},
    trains_lora=_trains_lora,
)
