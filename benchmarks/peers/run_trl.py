"""Peer: TRL ``SFTTrainer``, with PEFT for LoRA, set up as for this CPU: float32, no gradient checkpointing."""

import torch
from datasets import Dataset
from hf_metering import StepEnds, metered
from meter import Meter, read_job
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train as the job says, on the given token ids and labels."""
    job = read_job()
    meter = Meter(job)
    set_seed(job.seed)
    rows = [{"input_ids": row["ids"], "labels": row["labels"]} for row in job.read_rows()]
    adapter = LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules=list(job.targets),
        task_type="CAUSAL_LM",
    )
    settings = SFTConfig(
        output_dir=job.scratch,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.steps,
        max_length=None,
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
    trainer = metered(SFTTrainer, meter)(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter if job.method == "lora" else None,
        callbacks=[StepEnds(meter)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
