"""Axolotl's YAML (keys of version 0.18.0) -> ours."""

from typing import Any

from tunesmith.conversion.axolotl_rows import datasets, pad, sequence_len, too_long, val_set_size
from tunesmith.conversion.shared import (
    SCHEDULE_KEYS,
    at_least_0,
    best_metric,
    betas,
    chat_template,
    checkpointing,
    deepspeed,
    default_system,
    epochs,
    knows,
    lost_flags,
    numbers,
    optimizer,
    rate,
    rope,
    schedule,
    scheduler,
    switch,
    weight_decay,
)
from tunesmith.conversion.sheet import (
    OFF,
    Handler,
    Sheet,
    Tool,
    flag,
    lost,
    needless,
    number,
    to,
    to_lora,
)
from tunesmith.errors import shown_value


def _trains_lora(sheet: Sheet) -> bool:
    return sheet.get("adapter") in ("lora", "qlora")


def _adapter(sheet: Sheet, key: str, value: Any) -> None:
    if value not in ("lora", "qlora"):
        sheet.fault(
            key,
            f"is {shown_value(value)}, which tunesmith does not train",
            "lora is, and qlora without its Q",
        )
        return
    sheet.carry(key, {"lora_config": {}}, "its presence selects LoRA")
    if value == "qlora":
        sheet.lose(key, "the frozen base is quantised to 4 bits", _NO_QLORA)


_NO_QLORA = "QLoRA is not carried: the base keeps the run's number format and needs that much more memory"


def _targets(sheet: Sheet, key: str, value: Any) -> None:
    if not sheet.trains_lora:
        sheet.pass_over(key, "no adapter is trained")
    elif flag(sheet.get("lora_target_linear")):
        sheet.carry("lora_target_linear", {"lora_config.target_modules": "all-linear"}, "all but the head")
        if key == "lora_target_modules" and sheet.is_given(key):
            names = sheet.read(key, value, "names")
            if names is not None:
                sheet.lose(key, f"targets beside all linear layers: {', '.join(names)}", "name all targets")
    elif key == "lora_target_linear":
        sheet.pass_over(key, "off")
    elif not sheet.is_given(key):
        note = "PEFT's choice for Llama, Mistral, Gemma and Qwen; other families have other names"
        sheet.carry(key, {"lora_config.target_modules": value}, note)
    else:
        to_lora("target_modules", "names")(sheet, key, value)


def _adapter_to_continue(sheet: Sheet, key: str, value: Any) -> None:
    if sheet.trains_lora:
        to("initial_adapter_model_ckpt_path", "text")(sheet, key, value)
    else:
        sheet.pass_over(key, "no adapter is trained")


def _batch(sheet: Sheet, key: str, value: Any) -> None:
    """``batch_size`` there is what an optimizer step has on one device."""
    rows, micro = sheet.read(key, value, "count"), number(sheet.get("micro_batch_size"))
    if rows is None:
        return
    if sheet.is_given("gradient_accumulation_steps"):
        sheet.pass_over(key, "gradient_accumulation_steps says it")
    elif not isinstance(micro, int) or micro < 1 or rows % micro:
        sheet.fault(key, f"is {rows}, not a multiple of micro_batch_size", "change one of them")
    else:
        sheet.carry(key, {"gradient_accumulation_steps": rows // micro})


def _accumulation(sheet: Sheet, key: str, value: Any) -> None:
    if not sheet.is_given(key) and sheet.is_given("batch_size"):
        return
    to("gradient_accumulation_steps", "count")(sheet, key, value)


def _warmup(sheet: Sheet, key: str, value: Any) -> None:
    """Left out, it is there 3 % of the steps, at most 100."""
    if value == "3 %" and not sheet.is_given("warmup_ratio"):
        if sheet.get("lr_scheduler") == "constant":
            sheet.carry(key, {"num_warmup_steps": 0}, "a constant schedule has no warm-up there")
        else:
            sheet.lose(key, "warm-up over 3 % of the steps, at most 100", "num_warmup_steps, 10 unless given")
    elif value != "3 %":
        scheduler("lr_scheduler")["warmup_steps"](sheet, key, value)


def _wandb(setting: str) -> Handler:
    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if flag(sheet.get("use_mlflow")) and setting:
            sheet.lose(key, "tracks with W&B", "one tracker; MLflow is written")
            return
        if not setting:
            is_on = sheet.read(key, value, "flag")
            if is_on:
                sheet.carry(key, {"logger.provider": "wandb"})
            elif is_on is not None:
                sheet.pass_over(key, "off")
            return
        if value == "" or flag(sheet.get("use_wandb")) is False:
            sheet.pass_over(key, "W&B is off")
            return
        found = sheet.read(key, value, "text")
        if found is not None:
            sheet.carry(key, {"logger.provider": "wandb", f"logger.provider_config.{setting}": found})

    return handle


def _mlflow(setting: str) -> Handler:
    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if not flag(sheet.get("use_mlflow")):
            sheet.pass_over(key, "MLflow is off")
            return
        sheet.carry(key, {"logger.provider": "mlflow"})
        if setting and (found := sheet.read(key, value, "text")) is not None:
            sheet.carry(key, {f"logger.provider_config.{setting}": found})

    return handle


def _use_tensorboard(sheet: Sheet, key: str, value: Any) -> None:
    if not flag(value):
        sheet.pass_over(key, "off")
    elif flag(sheet.get("use_mlflow")) or sheet.get("wandb_project") or flag(sheet.get("use_wandb")):
        sheet.lose(key, "tracks with TensorBoard too", "one tracker")
    else:
        sheet.carry(key, {"logger.provider": "tensorboard"})


def _workers(sheet: Sheet, key: str, value: Any) -> None:
    if not flag(sheet.get("use_ray")):
        sheet.pass_over(key, "Ray is off")
    elif knows("num_devices"):
        to("num_devices", "count")(sheet, key, value)
    else:
        sheet.lose(key, "workers of a Ray cluster", "one process")


def _attention(sheet: Sheet, key: str, value: Any) -> None:
    is_flash = flag(value) is True or (isinstance(value, str) and value.startswith("flash_attention"))
    if is_flash:
        sheet.carry(key, {"flash_attention_2": True})
    else:
        sheet.pass_over(key, "how attention is computed, which changes no result")


def _rl(sheet: Sheet, key: str, value: Any) -> None:
    sheet.fault(
        key, f"is {shown_value(value)}: tunesmith does not train by preferences or rewards", "leave it out"
    )


def _other_training(sheet: Sheet, key: str, value: Any) -> None:
    if value in OFF or flag(value) is False:
        sheet.pass_over(key, "off")
    else:
        sheet.fault(key, f"is {shown_value(value)}, which tunesmith does not train", "leave it out")


def _no_float32(sheet: Sheet, key: str, value: Any) -> None:
    if sheet.read(key, value, "flag"):
        sheet.carry(key, {"precision": "fp32"})
    elif key not in sheet.settled:
        sheet.pass_over(key, "off")


def _drop_last(sheet: Sheet, key: str, value: Any) -> None:
    if flag(value):
        sheet.lose(
            key, "rows that do not fill the last batch of an epoch are left out", "they are a batch too"
        )
    else:
        sheet.pass_over(key, "off")


_HANDLERS: dict[str, Handler] = {
    "base_model": to("model_id", "text"),
    "adapter": _adapter,
    "lora_r": to_lora("r", "count"),
    "lora_alpha": to_lora("lora_alpha", "count"),
    "lora_dropout": to_lora("lora_dropout", "number"),
    "lora_target_modules": _targets,
    "lora_target_linear": _targets,
    "lora_target_parameters": to_lora("target_parameters", "names"),
    "lora_modules_to_save": to_lora("modules_to_save", "names"),
    "lora_fan_in_fan_out": to_lora("fan_in_fan_out", "flag"),
    "lora_rank_pattern": to_lora("rank_pattern", "value"),
    "lora_alpha_pattern": to_lora("alpha_pattern", "value"),
    "peft_layers_to_transform": to_lora("layers_to_transform", "value"),
    "peft_layers_pattern": to_lora("layers_pattern", "value"),
    "peft_use_dora": to_lora("use_dora", "flag"),
    "peft_use_rslora": to_lora("use_rslora", "flag"),
    "peft_layer_replication": to_lora("layer_replication", "value"),
    "peft_init_lora_weights": to_lora("init_lora_weights", "value"),
    "peft_trainable_token_indices": to_lora("trainable_token_indices", "value"),
    "peft_ensure_weight_tying": to_lora("ensure_weight_tying", "flag"),
    "lora_model_dir": _adapter_to_continue,
    **needless(["peft_autocast_adapter_dtype", "lora_on_cpu"], "how the adapter is computed"),
    **lost_flags(["load_in_4bit", "load_in_8bit", "gptq"], "the frozen base is quantised", _NO_QLORA),
    **needless(["bnb_config_kwargs", "qlora_sharded_model_loading"], "see load_in_4bit"),
    **lost(["peft"], "further settings of the adapter (LoftQ)", "lora_config.loftq_config"),
    **lost(["loraplus_lr_ratio"], "a learning rate of its own for B (LoRA+)", "one learning rate"),
    **needless(["loraplus_lr_embedding"], "see loraplus_lr_ratio"),
    **lost_flags(["merge_lora"], "the adapter is merged after training", "`tunesmith merge`"),
    **needless(["merge_method"], "see merge_lora"),
    **lost_flags(["relora"], "the adapter is merged and begun anew while training (ReLoRA)", "one adapter"),
    **needless(["relora_prune_ratio", "relora_prune_method", "relora_cpu_offload"], "see relora"),
    "datasets": datasets("train_path"),
    "pretraining_dataset": datasets("train_path"),
    "test_datasets": datasets("valid_path"),
    "val_set_size": val_set_size,
    **needless(["train_on_inputs"], "it is in task"),
    "sequence_len": sequence_len,
    "excess_length_strategy": too_long,
    "rope_scaling": rope,
    "pad_to_sequence_len": pad,
    **lost_flags(
        ["sample_packing"],
        "a batch's rows are filled up to sequence_len with several examples",
        "micro_batch_size counts examples here; raise train_batch_size_per_device to as many as one batch held",
    ),
    **needless(
        [
            "sample_packing_group_size", "sample_packing_bin_size", "sample_packing_sequentially",
            "sample_packing_mp_start_method", "sample_packing_eff_est", "eval_sample_packing",
            "multipack_real_batches", "batch_flattening", "pretrain_multipack_buffer_size",
            "pretrain_multipack_attn", "pretraining_sample_concatenation", "streaming_multipack_buffer_size",
            "pad_to_multiple_of", "max_packed_sequence_len",
        ],
        "how rows are laid out, see sample_packing",
    ),
    **lost_flags(["curriculum_sampling"], "rows come in the file's order", "rows are shuffled each epoch"),
    **lost_flags(["group_by_length"], "rows of like length come together", "rows are shuffled each epoch"),
    **lost_flags(["streaming"], "rows are read while training", "all rows, shuffled each epoch"),
    **lost(["eval_sequence_len"], "another longest row in evaluation", "context_length for both"),
    **lost(["min_sample_len"], "rows that are shorter are left out", "all rows"),
    **lost_flags(["dataset_exact_deduplication"], "rows that occur twice are used once", "every row is used"),
    **lost_flags(["use_pose"], "positions are skipped to train for longer texts (PoSE)", "positions as they are"),
    **needless(["pose_split_on_token_ids", "pose_max_context_len", "pose_num_chunks"], "see use_pose"),
    **lost(
        ["dataset_shard_num", "dataset_shard_idx"], "one part of the rows is used", "all rows of train_path"
    ),
    **needless(
        [
            "dataset_prepared_path", "skip_prepare_dataset", "num_dataset_shards_to_save", "dataset_processes",
            "dataset_num_proc", "dataset_keep_in_memory", "shuffle_merged_datasets", "preprocess_iterable",
            "shuffle_before_merging_datasets", "dataloader_pin_memory", "dataloader_num_workers",
            "dataloader_prefetch_factor", "accelerator_config", "remove_unused_columns", "is_preprocess",
            "hf_use_auth_token", "total_num_tokens", "total_supervised_tokens", "axolotl_config_path",
        ],
        "how rows are prepared, which changes no result",
    ),
    "dataloader_drop_last": _drop_last,
    **lost(["push_dataset_to_hub"], "prepared rows are uploaded", "nothing is uploaded"),
    "chat_template": lambda sheet, key, value: chat_template(
        sheet, key, value, ("tokenizer_default",), "default_system_message"
    ),
    **lost(
        ["chat_template_jinja", "chat_template_kwargs"], "a chat template of its own",
        "generation_config.prompt_format",
    ),
    "default_system_message": default_system("chat_template"),
    **lost(["eot_tokens"], "tokens that end a turn", "the chat template says it"),
    **lost(
        ["special_tokens", "tokens", "added_tokens_overrides"], "tokens are added or replaced",
        "the model's own tokens; generation_config.stopping_sequences ends answers",
    ),
    **lost_flags(
        ["resize_token_embeddings_to_32x", "shrink_embeddings", "fix_untrained_tokens", "reinit_weights"],
        "weights of the model are changed before training",
        "the model's weights as they are",
    ),
    **needless(["mean_resizing_embeddings", "embeddings_skip_upcast"], "no tokens are added"),
    "micro_batch_size": to("train_batch_size_per_device", "count"),
    "batch_size": _batch,
    "gradient_accumulation_steps": _accumulation,
    "eval_batch_size": to("eval_batch_size_per_device", "count"),
    **lost(["auto_find_batch_size"], "batches are made smaller until they fit", "train_batch_size_per_device: auto"),
    **epochs("num_epochs", "max_steps"),
    "learning_rate": rate,
    **scheduler("lr_scheduler"),
    "warmup_steps": _warmup,
    **lost(
        [
            "lr_scheduler_kwargs", "lr_quadratic_warmup", "cosine_min_lr_ratio", "cosine_constant_lr_ratio",
            "lr_div_factor", "jagged_restart_steps", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps",
        ],
        "another course of the learning rate",
        "cosine and linear fall towards 0, after num_warmup_steps",
    ),
    **lost(
        ["embedding_lr", "embedding_lr_scale", "lr_groups"],
        "learning rates of their own for some layers",
        "one learning rate",
    ),
    "optimizer": optimizer,
    "weight_decay": weight_decay,
    "adam_beta1": betas,
    "adam_beta2": betas,
    "adam_epsilon": at_least_0("optimizer.adam_epsilon"),
    "max_grad_norm": at_least_0("optimizer.max_grad_norm"),
    **lost(["optim_args", "optim_target_modules"], "further settings of the optimizer", "the `optimizer` group"),
    **needless(
        [
            "adam_beta3", "adam_epsilon2", "torchdistx_path", "dion_lr", "dion_momentum", "dion_rank_fraction",
            "dion_rank_multiple_of", "qgalore_rank", "qgalore_update_proj_gap", "qgalore_scale",
            "qgalore_proj_type", "qgalore_proj_quant", "qgalore_proj_bits", "qgalore_proj_group_size",
            "qgalore_cos_threshold", "qgalore_gamma_proj", "qgalore_queue_size",
        ],
        "a setting of an optimizer other than AdamW",
    ),
    "seed": to("seed", "whole"),
    **numbers(["bf16", "bfloat16"], ["fp16", "float16", "fp8"]),
    "float32": _no_float32,
    **lost_flags(["tf32"], "float32 products in a shorter format on GPUs", "precision"),
    **lost_flags(["fp32_norms"], "normalisation in float32", "precision"),
    **needless(["fp8_enable_fsdp_float8_all_gather", "fp32_norm_classes"], "see fp8 and fp32_norms"),
    "gradient_checkpointing": checkpointing,
    **needless(
        [
            "gradient_checkpointing_kwargs", "selective_checkpointing", "activation_offloading",
            "layer_offloading", "gc_steps", "gc_collect_steps", "torch_empty_cache_steps",
            "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel",
            "chunked_cross_entropy", "chunked_cross_entropy_num_chunks", "tiled_mlp", "tiled_mlp_num_shards",
            "tiled_mlp_use_original_mlp", "flash_attn_cross_entropy", "flash_attn_fuse_mlp", "flash_attn_rms_norm",
            "flash_optimum", "flex_attn_compile_kwargs", "torch_compile_backend", "torch_compile_mode",
            "torch_compile_options", "deepcompile", "cut_cross_entropy", "experts_implementation", "use_kernels",
            "fused_attn_kernel", "sdpa_varlen", "large_head_attention", "flash_attn_d512",
            "gemma4_hybrid_attn_impl", "llama4_linearized_experts", "liger_rope", "liger_rms_norm",
            "liger_rms_norm_gated", "liger_layer_norm", "liger_swiglu", "liger_glu_activation",
            "liger_cross_entropy", "liger_fused_linear_cross_entropy", "xformers_attention", "sdp_attention",
            "flex_attention", "sage_attention", "eager_attention", "low_cpu_mem_usage", "max_memory",
            "gpu_memory_limit", "device", "device_map", "experimental_skip_move_to_device",
        ],
        "how something is computed, which changes no result",
    ),
    "flash_attention": _attention,
    "attn_implementation": _attention,
    "torch_compile": switch("torch_compile"),
    **lost_flags(["s2_attention"], "LongLoRA's shifted attention", "exact attention"),
    **lost_flags(["scaling_softmax", "liger_use_token_scaling"], "another loss or softmax", "plain cross-entropy"),
    **needless(["scaling_softmax_factor", "scaling_softmax_bias"], "see scaling_softmax"),
    **lost_flags(["use_eaft"], "another loss", "cross-entropy of the trained tokens"),
    **needless(["eaft_alpha", "eaft_k"], "see use_eaft"),
    **lost(
        ["neftune_noise_alpha", "noisy_embedding_alpha"], "noise is added to embeddings", "no noise"
    ),
    **lost(
        ["lisa_n_layers", "lisa_step_interval", "lisa_layers_attribute"],
        "only some weights are trained",
        "all weights, or an adapter (lora_config)",
    ),
    **dict.fromkeys(["unfrozen_parameters", "reward_model", "process_reward_model", "ebft"], _other_training),
    **lost_flags(["freeze_mm_modules"], "parts for pictures are frozen", "rows have no pictures"),
    **SCHEDULE_KEYS,
    "saves_per_epoch": schedule,
    "evals_per_epoch": schedule,
    "save_total_limit": to("num_checkpoints_to_keep", "count", "the best are kept here, not the latest"),
    "metric_for_best_model": best_metric,
    **needless(
        ["greater_is_better", "load_best_model_at_end", "save_only_model", "save_safetensors", "save_first_step"],
        "the best checkpoint is always kept, whole",
    ),
    **lost(["dynamic_checkpoint"], "a checkpoint when a file appears", "Ctrl-C saves and ends"),
    **lost(["early_stopping_patience"], "training ends where the loss no longer improves", "the best is kept"),
    **lost(
        ["loss_watchdog_threshold", "loss_watchdog_patience"], "training ends where the loss is high",
        "it ends where the loss is not finite",
    ),
    **lost(
        ["resume_from_checkpoint", "auto_resume_from_checkpoints"], "goes on with an interrupted run",
        "`tunesmith finetune my.yaml --resume auto`",
    ),
    "output_dir": to("output_dir", "text"),
    "use_wandb": _wandb(""),
    "wandb_project": _wandb("project"),
    "wandb_name": _wandb("run_name"),
    **lost(["wandb_entity", "wandb_run_id", "wandb_mode"], "W&B's account, run or mode", "W&B's own WANDB_ variables"),
    **needless(["wandb_watch", "wandb_log_model"], "checkpoints and gradients are not sent to a tracker"),
    "use_mlflow": _mlflow(""),
    "mlflow_tracking_uri": _mlflow("tracking_uri"),
    "mlflow_experiment_name": _mlflow("experiment_name"),
    "mlflow_run_name": _mlflow("run_name"),
    **needless(["hf_mlflow_log_artifacts"], "checkpoints are not sent to a tracker"),
    "use_tensorboard": _use_tensorboard,
    **lost_flags(
        ["use_comet", "use_trackio", "use_otel_metrics"], "another tracker", "logger: wandb, mlflow or tensorboard"
    ),
    **needless(
        [
            "comet_api_key", "comet_workspace", "comet_project_name", "comet_experiment_key", "comet_mode",
            "comet_online", "comet_experiment_config", "trackio_project_name", "trackio_run_name",
            "trackio_space_id", "otel_metrics_host", "otel_metrics_port",
        ],
        "a setting of a tracker that its own switch turns on",
    ),
    **needless(
        [
            "logging_steps", "profiler_steps", "profiler_steps_start", "include_tokens_per_second",
            "include_tkps", "eval_table_size", "eval_max_new_tokens", "gradio_title", "gradio_share",
            "gradio_server_name", "gradio_server_port", "gradio_max_new_tokens", "gradio_temperature",
        ],
        "every step is in metrics.jsonl",
    ),
    **lost_flags(
        ["do_causal_lm_eval", "do_bench_eval", "generate_samples"], "answers are scored or shown",
        "the `evaluation` group",
    ),
    **needless(
        [
            "eval_causal_lm_metrics", "bench_dataset", "bench_split", "num_generation_samples",
            "generation_max_new_tokens", "generation_temperature", "generation_top_p", "generation_top_k",
            "generation_prompt_ratio", "generation_do_sample",
        ],
        "see do_causal_lm_eval and generate_samples",
    ),
    "deepspeed": deepspeed,
    **lost(
        [
            "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type", "dp_shard_size",
            "dp_replicate_size", "sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size",
        ],
        "how a run is spread over GPUs",
        "num_devices, and deepspeed.config_path with a file of deepspeed_configs/",
        off=(1,),
    ),
    **needless(["heads_k_stride", "ring_attn_func"], "see context_parallel_size"),
    **needless(
        [
            "ddp", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters",
            "local_rank", "world_size",
        ],
        "how workers talk to each other",
    ),
    **needless(["use_ray"], "num_devices above 1 is Ray"),
    "ray_num_workers": _workers,
    **lost(["resources_per_worker"], "what a worker gets of a Ray cluster", "worker_resources", off=({"GPU": 1},)),
    **needless(["ray_run_name"], "runs are named by custom_model_tag"),
    "rl": _rl,
    **lost_flags(
        ["qat", "quantization", "quantize_moe_experts"],
        "weights are quantised while they are trained",
        "precision",
    ),
    **lost_flags(
        ["use_onebitllms", "model_quantization_config", "model_quantization_config_kwargs"],
        "weights in another format",
        "precision",
    ),
    **needless(
        [
            "trl", "vllm", "num_labels", "center_rewards_coefficient", "dpo_use_weighting", "dpo_label_smoothing",
            "precompute_ref_log_probs", "dpo_use_liger_kernel", "dpo_padding_free", "dpo_loss_type",
            "dpo_loss_weights", "dpo_beta", "dpo_use_logits_to_keep", "dpo_generate_during_eval",
            "dpo_norm_loss", "rpo_alpha", "orpo_alpha", "simpo_gamma", "cpo_alpha", "kto_desirable_weight",
            "kto_undesirable_weight", "rl_beta", "max_prompt_len",
        ],
        "a setting of training by preferences, which `rl` turns on",
    ),
    **lost(
        ["hub_model_id", "hub_strategy", "hub_revision"], "checkpoints are uploaded to the Hugging Face hub",
        "forward_checkpoint_config.remote_uri copies the best one to a folder or URL",
    ),
    **lost(["model_revision", "revision_of_model"], "one commit of the model", "model_id with its folder"),
    **lost(
        ["base_model_config", "tokenizer_config", "model_config", "model_kwargs", "overrides_of_model_config",
         "overrides_of_model_kwargs"],
        "parts of the model that come from elsewhere", "model_id alone",
    ),
    **lost_flags(["trust_remote_code"], "runs code that comes with the model", "it is never run"),
    **lost(["trainer_cls"], "a trainer of one's own", "tunesmith's own loop"),
    **lost(["plugins"], "plug-ins of Axolotl", "none; kernels of Liger and others change no result"),
    **needless(
        [
            "model_type", "type_of_model", "cls_model_config", "tokenizer_type", "tokenizer_use_fast",
            "tokenizer_legacy", "tokenizer_use_mistral_common", "tokenizer_save_jinja_files", "processor_type",
            "processor_kwargs", "image_size", "image_resize_algorithm", "role_boundaries",
            "is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model",
            "is_qwen_derived_model",
        ],
        "the model's own files say it",
    ),
    **needless(["strict"], "unknown keys are always reported"),
}  # fmt: skip

AXOLOTL = Tool(
    name="axolotl",
    title="Axolotl 0.18.0",
    handlers=_HANDLERS,
    defaults={
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "warmup_steps": "3 %",
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
    },
    assumed={"save_strategy": None, "optimizer": "adamw_torch_fused"},
    trains_lora=_trains_lora,
)
