"""Peer: TRL ``SFTTrainer`` as it comes: only model, rows, step size, step count and learning rate are given."""

from typing import Any

from datasets import Dataset
from hf_metering import StepEnds, metered, step_settings
from meter import Meter, read_job
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer


def prompt_and_completion(row: dict[str, Any]) -> dict[str, Any]:
    """TRL's form for a loss on the answer only, which is its default for it."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def main() -> None:
    """Train as the job says."""
    job = read_job()
    meter = Meter(job)
    set_seed(job.seed)
    settings = SFTConfig(**step_settings(job))
    trainer = metered(SFTTrainer, meter)(
        model=job.model,
        args=settings,
        train_dataset=Dataset.from_list([prompt_and_completion(row) for row in job.read_rows()]),
        peft_config=LoraConfig() if job.method == "lora" else None,
        callbacks=[StepEnds(meter)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
