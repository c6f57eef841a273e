"""Peer: LLaMA-Factory, through the function behind its command line."""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from hf_metering import StepEnds, metered
from meter import Job, Meter, read_job


def allow_missing_torchaudio() -> None:
    """LLaMA-Factory imports torchaudio, which it uses for rows with sound only; here there may be no usable one."""
    if importlib.util.find_spec("torchaudio") is None:
        empty = types.ModuleType("torchaudio")
        empty.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = empty


def save_tokenized(job: Job) -> Path:
    """The job's token ids and labels in the form that LLaMA-Factory loads instead of tokenising."""
    rows = [
        {"input_ids": row["ids"], "attention_mask": [1] * len(row["ids"]), "labels": row["labels"]}
        for row in job.read_rows()
    ]
    folder = Path(job.scratch) / "tokenized"
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder))
    return folder


def arguments(job: Job, tokenized: Path) -> dict[str, Any]:
    """LLaMA-Factory's own settings."""
    settings: dict[str, Any] = {
        "model_name_or_path": job.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": job.method,
        "template": "default",  # the rows are tokens already
        "dataset": "given",
        "tokenized_path": str(tokenized),
        "output_dir": str(Path(job.scratch) / "output"),
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
    }
    if job.method == "lora":
        settings |= {"lora_rank": job.rank, "lora_alpha": job.alpha, "lora_dropout": job.dropout}
        settings["lora_target"] = ",".join(job.targets)
    return settings


def main() -> None:
    """Train as the job says."""
    allow_missing_torchaudio()
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    job = read_job()
    meter = Meter(job)
    workflow.CustomSeq2SeqTrainer = metered(workflow.CustomSeq2SeqTrainer, meter)
    run_exp(arguments(job, save_tokenized(job)), callbacks=[StepEnds(meter)])


if __name__ == "__main__":
    main()
