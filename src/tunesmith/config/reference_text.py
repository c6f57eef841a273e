"""What ``reference.py`` cannot read off the sections: what each setting means, and the prose around the tables."""

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    "model": "Model",
    "data": "Data",
    "optimization": "Optimization",
    "checkpoints": "Evaluation and checkpoints",
    "output": "Output",
    "cluster": "Workers",
}

_PROMPT = "generation_config.prompt_format"
_PROVIDER = "logger.provider_config"
MEANINGS: Mapping[str, str] = {
    "initial_base_model_ckpt_path": "other weights of the same base: folder of a model, checkpoint or run, or a hub id",
    "initial_base_model_ckpt_path.repo_id": "the hub id, written as a group",
    "initial_adapter_model_ckpt_path": "go on training this adapter: folder of a checkpoint or run",
    "initial_adapter_model_ckpt_path.repo_id": "hub id of the adapter",
    "context_length": "longest row in tokens",
    "embedding_scaling_technique": "what is done where context_length exceeds the model's own",
    "precision": "number format of the matrix products; see [models](models.md#number-format)",
    "gradient_checkpointing": "keep fewer activations for the backward pass, at the price of time",
    "flash_attention_2": "LLMForge's switch; accepted, and said to have no effect",
    "liger_kernel": "LLMForge's switch; accepted, and said to have no effect",
    "liger_kernel.enabled": "on or off",
    "liger_kernel.kwargs": "which of its kernels",
    "torch_compile": "LLMForge's switch; accepted, and said to have no effect",
    "valid_path": "rows that are never trained on, for loss and for choosing the best checkpoint",
    "task": "which tokens are trained: the assistant's turns, or all",
    "on_too_long": "what happens to rows longer than context_length; see [data](data.md#long-rows)",
    "generation_config": "how chats become text and where answers end; saved with the model",
    _PROMPT: "replaces the model's own chat template",
    f"{_PROMPT}.system": "a system message",
    f"{_PROMPT}.user": "a user message; with system_in_user it also has {system}",
    f"{_PROMPT}.assistant": "an assistant message, with what ends the turn",
    f"{_PROMPT}.trailing_assistant": "what the prompt ends with, before the model answers",
    f"{_PROMPT}.bos": "text before the conversation",
    f"{_PROMPT}.default_system_message": "the system text of rows that have none",
    f"{_PROMPT}.system_in_user": "put the filled system string at {system} in a user turn",
    f"{_PROMPT}.system_in_last_user": "into the last user turn instead of the first",
    f"{_PROMPT}.add_system_tags_even_if_message_is_empty": "write the system turn without a text too",
    f"{_PROMPT}.strip_whitespace": "strip each message before it is put in",
    "generation_config.stopping_sequences": "further texts that end an answer",
    "num_epochs": "passes over the training rows",
    "min_update_steps": "optimizer steps that a run has at least, in whole epochs",
    "learning_rate": "the highest rate, reached after warm-up",
    "lr_scheduler_type": "how the rate goes on after warm-up",
    "num_warmup_steps": "steps over which the rate rises to its peak",
    "optimizer": "AdamW and gradient clipping",
    "optimizer.adam_betas": "decay of the two moments",
    "optimizer.adam_epsilon": "added to the denominator",
    "optimizer.weight_decay": "decoupled weight decay",
    "optimizer.max_grad_norm": "longest gradient, as a global norm",
    "train_batch_size_per_device": "rows of a batch",
    "gradient_accumulation_steps": "batches of an optimizer step on each device",
    "padding": "max_length: memory is planned for a row of context_length too, so that longer rows later fit",
    "seed": "decides the order of rows, dropout and a fresh adapter's values",
    "checkpoint_and_evaluation_frequency": "when to evaluate and save; always at the end too",
    "checkpoint_and_evaluation_frequency.unit": "what is counted",
    "checkpoint_and_evaluation_frequency.frequency": "after how many of them",
    "num_checkpoints_to_keep": "how many of the best stay on disk, beside the newest",
    "best_metric": "what makes a checkpoint the best: eval_loss, or the name in evaluation.metric",
    "eval_first": "score the held-out rows before step 1",
    "eval_batch_size_per_device": "most rows in a batch when the loss is taken",
    "evaluation": "answers on held-out rows, scored before and after; see [evaluation](evaluation.md)",
    "evaluation.metric": "exact_match, record_match, label_accuracy or token_f1",
    "evaluation.test_path": "rows for the scores before and after",
    "evaluation.max_rows": "answer only the first rows",
    "evaluation.max_new_tokens": "longest answer in tokens",
    "output_dir": "folder in which each run gets its own",
    "custom_model_tag": "name of the tuned model",
    "forward_checkpoint_config": "where a LoRA run's best checkpoint is copied to",
    "forward_checkpoint_config.tag": "folder of the copy, below lora_fine_tuning",
    "forward_checkpoint_config.remote_uri": "storage that gets the copy: folder or URL",
    "logger": "an experiment tracker",
    "logger.provider": "which one; its package is an extra, see [dependencies](dependencies.md)",
    _PROVIDER: "settings of the tracker",
    f"{_PROVIDER}.project": "W&B: the project",
    f"{_PROVIDER}.run_name": "W&B, MLflow: the name shown for the run",
    f"{_PROVIDER}.tracking_uri": "MLflow: folder or address of a server",
    f"{_PROVIDER}.experiment_name": "MLflow: the experiment",
    f"{_PROVIDER}.create_experiment_if_not_exists": "MLflow: make a missing experiment",
    "num_devices": "workers that train together; more than one are started by Ray, with the extra tunesmith[ray]",
    "worker_resources": "what each worker asks of Ray beside its CPU or GPU, such as `accelerator_type:A10G: 0.001`",
    "trainer_resources": "what is reserved once beside the workers, such as `memory: 53687091200`",
    "deepspeed": "LLMForge's way to say what is split over the workers: stages 1 to 3 are; each key is said",
}

FAULTS = (
    "lerning_rate=1e-4",
    "optimizer.weight_decy=0",
    "num_epochs=0",
    'num_epochs="2"',
    "task=chat",
    "lora_config.target_module=[q_proj]",
)

BEFORE_SETTINGS = """
# Configuration

This page is written by `python -m tunesmith.config.reference` from `src/tunesmith/config/schema.py`.

One YAML file describes a run. Two settings are required, `model_id` and `train_path`; everything else has a default.
The names are those of LLMForge. `tunesmith check my.yaml --show` prints every value and where it came from.

```yaml
model_id: smollm2-135m-instruct-q4
train_path: examples/orders/train.jsonl
valid_path: examples/orders/valid.jsonl
num_epochs: 2
learning_rate: 2e-3
evaluation:
  metric: record_match
lora_config:
  r: 8
  target_modules: [q_proj, v_proj]
```

## LoRA or full-parameter

A file with `lora_config` trains a LoRA adapter; a file without it trains every weight. An empty `lora_config:` counts
as present. Nothing else has to differ, but the learning rate should: left out, it is $lora for LoRA and $full for
full-parameter training. This is a whole file, for full-parameter training:

```yaml
model_id: smollm2-135m-instruct-q4
train_path: my-chats.jsonl
```

## Which value wins

Defaults, then the file, then the command line. `--set` takes a setting by its dotted name and a value in YAML, and may
be repeated. It works on `finetune` and `check`:

```console
$$ tunesmith finetune my.yaml --set num_epochs=1 --set optimizer.weight_decay=0.01 --set lora_config.r=16
```

`--set lora_config.r=16` on a file without `lora_config` makes it a LoRA run. Full-parameter training cannot be chosen
on the command line for a file that has `lora_config`: take the group out of the file. `tunesmith finetune --default`
needs no file, only `--set model_id=...` and `--set train_path=...`; it trains LoRA and prints every value it chose,
with the reason.

A path is taken as it stands, from the current folder. A configuration's bare name that is not in the current folder is
looked for among the files shipped in `configs/`.

Numbers and booleans follow YAML 1.2: `1e-4` is a number, `yes` and `on` are texts. A key given twice is an error.
Whole numbers may have underscores, as `37_580_963_840`; where a text is wanted they stay text.

Older names of LLMForge are read too, each with a notice: `no_gradient_checkpoint`, `checkpoint_every_n_epochs`,
`max_num_checkpoints`, `min_num_update_steps` and `model_tag`. `dataset_size_scaling_factor`, `webhook_config` and
`num_data_blocks_per_device` are accepted and said to have no effect; see
[migration](migration.md#older-names-of-llmforge).
"""

BEFORE_FAULTS = """
## What is refused

An unknown setting at any depth, a value of the wrong type (a number in quotes is a text), a required setting that is
missing: each is an error with file and line, and nothing is trained. All faults of a file are listed at once. The exit
code is 2. In place of `--set` the message names the line, such as `my.yaml line 14`, where the value is in the file.
"""

LORA_TEXT = """
### lora_config

The group is passed through to PEFT's `LoraConfig`, every key of it. Left out, these have defaults of ours:
"""

AFTER_SETTINGS = """
`task_type` is `CAUSAL_LM` unless given. A name in `target_modules` that no layer of the model has is an error which
lists the names there are. `embed_tokens` and `lm_head` may be targets, on models with tied and untied embeddings; see
[models](models.md#tied-embeddings). With `initial_adapter_model_ckpt_path` the adapter keeps the settings it was made
with; a key of the group that says otherwise is an error.

## Settings that contradict each other

These are errors, because training would do something other than what was asked:

- `initial_adapter_model_ckpt_path` without `lora_config`.
- `best_metric` other than `eval_loss` that is not `evaluation.metric`, or without `valid_path`.
- `evaluation` without `valid_path` and without `evaluation.test_path`, or on rows of plain text.
- `context_length` above the model's own with `embedding_scaling_technique: none`.
- The file of `deepspeed.config_path` and this one state different values of one setting, or a `train_batch_size` that
  the workers' batches do not make.
- An old name beside the new one.
- `precision: bf16` on hardware that only emulates it.
- `system_in_user` without `{system}` in `user`, or the other way round; `system_in_last_user` without `system_in_user`.

So is a tag that cannot be a folder's name, or storage for a LoRA run that cannot be written: better found out before
hours of training than after.

These are notices, because a setting merely cannot act:

- `num_warmup_steps` not below the number of steps: the rate never reaches its peak.
- `eval_batch_size_per_device` or `eval_first` without `valid_path` and `evaluation`.
- `min_update_steps` beside `num_epochs`.
- `embedding_scaling_technique` without `context_length`.
- Old names, keys without an effect here, and each key of a DeepSpeed file: what it does in this run.

## A prompt format of your own

Each template is a text in which `{instruction}` stands exactly once for the message. Write it in double quotes, in
which YAML reads `\\n` as a line break. Other braces mean themselves. A chat with tool messages cannot be rendered by a
`prompt_format`.

```yaml
model_id: smollm2-135m-instruct-q4
train_path: my-chats.jsonl
generation_config:
  prompt_format:
    system: "<|im_start|>system\\n{instruction}<|im_end|>\\n"
    user: "<|im_start|>user\\n{instruction}<|im_end|>\\n"
    assistant: "<|im_start|>assistant\\n{instruction}<|im_end|>\\n"
    trailing_assistant: "<|im_start|>assistant\\n"
  stopping_sequences: ["<|im_end|>"]
```

## Trackers and storage

```yaml
model_id: smollm2-135m-instruct-q4
train_path: my-chats.jsonl
checkpoint_and_evaluation_frequency: {unit: steps, frequency: 50}
logger:
  provider: mlflow
  provider_config: {experiment_name: orders, tracking_uri: ./mlruns}
forward_checkpoint_config: {remote_uri: s3://my-bucket/models}
lora_config:
```

## Environment variables

| variable | effect |
|---|---|
| `WANDB_API_KEY` | turns Weights & Biases on, beside any `logger`; read by wandb itself, never logged or saved |
| `WANDB_PROJECT` | the project, where `logger.provider_config.project` is not set |
| `WANDB_MODE` | `offline` keeps W&B's files local; wandb's other variables are respected too |
| `MLFLOW_TRACKING_URI` | the MLflow store, where `tracking_uri` is not set; without both, `mlruns` in `output_dir` |
| `TUNESMITH_STORAGE` | where LoRA checkpoints are forwarded to; else `ANYSCALE_ARTIFACT_STORAGE`, else `output_dir` |
| `TUNESMITH_CACHE` | converted models and token caches; without it `tunesmith` in `XDG_CACHE_HOME` or `~/.cache` |
| `TUNESMITH_SIGNING_KEY`, `TUNESMITH_VERIFY_KEY` | PEM files: signs each manifest; refuses what is not signed so |
| `RAY_ADDRESS` | the Ray cluster of `num_devices` above 1, and of `submit` and `jobs` where `--address` is not given |
| `HF_HUB_OFFLINE` | `1`: hub models come from the local cache only |
"""
