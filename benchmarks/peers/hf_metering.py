"""Metering of a transformers ``Trainer`` or any class derived from it."""

from typing import Any

from meter import IGNORED, Meter
from transformers import TrainerCallback


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
