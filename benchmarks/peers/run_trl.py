"""Peer: TRL ``SFTTrainer``, with PEFT for LoRA, set up as for this CPU: float32, no gradient checkpointing."""

import torch
from datasets import Dataset
from hf_metering import StepEnds, adapter_settings, cpu_settings, metered
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
    adapter = LoraConfig(**adapter_settings(job))
    settings = SFTConfig(max_length=None, **cpu_settings(job))
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
