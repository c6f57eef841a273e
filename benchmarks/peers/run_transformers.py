"""Peer: transformers ``Trainer``, with PEFT for LoRA."""

from typing import Any

import torch
from hf_metering import StepEnds, metered
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

        adapter = LoraConfig(
            r=job.rank,
            lora_alpha=job.alpha,
            lora_dropout=job.dropout,
            target_modules=list(job.targets),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapter)
    rows = [
        {"input_ids": row["ids"], "attention_mask": [1] * len(row["ids"]), "labels": row["labels"]}
        for row in job.read_rows()
    ]
    settings = TrainingArguments(
        output_dir=job.scratch,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=job.seed,
    )
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
