"""What is planned from memory: the budget that fits, the refusal, and a prediction against a real process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiny_models import tiny_model
from tunesmith import memory_plan
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import RunError
from tunesmith.free_memory import available_bytes, resident_bytes
from tunesmith.memory_plan import TOKEN_BUDGETS, plan_memory
from tunesmith.models.kernels.reading import read_decoder
from tunesmith.planning.nearest import Beside


def rows(count: int, length: int) -> TokenizedRows:
    ids = np.random.default_rng(0).integers(3, 400, count * length).astype(np.int32)
    return TokenizedRows(
        "rows", "0" * 64, ids, np.tile(np.arange(length) > 3, count), np.arange(count + 1) * length, ("rows",),
        np.zeros(count, np.int32), np.arange(count, dtype=np.int32),
    )  # fmt: skip


def test_less_memory_gives_smaller_micro_batches_and_too_little_is_refused(monkeypatch: pytest.MonkeyPatch):
    decoder, data = read_decoder(tiny_model()), rows(64, 50)
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 10**9)
    budgets, needed = [], []
    for free in (None, 4_000_000, 1_500_000):
        monkeypatch.setattr(memory_plan, "available_bytes", lambda free=free: free)
        plan = plan_memory(decoder, data, 32, 0, 1000)
        budgets.append(plan.token_budget)
        needed.append(plan.peak_bytes)
    assert budgets[0] == TOKEN_BUDGETS[0]
    assert budgets == sorted(budgets, reverse=True)
    assert len(set(budgets)) == 3
    assert needed == sorted(needed, reverse=True)
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: 10_000)
    with pytest.raises(RunError, match="gradient_checkpointing"):
        plan_memory(decoder, data, 32, 0, 1000)


def test_evaluation_never_has_more_tokens_at_once_than_training():
    """A step of few short rows is far below the budget; held-out rows would fill it, and take what nobody counted."""
    decoder, data = read_decoder(tiny_model()), rows(64, 50)
    plan = plan_memory(decoder, data, 4, 0, 1000)
    assert plan.token_budget == TOKEN_BUDGETS[0]
    assert plan.evaluation_budget == 4 * 49  # the last token of a row predicts nothing
    shorter = plan_memory(decoder, data, 4, 0, 1000, beside=Beside(evaluated=49, predicted=46))
    assert shorter.evaluation_budget == plan.evaluation_budget
    state = {"x 0": 196 * 32}  # the tiny model's width; training reads its first layer's input elsewhere
    assert shorter.buffers == {**plan.buffers, **state}
    longer = plan_memory(decoder, data, 4, 0, 1000, beside=Beside(evaluated=700, predicted=90))
    assert longer.evaluation_budget == 700
    # One layer after the other is evaluated, in buffers as long as the longest; no other grows.
    assert longer.buffers["qkv 0"] * 196 == plan.buffers["qkv 0"] * 700
    assert longer.buffers["qkv 1"] == plan.buffers["qkv 1"]
    assert longer.buffers["logits"] == plan.buffers["logits"]


def test_what_the_system_tells():
    assert 20e6 < resident_bytes() < 100e9
    free = available_bytes()
    assert free is None or free > 10e6


def test_a_containers_limit_counts_without_its_cached_files(tmp_path: Path):
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:  9000 kB\nMemAvailable:    8000 kB\nHugePages_Total: 0\n"
    )
    assert available_bytes(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4900000\n")
    (group / "memory.stat").write_text("anon 900000\nfile 4000000\nfile_mapped 10\n")
    assert available_bytes(tmp_path) == 4_100_000
    # Files in memory are counted among them, and nothing makes way for anything: an object store in /dev/shm, say.
    (group / "memory.stat").write_text("anon 900000\nfile 4000000\nshmem 3000000\n")
    assert available_bytes(tmp_path) == 1_100_000


PROCESS = """
import sys, time, torch
sys.path[:0] = {folders!r}
from transformers import LlamaConfig, AutoModelForCausalLM
from test_memory_plan import rows
from tunesmith.memory_plan import plan_memory
from tunesmith.models.batches import packed_batches
from tunesmith.models.kernels.reading import read_decoder
from tunesmith.models.passes import KernelPasses
from tunesmith.training.loop import peak_memory_bytes, train_steps
from tunesmith.training.optim import adamw
from tunesmith.training.schedule import plan_steps

model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=8000, hidden_size=256, intermediate_size=768,
    num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2), dtype=torch.float32)
data, parameters = rows(48, 120), list(model.parameters())
plan = plan_memory(read_decoder(model), data, 16, 0, sum(p.nbytes for p in parameters))
for _ in train_steps(KernelPasses(model), parameters, data, plan_steps(48, 16, 1, 1),
        adamw(parameters, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.0), learning_rate_at=lambda step: 1e-4,
        max_grad_norm=1.0, micro_batches=packed_batches(plan.token_budget, torch.device("cpu")), seed=0,
        started=time.perf_counter()):
    pass
print(plan.peak_bytes, peak_memory_bytes())
"""


def test_the_predicted_peak_is_that_of_a_real_process():
    here = Path(__file__).parent
    code = PROCESS.format(folders=[str(here), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    predicted, measured = map(int, done.stdout.split()[-2:])
    assert measured < predicted * 1.05
    assert predicted < measured * 1.10


def test_a_row_that_must_fit_is_planned_for(monkeypatch: pytest.MonkeyPatch):
    decoder, data = read_decoder(tiny_model()), rows(64, 50)
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 10**9)
    monkeypatch.setattr(memory_plan, "peak_memory_bytes", lambda: 0)  # of all tests before this one
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: None)
    short = plan_memory(decoder, data, 32, 0, 1000)
    same = plan_memory(decoder, data, 32, 0, 1000, beside=Beside(padded=50))
    longer = plan_memory(decoder, data, 32, 0, 1000, beside=Beside(padded=4000))
    # A row that must fit is counted with its last token, which is only predicted: attention's work for one more key.
    assert same.token_budget == short.token_budget
    assert 0 <= same.peak_bytes - short.peak_bytes < 1000
    assert longer.buffers["x in"] == 4000 * 32  # the tiny model's width
    assert longer.peak_bytes > short.peak_bytes
