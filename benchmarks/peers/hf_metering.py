"""What the runners of a transformers ``Trainer``, or any class derived from it, share: settings and metering."""

from typing import Any

from meter import IGNORED, Job, Meter
from transformers import TrainerCallback


def adapter_settings(job: Job) -> dict[str, Any]:
    """PEFT's ``LoraConfig`` as the job asks for it."""
    return {
        "r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": job.dropout,
        "target_modules": list(job.targets),
        "task_type": "CAUSAL_LM",
    }


def step_settings(job: Job) -> dict[str, Any]:
    """``TrainingArguments`` that say what a step is, and keep everything but training out of the run."""
    return {
        "output_dir": job.scratch,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def cpu_settings(job: Job) -> dict[str, Any]:
    """Those of ``step_settings``, and the best for this CPU: float32, no gradient checkpointing, rows in order."""
    return step_settings(job) | {
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": job.seed,
    }


def metered(trainer_class: Any, meter: Meter) -> Any:
    """``trainer_class`` with a count of the tokens that go into each micro-batch."""

    class Metered(trainer_class):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            labels = inputs["labels"]
            # A collator that concatenates rows gives no mask: then there is no padding either.
            mask = inputs.get("attention_mask")
            real = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            meter.begin_micro_batch(real, int((labels != IGNORED).sum()))
            return super().training_step(model, inputs, *rest, **options)

    return Metered


class StepEnds(TrainerCallback):
    """Tells the meter of the end of each step, and of the loss that the Trainer logs for it."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.end_step()

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.meter.step_loss(float(logs["loss"]))
