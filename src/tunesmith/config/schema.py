"""The flat keys of a tunesmith YAML file, grouped into frozen sections that are typed and checked.

A key is declared once, in the section of the part that it configures, with its type, default and the
reason for that default. ``config/load.py`` puts a file's flat keys into these sections; only ``cli`` and
``run`` unpack them. Everything is strict: text is never taken for a number.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tunesmith.config.yaml_file import UnderscoredInt

PositiveInt = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _underscored(cls, value: Any, info: ValidationInfo) -> Any:
        return _resolved(value, set(_kinds(cls.model_fields[str(info.field_name)].annotation)))


def _resolved(value: Any, kinds: set[Any]) -> Any:
    """``value`` with numbers written with underscores as what is wanted where they stand."""
    if isinstance(value, UnderscoredInt):
        return value.number() if kinds & {int, float} and str not in kinds else str(value)
    if any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds):
        return value  # a group of settings: each decides for itself
    if isinstance(value, Mapping):
        return {name: _resolved(item, kinds) for name, item in value.items()}
    return type(value)(_resolved(item, kinds) for item in value) if isinstance(value, list | tuple) else value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types in an annotation; of a mapping those of its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield Literal
    elif origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin is Mapping:
        yield from _kinds(arguments[-1])
    elif arguments:
        for argument in arguments:
            yield from _kinds(argument)
    else:
        yield annotation


def key(default: Any, reason: str) -> Any:
    """A setting with its default and, for ``--default`` and ``--show``, the reason for it."""
    return Field(default, description=reason)


class PromptFormat(Section):
    """LLMForge's ``prompt_format``: one template string a role, ``{instruction}`` being the text.

    With ``system_in_user`` the user's string has ``{system}``, where the filled system string goes.
    """

    system: str = key("{instruction}", "the text alone")
    user: str = key("{instruction}", "the text alone")
    assistant: str = key("{instruction}", "the text alone")
    trailing_assistant: str = key("", "nothing stands between the last user turn and the answer")
    bos: str = key("", "no text before the conversation")
    default_system_message: str = key("", "no system text where a row has none")
    system_in_user: bool = key(False, "the system text has a turn of its own")
    system_in_last_user: bool = key(False, "with system_in_user, the first user turn carries it")
    add_system_tags_even_if_message_is_empty: bool = key(False, "no tags around nothing")
    strip_whitespace: bool = key(True, "as LLMForge: blanks around a message are not content")

    @field_validator("system", "user", "assistant")
    @classmethod
    def _has_slot(cls, value: str) -> str:
        if value.count("{instruction}") != 1:
            raise ValueError("must contain {instruction} exactly once")
        return value

    @model_validator(mode="after")
    def _system_has_one_place(self) -> Self:
        if self.system_in_user and self.user.count("{system}") != 1:
            raise ValueError("must contain {system} exactly once in user, because system_in_user is true")
        if not self.system_in_user and "{system}" in self.user:
            raise ValueError("must not contain {system} in user unless system_in_user is true")
        if self.system_in_last_user and not self.system_in_user:
            raise ValueError("must not set system_in_last_user without system_in_user")
        return self


class GenerationConfig(Section):
    """How prompts are built and where answers end, in training and in serving alike."""

    prompt_format: PromptFormat | None = key(None, "the model's own chat template")
    stopping_sequences: tuple[str, ...] = key((), "the model's own end-of-turn token")


class RepoId(Section):
    """A checkpoint on the Hugging Face hub."""

    repo_id: str


class LigerKernel(Section):
    """LLMForge's switch for Liger's fused GPU kernels."""

    enabled: bool = key(
        False, "not used: the head and the loss are computed in chunks by functions of our own"
    )
    kwargs: Mapping[str, Any] = key({}, "not used")


class ModelSettings(Section):
    """Which weights are tuned, and how long a row they read."""

    model_id: str = Field(min_length=1, description="the base model: hub id, folder or catalog name")
    initial_base_model_ckpt_path: str | RepoId | None = key(None, "start from the base model's own weights")
    initial_adapter_model_ckpt_path: str | RepoId | None = key(None, "start a fresh adapter")
    context_length: PositiveInt | None = key(None, "the longest row, at most what the model can read")
    embedding_scaling_technique: Literal["none", "linear"] = key(
        "linear", "positions are interpolated where context_length exceeds the model's own (RoPE scaling)"
    )
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "bf16 where the hardware is fast at it, else fp32"
    )
    gradient_checkpointing: bool = key(False, "off: faster; on: saved activations are computed again")
    flash_attention_2: Literal["auto"] | bool = key(
        "auto", "not used: packed rows have attention of their own"
    )
    liger_kernel: LigerKernel = key(LigerKernel(), "not used")
    torch_compile: Literal["auto"] | bool | Mapping[str, Any] = key(
        "auto", "not used: compiling a whole model takes longer than a short run gains"
    )


class DataSettings(Section):
    """The rows, and what is trained in them."""

    train_path: str = Field(min_length=1, description="the rows to learn from")
    valid_path: str | None = key(None, "no validation rows: the newest checkpoint is the best one")
    task: Literal["auto", "causal_lm", "instruction_tuning"] = key(
        "auto", "instruction_tuning if rows have assistant turns, else causal_lm"
    )
    on_too_long: Literal["error", "drop", "truncate"] = key("error", "nothing is cut in silence")
    generation_config: GenerationConfig = key(GenerationConfig(), "the model's own chat template")


class Optimizer(Section):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and gradient clipping."""

    adam_betas: Annotated[tuple[float, float], Field(strict=False)] = key(
        (0.9, 0.999), "AdamW's usual values"
    )
    adam_epsilon: Rate = key(1e-8, "AdamW's usual value")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = key(
        0.0, "short fine-tunings need no decay"
    )
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = key(
        1.0, "one bad batch cannot throw the model off; 0: no clipping"
    )

    @field_validator("adam_betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must hold two numbers, each at least 0 and below 1")
        return value


class OptimizationSettings(Section):
    """How long and how fast to learn."""

    num_epochs: PositiveInt | None = key(None, "enough epochs for min_update_steps")
    min_update_steps: PositiveInt = key(100, "fewer steps seldom change a model")
    learning_rate: Rate | None = key(None, "1e-4 for LoRA, 1e-5 for full-parameter")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = key("cosine", "falls towards 0 over the run")
    num_warmup_steps: Annotated[int, Field(ge=0)] = key(10, "AdamW's moments need some steps to settle")
    optimizer: Optimizer = key(Optimizer(), "AdamW")
    train_batch_size_per_device: PositiveInt | Literal["auto"] = key("auto", "8 rows")
    gradient_accumulation_steps: PositiveInt = key(1, "a step covers one batch")
    padding: Literal["longest", "max_length"] = key(
        "longest",
        "memory is planned for the rows there are; training itself pads nothing where rows are packed",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = key(
        42, "any fixed number: the same file gives the same run"
    )


class Frequency(Section):
    """One schedule on which to evaluate and save."""

    unit: Literal["epochs", "steps"] = key("epochs", "epochs")
    frequency: PositiveInt = key(1, "each")


class Evaluation(Section):
    """Scored generation on held-out rows, before and after the run; on valid_path at each evaluation too where
    best_metric names the metric."""

    metric: str = key("exact_match", "the answer must equal the expected one")
    test_path: str | None = key(None, "the rows of valid_path")
    max_rows: PositiveInt | None = key(None, "all rows")
    max_new_tokens: PositiveInt = key(128, "long enough for most structured answers")


class CheckpointSettings(Section):
    """When to evaluate and save, and what to keep."""

    checkpoint_and_evaluation_frequency: Frequency = key(Frequency(), "after each epoch")
    num_checkpoints_to_keep: PositiveInt = key(1, "the best and the newest")
    best_metric: str = key("eval_loss", "the lowest loss on the validation rows")
    eval_first: bool = key(
        False, "no evaluation before step 1, unless `evaluation` asks for before and after"
    )
    eval_batch_size_per_device: PositiveInt | Literal["auto"] = key("auto", "16 rows")
    evaluation: Evaluation | None = key(None, "loss and perplexity only")


class ForwardCheckpoint(Section):
    """Where the best checkpoint is copied to, for the server."""

    tag: str | None = key(None, "the run's own tag")
    remote_uri: str | None = key(None, "TUNESMITH_STORAGE, else ANYSCALE_ARTIFACT_STORAGE, else output_dir")


class ProviderConfig(Section):
    """Settings of the experiment tracker."""

    project: str | None = key(None, "tunesmith")
    run_name: str | None = key(None, "the run's tag")
    tracking_uri: str | None = key(None, "MLFLOW_TRACKING_URI, else mlruns in output_dir")
    experiment_name: str | None = key(None, "tunesmith")
    create_experiment_if_not_exists: bool = key(True, "a first run should not fail for want of it")


class Logger(Section):
    """An experiment tracker beside the console and metrics.jsonl, which are always on."""

    provider: Literal["wandb", "mlflow", "tensorboard"]
    provider_config: ProviderConfig = key(ProviderConfig(), "the tracker's defaults")


class OutputSettings(Section):
    """Where results go and what they are called."""

    output_dir: str = key("./outputs", "beside where the command was given")
    custom_model_tag: str | None = key(None, "made from model, user and five random letters")
    forward_checkpoint_config: ForwardCheckpoint = key(
        ForwardCheckpoint(), "the storage's lora_fine_tuning folder"
    )
    logger: Logger | None = key(None, "console and metrics.jsonl; W&B too where WANDB_API_KEY is set")


Resource = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DeepSpeed(Section):
    """LLMForge's ``deepspeed`` group; ``config/deepspeed_file.py`` reads what it names."""

    config_path: str = Field(
        min_length=1, description="a DeepSpeed file in JSON, or one of deepspeed_configs/"
    )


class ClusterSettings(Section):
    """Where a run is computed: in this process, or by workers of a Ray cluster."""

    num_devices: PositiveInt = key(1, "this process alone")
    worker_resources: Mapping[str, Resource] = key({}, "a CPU for each worker, or a GPU where there are any")
    trainer_resources: Mapping[str, Resource] = key({}, "nothing beside the workers")
    deepspeed: DeepSpeed | None = key(None, "each worker holds all weights, gradients and optimizer state")


class LoraMethod(Section):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): the file has ``lora_config``.

    ``lora_config`` holds the keys exactly as the file gave them; PEFT's ``LoraConfig`` is their schema, and
    ``models/lora.py`` adds the documented defaults for those left out.
    """

    kind: Literal["lora"] = "lora"
    lora_config: Mapping[str, Any]


class FullMethod(Section):
    """Full-parameter training: the file has no ``lora_config``."""

    kind: Literal["full"] = "full"


Method = LoraMethod | FullMethod


class RunConfig(Section):
    """A whole configuration, frozen. Sections are unpacked at the edge and never passed around whole."""

    model: ModelSettings
    data: DataSettings
    method: Method
    optimization: OptimizationSettings
    checkpoints: CheckpointSettings
    output: OutputSettings
    cluster: ClusterSettings


FLAT_SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "optimization": OptimizationSettings,
    "checkpoints": CheckpointSettings,
    "output": OutputSettings,
    "cluster": ClusterSettings,
}
