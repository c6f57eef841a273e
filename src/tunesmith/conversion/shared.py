"""What several tools say in like ways: epochs, schedules, saving, tracking, data, number formats."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from tunesmith.config.schema import FLAT_SECTIONS
from tunesmith.conversion.sheet import OFF, Handler, Sheet, flag, number
from tunesmith.errors import shown_value

_SCHEDULERS = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_torch_xla", "adamw_apex_fused")
_TRACKERS = ("wandb", "mlflow", "tensorboard")
_OTHER_FORMS = (".parquet", ".arrow", ".csv", ".tsv", ".txt", ".zip", ".zst")
ROWS = 'rows of `{"messages": [...]}` or `{"text": ...}`, one a line (docs/data.md)'
CHATML: Mapping[str, Any] = {
    "system": "<|im_start|>system\n{instruction}<|im_end|>\n",
    "user": "<|im_start|>user\n{instruction}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
    "trailing_assistant": "<|im_start|>assistant\n",
    "strip_whitespace": False,
}


def knows(setting: str) -> bool:
    """Whether our files have this setting at the top."""
    return any(setting in section.model_fields for section in FLAT_SECTIONS.values())


def rate(sheet: Sheet, key: str, value: Any) -> None:
    """The peak learning rate."""
    found = sheet.read(key, value, "number")
    if found is None:
        return
    if found > 0:
        sheet.carry(key, {"learning_rate": float(found)})
    else:
        sheet.fault(key, f"is {shown_value(value)}; it should be above 0", "change the value")


def at_least_0(setting: str) -> Handler:
    """A number that must not be negative."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        found = sheet.read(key, value, "number")
        if found is None:
            return
        if found >= 0:
            sheet.carry(key, {setting: float(found)})
        else:
            sheet.fault(key, f"is {shown_value(value)}; it should be at least 0", "change the value")

    return handle


def weight_decay(sheet: Sheet, key: str, value: Any) -> None:
    """Decay; transformers' trainer leaves norms and biases out of it, which an adapter does not have."""
    at_least_0("optimizer.weight_decay")(sheet, key, value)
    if (number(value) or 0) > 0 and not sheet.trains_lora:
        sheet.lose(key, "norms and biases do not decay", "the value is written; every weight decays")


def epochs(epochs_key: str, steps_key: str) -> dict[str, Handler]:
    """Length of the run; a positive number of steps wins over epochs, as there."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        steps = number(sheet.get(steps_key)) or 0
        if key == steps_key:
            if steps <= 0:
                sheet.pass_over(key, "off")
            elif steps_value := sheet.read(key, value, "count"):
                sheet.carry(key, {"min_update_steps": steps_value})
                sheet.lose(
                    key,
                    f"the run ends at step {steps_value}",
                    f"runs have whole epochs; min_update_steps {steps_value} is written: the run ends with the epoch "
                    "in which that step falls",
                )
            return
        if steps > 0:
            sheet.pass_over(key, f"{steps_key} wins over it")
            return
        found = sheet.read(key, value, "number")
        if found is None:
            return
        if found <= 0:
            sheet.fault(key, f"is {shown_value(value)}; it should be above 0", "change the value")
            return
        whole = math.ceil(found)
        sheet.carry(key, {"num_epochs": whole})
        if whole != found:
            sheet.lose(key, f"{found:g} epochs", f"runs have whole epochs; num_epochs {whole} is written")

    return {epochs_key: handle, steps_key: handle}


def scheduler(kind_key: str) -> dict[str, Handler]:
    """How the learning rate goes; ``constant`` has no warm-up there, whatever the warm-up keys say."""

    def kind(sheet: Sheet, key: str, value: Any) -> None:
        if isinstance(value, str) and value in _SCHEDULERS:
            sheet.carry(key, {"lr_scheduler_type": _SCHEDULERS[value]})
        else:
            sheet.lose(
                key,
                f"the learning rate follows the schedule {shown_value(value)}",
                "cosine, linear and constant; cosine",
            )

    def warmup(sheet: Sheet, key: str, value: Any) -> None:
        found = sheet.read(key, value, "number")
        if found is None:
            return
        if sheet.get(kind_key) == "constant":
            sheet.carry(key, {"num_warmup_steps": 0}, "a constant schedule has no warm-up there")
        elif found < 0:
            sheet.fault(key, f"is {shown_value(value)}; it should be at least 0", "change the value")
        elif key == "warmup_ratio" and sheet.is_given("warmup_steps") and number(sheet.get("warmup_steps")):
            sheet.pass_over(key, "warmup_steps wins over it")
        elif key == "warmup_steps" and found == 0 and number(sheet.get("warmup_ratio")):
            sheet.pass_over(key, "warmup_ratio says it")
        elif found == int(found) and (found == 0 or key == "warmup_steps"):
            sheet.carry(key, {"num_warmup_steps": int(found)})
        else:
            sheet.lose(
                key,
                "warm-up as a share of the run's steps",
                "num_warmup_steps, a number; `tunesmith check` prints how many steps the run has",
            )

    return {kind_key: kind, "warmup_steps": warmup, "warmup_ratio": warmup}


def optimizer(sheet: Sheet, key: str, value: Any) -> None:
    """Names of AdamW; other optimizers, and those with 8-bit state, are not there."""
    if value in _ADAMW:
        sheet.pass_over(key, "AdamW is the optimizer here")
    else:
        sheet.lose(key, f"the optimizer {shown_value(value)}", "AdamW with float32 state")


def betas(sheet: Sheet, key: str, _value: Any) -> None:
    """The two moments' decays are one setting here."""
    pair = []
    for name, usual in (("adam_beta1", 0.9), ("adam_beta2", 0.999)):
        given = sheet.get(name)
        found = usual if given is None else number(given)
        if found is None or not 0 <= found < 1:
            sheet.fault(
                name,
                f"is {shown_value(given)}; it should be a number, at least 0 and below 1",
                "change the value",
            )
            return
        pair.append(float(found))
    sheet.carry(key, {"optimizer.adam_betas": pair})


def numbers(bf16: Sequence[str], fp16: Sequence[str]) -> dict[str, Handler]:
    """Number formats: bfloat16 is ``precision``; float16 is not there."""

    def half(sheet: Sheet, key: str, value: Any) -> None:
        if value == "auto":
            sheet.carry(key, {"precision": "auto"})
            return
        if value == "full":  # Axolotl's word for evaluating in it too
            sheet.carry(key, {"precision": "bf16"})
            return
        is_on = sheet.read(key, value, "flag")
        if is_on:
            sheet.carry(key, {"precision": "bf16"})
        elif is_on is not None:
            sheet.pass_over(key, "off")

    means = "matrix products in float16"
    return {**dict.fromkeys(bf16, half), **lost_flags(fp16, means, "precision auto, fp32 or bf16")}


def lost_flags(names: Sequence[str], means: str, nearest: str) -> dict[str, Handler]:
    """Switches that cannot be carried where they are on."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if value in OFF or flag(value) is False or value == "auto":
            sheet.pass_over(key, "off")
        else:
            sheet.lose(key, means, nearest)

    return dict.fromkeys(names, handle)


def checkpointing(sheet: Sheet, key: str, value: Any) -> None:
    """Activations computed again; elsewhere also moved to other memory."""
    is_on = flag(value)
    if is_on is not None:
        sheet.carry(key, {"gradient_checkpointing": is_on})
        return
    sheet.carry(key, {"gradient_checkpointing": True})
    sheet.lose(key, f"saved activations are kept as {shown_value(value)} says", "they are computed again")


def switch(setting: str) -> Handler:
    """A speed switch of ours, which is said to have no effect here."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if value == "auto":
            sheet.pass_over(key, "chosen here")
            return
        is_on = sheet.read(key, value, "flag")
        if is_on is not None:
            sheet.carry(key, {setting: is_on})

    return handle


def schedule(sheet: Sheet, key: str, _value: Any) -> None:
    """When to save and to evaluate: two schedules there, one here. Called for each of their keys."""
    saves, evaluates = _interval(sheet, "save"), _interval(sheet, "eval")
    chosen = evaluates or saves
    if key.startswith("save"):
        wanted, ours = saves, "checkpoint_and_evaluation_frequency, which saves and evaluates at once"
    else:
        wanted, ours = evaluates, "checkpoint_and_evaluation_frequency, which evaluates and saves at once"
    if wanted is None:
        per_run = sheet.get(key) in (*OFF, "no") or _strategy(sheet, key[:4]) == "no"
        if per_run:
            sheet.pass_over(key, "not during the run")
        else:
            sheet.lose(
                key, "a schedule that is no number of steps or epochs", f"{ours}: every n steps or epochs"
            )
        return
    if wanted != chosen:
        sheet.lose(
            key,
            f"every {wanted[1]} {wanted[0]}",
            f"{ours}: every {chosen[1]} {chosen[0]}" if chosen else ours,
        )
        return
    unit, frequency = wanted
    group = "checkpoint_and_evaluation_frequency"
    sheet.carry(key, {f"{group}.unit": unit, f"{group}.frequency": frequency})


def _interval(sheet: Sheet, what: str) -> tuple[str, int] | None:
    """(unit, frequency) of saving or evaluating; None: never, or as no number of steps or epochs."""
    strategy = _strategy(sheet, what)
    if strategy == "no":
        return None
    if strategy == "epoch" or sheet.get(f"{what}s_per_epoch") == 1:
        return "epochs", 1
    steps = number(sheet.get(f"{what}_steps"))
    if (what, strategy) == ("eval", "steps") and not sheet.is_given("eval_steps"):
        # As transformers' trainer takes it.
        steps = number(sheet.get("logging_steps")) if sheet.is_given("logging_steps") else steps
    if strategy in (None, "steps") and steps is not None and steps >= 1 and steps == int(steps):
        return "steps", int(steps)
    return None


def _strategy(sheet: Sheet, what: str) -> Any:
    """``save_strategy`` or ``eval_strategy``, the latter also under its older name."""
    if what == "eval" and not sheet.is_given("eval_strategy") and sheet.is_given("evaluation_strategy"):
        return sheet.get("evaluation_strategy")
    return sheet.get(f"{what}_strategy")


SCHEDULE_KEYS: Mapping[str, Handler] = dict.fromkeys(
    ("save_strategy", "save_steps", "eval_strategy", "evaluation_strategy", "eval_steps"), schedule
)


def best_metric(sheet: Sheet, key: str, value: Any) -> None:
    """Which checkpoint is the best."""
    if value in ("loss", "eval_loss"):
        sheet.carry(key, {"best_metric": "eval_loss"})
    else:
        sheet.lose(
            key, f"the best checkpoint has the best {shown_value(value)}", "eval_loss, or evaluation.metric"
        )


def trackers(sheet: Sheet, key: str, value: Any) -> None:
    """``report_to``: one tracker here."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    known = [name for name in names if name in _TRACKERS]
    if known:
        sheet.carry(key, {"logger.provider": known[0]})
    elif all(name in ("none", "all") for name in names):
        sheet.pass_over(key, "console and metrics.jsonl; W&B too where WANDB_API_KEY is set")
        return
    others = [shown_value(name) for name in names if name not in (*known[:1], "none", "all")]
    if others:
        sheet.lose(key, f"also tracks with {', '.join(others)}", "one of wandb, mlflow and tensorboard")


def tracker_setting(setting: str) -> Handler:
    """A tracker's setting; without a tracker it says nothing."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        reports = sheet.get("report_to")
        names = reports if isinstance(reports, list) else [reports]
        if any(name in _TRACKERS for name in names):
            found = sheet.read(key, value, "text")
            if found is not None:
                sheet.carry(key, {f"logger.provider_config.{setting}": found})
        else:
            sheet.pass_over(key, "no tracker is named")

    return handle


def deepspeed(sheet: Sheet, key: str, value: Any) -> None:
    """A DeepSpeed file by its path."""
    if isinstance(value, str) and value.strip() and knows("deepspeed"):
        sheet.carry(key, {"deepspeed.config_path": value})
    else:
        sheet.lose(
            key, "how a run is spread over GPUs", "deepspeed_configs/ has presets for deepspeed.config_path"
        )


def length(sheet: Sheet, key: str, value: Any, on_too_long: str) -> None:
    """The longest row, and what happens to longer ones; positions are not scaled unless that is asked for."""
    found = sheet.read(key, value, "count")
    if found is None:
        return
    sheet.carry(key, {"context_length": found})
    sheet.carry(key, {"on_too_long": on_too_long}, "as there")
    if not sheet.is_given("rope_scaling"):
        sheet.carry(key, {"embedding_scaling_technique": "none"}, "positions are not scaled there")


def rope(sheet: Sheet, key: str, value: Any) -> None:
    """Positions beyond the model's own length."""
    kind = value.get("type", value.get("rope_type")) if isinstance(value, dict) else value
    if kind == "linear":
        sheet.carry(
            key, {"embedding_scaling_technique": "linear"}, "by context_length over the model's own length"
        )
    else:
        sheet.carry(key, {"embedding_scaling_technique": "linear"})
        sheet.lose(
            key,
            f"positions are scaled as {shown_value(kind)}",
            "embedding_scaling_technique linear is written",
        )


def data_path(sheet: Sheet, key: str, path: str, setting: str, form: str | None) -> None:
    """A data set by its path or hub name.

    ``form`` describes its rows where they are not ours; None: they are, as far as the file tells.
    """
    is_file = PurePosixPath(path).suffix in (".jsonl", ".json", ".gz") or "://" in path or "*" in path
    is_folder = path.startswith(("./", "../", "/", "~/")) or path.endswith("/")
    if is_file or is_folder:
        sheet.carry(key, {setting: path})
    else:
        name = f"{PurePosixPath(path).name or 'rows'}.jsonl"
        sheet.carry(key, {setting: name}, "does not exist yet; see below")
        nearest = f"a file; {setting} {name} is written, for you to make of it: {ROWS}"
        sheet.lose(key, f"the data set {shown_value(path)}", nearest)
        return
    if form is not None:
        sheet.lose(key, form, f"{ROWS}; the file has to be rewritten")
    elif PurePosixPath(path).suffix in _OTHER_FORMS:
        sheet.lose(key, f"a {PurePosixPath(path).suffix} file", f"{ROWS}; the file has to be rewritten")
    elif path.endswith(".json"):
        sheet.lose(key, "a JSON file, which may be one list", ROWS)


def chat_template(sheet: Sheet, key: str, value: Any, own: Sequence[str], system_key: str) -> None:
    """A chat template by name: the model's own, ChatML, or one that is not there."""
    if value in own:
        sheet.pass_over(key, "the model's own chat template is used")
        return
    if value != "chatml":
        sheet.lose(
            key,
            f"chats become text by the template {shown_value(value)}",
            "the model's own chat template, or generation_config.prompt_format",
        )
        return
    format_ = dict(CHATML)
    system = sheet.get(system_key)
    if isinstance(system, str) and system:
        format_["default_system_message"] = system
    ends = ["<|im_end|>"]
    group = "generation_config"
    sheet.carry(key, {f"{group}.prompt_format": format_, f"{group}.stopping_sequences": ends})


def default_system(template_key: str) -> Handler:
    """The system text of rows that have none; it needs a prompt format."""

    def handle(sheet: Sheet, key: str, value: Any) -> None:
        if sheet.get(template_key) == "chatml" and isinstance(value, str):
            sheet.pass_over(key, "it is in generation_config.prompt_format")
        else:
            sheet.lose(
                key,
                "the system text of rows that have none",
                "generation_config.prompt_format.default_system_message, or a system message in each row",
            )

    return handle
