"""Peer: transformers ``Trainer``, with PEFT for LoRA."""

from typing import Any

import torch
from hf_metering import StepEnds, adapter_settings, cpu_settings, metered
from meter import Meter, read_job
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main() -> None:
    """Train as the job says."""
    job = read_job()
    meter = Meter(job)
    set_seed(job.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    if job.method == "lora":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(**adapter_settings(job))
        model = get_peft_model(model, adapter)
    rows = [
        {"input_ids": row["ids"], "attention_mask": [1] * len(row["ids"]), "labels": row["labels"]}
        for row in job.read_rows()
    ]
    settings = TrainingArguments(**cpu_settings(job))
    trainer = metered(Trainer, meter)(
        model=model,
        args=settings,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job.model)),
        callbacks=[StepEnds(meter)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
