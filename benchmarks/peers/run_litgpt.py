"""Peer: LitGPT, through the functions behind ``litgpt finetune_lora`` and ``litgpt finetune_full``.

Its learning rate is a cosine with at least one step of warm-up, which changes no step's duration. It follows the
mean of its micro-batches' mean losses, not the mean over the step's trained tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.finetune import full, lora
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from meter import IGNORED, Job, Meter, read_job
from torch.utils.data import DataLoader

# Names under which LitGPT knows the architecture of a model that goes by another name here.
_ARCHITECTURES = {"smollm2-135m-instruct-q4": "SmolLM2-135M-Instruct"}


class MeasurementDone(Exception):
    """All steps have been measured; what LitGPT does behind them is not wanted."""


class GivenRows(DataModule):
    """The job's rows as LitGPT's data. The loader asks for a batch when the one before has been computed."""

    def __init__(self, job: Job, meter: Meter) -> None:
        self.job, self.meter, self.micro_batches = job, meter, 0
        self.prompt_style = Default()
        self.rows = [_item(row) for row in job.read_rows()]

    def connect(self, *_: Any, **__: Any) -> None:
        """Nothing is tokenised here."""

    def train_dataloader(self) -> Any:
        # One micro-batch more than is trained: asking for it ends the last step.
        rows = [*self.rows, *self.rows[: self.job.micro_batch]]
        return DataLoader(rows, batch_size=self.job.micro_batch, collate_fn=self._next)

    def val_dataloader(self) -> Any:
        # LitGPT wants one for its check of settings before it trains.
        shortest = min(self.rows, key=lambda row: len(row["input_ids"]))
        return DataLoader([shortest], collate_fn=_padded)

    def _next(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.micro_batches and self.micro_batches % self.job.accumulation == 0:
            self.meter.end_step()
        if self.micro_batches == self.job.steps * self.job.accumulation:
            raise MeasurementDone
        self.micro_batches += 1
        trained = sum(int((row["labels"] != IGNORED).sum()) for row in rows)
        self.meter.begin_micro_batch(sum(len(row["input_ids"]) for row in rows), trained)
        return _padded(rows)


def _item(row: dict[str, Any]) -> dict[str, Any]:
    counts = {"raw": len(row["ids"]), "raw_plus_prompt_template": len(row["ids"])}
    return {
        "input_ids": torch.tensor(row["ids"]),
        "labels": torch.tensor(row["labels"]),
        "token_counts": counts,
    }


def _padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def pad(key: str, value: int) -> torch.Tensor:
        tensors = [row[key] for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    counts = {
        key: torch.tensor([row["token_counts"][key] for row in rows]) for key in rows[0]["token_counts"]
    }
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORED), "token_counts": counts}


def converted(job: Job) -> Path:
    """The model in LitGPT's format, made once."""
    folder = Path(job.cache) / Path(job.model).name
    if not (folder / "lit_model.pth").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(job.model).iterdir():
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file.resolve())
        name = _ARCHITECTURES.get(job.model_name, Path(job.model_name).name)
        convert_hf_checkpoint(checkpoint_dir=folder, model_name=name)
    return folder


def _metered_loss(loss_function: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    def loss(*arguments: Any, **options: Any) -> Any:
        value = loss_function(*arguments, **options)
        if meter.has_begun:  # not the check of settings
            meter.micro_batch_loss(float(value.detach()))
        return value

    return loss


def main() -> None:
    """Train as the job says."""
    job = read_job()
    meter = Meter(job)
    recipe = lora if job.method == "lora" else full
    recipe.chunked_cross_entropy = _metered_loss(recipe.chunked_cross_entropy, meter)
    adapter: dict[str, Any] = {
        f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")
    }
    adapter |= {"lora_r": job.rank, "lora_alpha": job.alpha, "lora_dropout": job.dropout}
    try:
        recipe.setup(
            checkpoint_dir=converted(job),
            out_dir=Path(job.scratch) / "output",
            precision="32-true",
            data=GivenRows(job, meter),
            train=TrainArgs(
                global_batch_size=job.rows_per_step,
                micro_batch_size=job.micro_batch,
                epochs=1,
                max_steps=job.steps + 1,
                lr_warmup_steps=1,
                save_interval=10**6,
                log_interval=1,
            ),
            eval=EvalArgs(
                interval=10**6,
                initial_validation=False,
                final_validation=False,
                max_iters=1,
                max_new_tokens=1,
            ),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": job.learning_rate, "weight_decay": 0.0},
            },
            seed=job.seed,
            **(adapter if job.method == "lora" else {}),
        )
    except MeasurementDone:
        return
    raise SystemExit("LitGPT ended before all steps were measured")


if __name__ == "__main__":
    main()
