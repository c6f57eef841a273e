"""Keys of transformers' ``TrainingArguments``, which LLaMA-Factory and TRL share (transformers 5.6 to 5.23)."""

from collections.abc import Mapping
from typing import Any

from tunesmith.conversion.shared import (
    SCHEDULE_KEYS,
    at_least_0,
    best_metric,
    betas,
    checkpointing,
    deepspeed,
    epochs,
    numbers,
    optimizer,
    rate,
    scheduler,
    switch,
    tracker_setting,
    trackers,
    weight_decay,
)
from tunesmith.conversion.sheet import Handler, Sheet, lost, needless, to
from tunesmith.errors import shown_value


def _drop_last(sheet: Sheet, key: str, value: Any) -> None:
    if value is True:
        sheet.lose(
            key, "rows that do not fill the last batch of an epoch are left out", "they are a batch too"
        )
    else:
        sheet.pass_over(key, "off")


def _true_as_here(means: str, nearest: str) -> Handler:
    """A switch that is on here always: only ``false`` cannot be carried."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if sheet.read(key, value, "flag") is False:
            sheet.lose(key, means, nearest)
        elif key not in sheet.settled:
            sheet.pass_over(key, "always so here")

    return handle


def _data_seed(sheet: Sheet, key: str, value: Any) -> None:
    if value == (sheet.get("seed") if sheet.is_given("seed") else 42):
        sheet.pass_over(key, "seed decides the order too")
    else:
        sheet.lose(key, "a seed of its own for the order of rows", "seed, which decides the order too")


def _sampling(sheet: Sheet, key: str, value: Any) -> None:
    if value == "random":
        sheet.pass_over(key, "rows are shuffled each epoch")
    else:
        sheet.lose(key, f"rows come in another order ({shown_value(value)})", "rows are shuffled each epoch")


def _do_train(sheet: Sheet, key: str, value: Any) -> None:
    if sheet.read(key, value, "flag") is False:
        sheet.lose(key, "nothing is trained", "`tunesmith finetune` trains; `tunesmith evaluate` does not")
    elif key not in sheet.settled:
        sheet.pass_over(key, "`tunesmith finetune` trains")


TRAINER: Mapping[str, Handler] = {
    "output_dir": to("output_dir", "text"),
    "learning_rate": rate,
    **epochs("num_train_epochs", "max_steps"),
    **scheduler("lr_scheduler_type"),
    "optim": optimizer,
    "adam_beta1": betas,
    "adam_beta2": betas,
    "adam_epsilon": at_least_0("optimizer.adam_epsilon"),
    "weight_decay": weight_decay,
    "max_grad_norm": at_least_0("optimizer.max_grad_norm"),
    "per_device_train_batch_size": to("train_batch_size_per_device", "count"),
    "per_device_eval_batch_size": to("eval_batch_size_per_device", "count"),
    "gradient_accumulation_steps": to("gradient_accumulation_steps", "count"),
    "seed": to("seed", "whole"),
    "data_seed": _data_seed,
    **numbers(["bf16"], ["fp16"]),
    "gradient_checkpointing": checkpointing,
    "activation_checkpointing": checkpointing,
    "torch_compile": switch("torch_compile"),
    "use_liger_kernel": switch("liger_kernel.enabled"),
    **SCHEDULE_KEYS,
    "save_total_limit": to("num_checkpoints_to_keep", "count", "the best are kept here, not the latest"),
    "metric_for_best_model": best_metric,
    "eval_on_start": switch("eval_first"),
    "report_to": trackers,
    "run_name": tracker_setting("run_name"),
    "project": tracker_setting("project"),
    "deepspeed": deepspeed,
    "do_train": _do_train,
    "train_sampling_strategy": _sampling,
    "dataloader_drop_last": _drop_last,
    "average_tokens_across_devices": _true_as_here(
        "each device's mean loss counts alike", "each trained token of a step counts alike"
    ),
    **lost(
        ["ignore_data_skip"], "a resumed run starts its rows anew", "it goes on where it was, to the same bits"
    ),
    # An older name of a sampling strategy.
    **lost(["group_by_length"], "rows of like length come together", "rows are shuffled each epoch"),
    **lost(
        ["resume_from_checkpoint"], "goes on with an interrupted run", "`tunesmith finetune my.yaml --resume auto`"
    ),
    **lost(["label_smoothing_factor"], "targets are smoothed", "plain cross-entropy"),
    **lost(["neftune_noise_alpha"], "noise is added to embeddings", "no noise"),
    **lost(
        ["optim_args", "optim_target_modules"], "further settings of the optimizer", "the `optimizer` group"
    ),
    **lost(["lr_scheduler_kwargs"], "further settings of the schedule", "cosine and linear fall towards 0"),
    **lost(
        ["fsdp", "fsdp_config", "parallelism_config"],
        "how a run is spread over GPUs",
        "num_devices, and deepspeed.config_path with a file of deepspeed_configs/",
        off=("",),
    ),
    **lost(["auto_find_batch_size"], "batches are made smaller until they fit", "train_batch_size_per_device: auto"),
    **lost(
        ["push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"],
        "checkpoints are uploaded to the Hugging Face hub",
        "forward_checkpoint_config.remote_uri copies the best one to a folder or URL",
    ),
    **lost(["use_cpu"], "GPUs are not used", "an empty CUDA_VISIBLE_DEVICES hides them"),
    **lost(["tf32"], "float32 products in a shorter format on GPUs", "precision"),
    **lost(["full_determinism"], "slower, deterministic GPU kernels", "runs on CPUs are bit-equal as they are"),
    **lost(["do_predict"], "answers a test set after training", "`evaluation`, with test_path"),
    **needless(["do_eval"], "valid_path decides"),
    **needless(
        [
            "bf16_full_eval", "fp16_full_eval", "eval_accumulation_steps", "eval_do_concat_batches",
            "eval_use_gather_object", "batch_eval_metrics", "include_for_metrics", "prediction_loss_only",
            "eval_delay", "label_names", "load_best_model_at_end", "greater_is_better",
        ],
        "held-out loss is exact, and the best checkpoint is always kept",
    ),
    **needless(
        [
            "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "logging_dir",
            "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen",
            "skip_memory_metrics", "debug", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        ],
        "every step is in metrics.jsonl",
    ),
    **needless(
        [
            "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
            "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
            "remove_unused_columns", "length_column_name", "accelerator_config",
        ],
        "how rows are read ahead, which changes no result",
    ),
    **needless(
        [
            "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "torch_compile_backend",
            "torch_compile_mode", "liger_kernel_config", "torch_empty_cache_steps", "use_cache",
        ],
        "how something is computed, which changes no result",
    ),
    **needless(
        [
            "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
            "ddp_backend", "ddp_timeout", "local_rank",
        ],
        "how workers talk to each other",
    ),
    **needless(
        [
            "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "overwrite_output_dir",
            "restore_callback_states_from_checkpoint",
        ],
        "checkpoints are whole, in a folder of their run, and enough to go on with",
    ),
    **needless(["hub_token", "hub_strategy", "hub_always_push"], "nothing is uploaded to the Hugging Face hub"),
}  # fmt: skip

TRAINER_DEFAULTS: Mapping[str, Any] = {"warmup_steps": 0, "lr_scheduler_type": "linear"}
TRAINER_ASSUMED: Mapping[str, Any] = {
    "eval_strategy": "no", "save_strategy": "steps", "save_steps": 500, "eval_steps": 500,
}  # fmt: skip
