"""A file of another tool, converted and trained, by the commands a user gives."""

from pathlib import Path

import pytest

import flow_parts
from tunesmith.cli import main

pytestmark = pytest.mark.flow

FILES = {
    "axolotl": """\
base_model: {model}
datasets: [{{path: {rows}/train.jsonl, type: chat_template}}]
test_datasets: [{{path: {rows}/valid.jsonl, type: chat_template}}]
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
sequence_len: 128
micro_batch_size: 5
gradient_accumulation_steps: 2
num_epochs: 1
learning_rate: 0.001
warmup_steps: 0
output_dir: {out}
""",
    "llamafactory": """\
model_name_or_path: {model}
stage: sft
finetuning_type: full
dataset_dir: {rows}
dataset: train.jsonl
eval_dataset: valid.jsonl
cutoff_len: 128
per_device_train_batch_size: 10
num_train_epochs: 1.0
output_dir: {out}
""",
    "trl": """\
model_name_or_path: {model}
dataset_name: {rows}/train.jsonl
use_peft: true
assistant_only_loss: true
max_length: 128
per_device_train_batch_size: 10
num_train_epochs: 1
output_dir: {out}
""",
}


@pytest.mark.parametrize("tool", FILES)
def test_a_converted_file_trains(tmp_path: Path, tiny: Path, rows: Path, tool: str) -> None:
    out = tmp_path / "outputs"
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(FILES[tool].format(model=tiny, rows=rows, out=out), encoding="utf-8")
    assert main(["convert", str(theirs), "-o", str(ours)]) == 0
    assert main(["finetune", str(ours)]) == 0
    (run,) = flow_parts.runs_in(out)
    report = flow_parts.report(run)
    assert (report["steps"], report["rows"]) == (2, 20)  # 20 rows, 10 a step
    assert report["method"] == ("full" if tool == "llamafactory" else "lora")
    assert report["task"] == "instruction_tuning"
