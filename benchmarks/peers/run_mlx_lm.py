"""Peer: mlx-lm, through its training function. Its loss is on one span of a row, so rows need a single answer.

Full-parameter training here means every weight, as it does for the others; mlx-lm's command would leave the
embeddings as they are. Like LitGPT it follows the mean of its micro-batches' mean losses. The wheel of its CPU
build brings the reference BLAS, which is far slower than a tuned one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from meter import IGNORED, Job, Meter, read_job
from mlx_lm import load
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

_PAD_TO = 32  # as mlx-lm's own batches


def answer_span(row: dict[str, Any]) -> tuple[int, int]:
    """First and last trained token of a row, both included."""
    trained = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
    if trained[-1] - trained[0] + 1 != len(trained):
        raise SystemExit("mlx-lm cannot train several answers of a row")
    return trained[0], trained[-1]


def batches(job: Job, meter: Meter) -> Iterator[tuple[Any, Any]]:
    """Micro-batches in the job's order; asking for one means that the one before has been computed."""
    rows = job.read_rows()
    for number, start in enumerate(range(0, len(rows), job.micro_batch)):
        if number and number % job.accumulation == 0:
            meter.end_step()
        chosen = rows[start : start + job.micro_batch]
        longest = max(len(row["ids"]) for row in chosen)
        batch = np.zeros((len(chosen), 1 + _PAD_TO * -(-longest // _PAD_TO)), np.int32)
        for place, row in enumerate(chosen):
            batch[place, : len(row["ids"])] = row["ids"]
        spans = [answer_span(row) for row in chosen]
        meter.begin_micro_batch(
            sum(len(row["ids"]) for row in chosen), sum(last - first + 1 for first, last in spans)
        )
        yield mx.array(batch), mx.array(spans)
    meter.end_step()


def missing_settings(job: Job) -> dict[str, Any]:
    """Settings that transformers 5 writes in a place where mlx-lm does not look for them."""
    config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    return {"rope_theta": theta} if theta and "rope_theta" not in config else {}


class Losses:
    """Hands mlx-lm's reported losses, one a micro-batch, to the meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        self.meter.micro_batch_loss(report["train_loss"])

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        """There are no validation rows."""


def main() -> None:
    """Train as the job says."""
    job = read_job()
    meter = Meter(job)
    mx.random.seed(job.seed)
    model, _ = load(job.model, model_config=missing_settings(job))
    if job.method == "lora":
        model.freeze()
        groups = {"self_attn": "qkvo", "mlp": "gud"}
        keys = [f"{group}.{t}" for t in job.targets for group, first in groups.items() if t[0] in first]
        adapter = {"rank": job.rank, "scale": job.alpha / job.rank, "dropout": job.dropout, "keys": keys}
        linear_to_lora_layers(model, len(model.layers), adapter)
    else:
        model.unfreeze()
    train(
        model=model,
        optimizer=optimizers.AdamW(learning_rate=job.learning_rate, weight_decay=0.0),
        train_dataset=None,
        args=TrainingArgs(
            batch_size=job.micro_batch,
            iters=job.steps * job.accumulation + 1,  # one more: asking for it ends the last step
            steps_per_report=1,
            steps_per_save=10**6,
            adapter_file=str(Path(job.scratch) / "adapters.safetensors"),
            grad_accumulation_steps=job.accumulation,
        ),
        iterate_batches=lambda **_: batches(job, meter),
        training_callback=Losses(meter),
    )


if __name__ == "__main__":
    main()
