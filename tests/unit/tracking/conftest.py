"""A small run's events and record, as the loop reports them; the numbers are made up but consistent."""

import dataclasses
import math

import pytest

from tunesmith.tracking.events import (
    CheckpointEvent,
    EpochEvent,
    EvalEvent,
    Event,
    Notice,
    Progress,
    RunFinished,
    RunRecord,
    RunStarted,
    SampleAnswer,
    Score,
    StepEvent,
)

TAG = "smollm2-135m-instruct-q4:annab:qwxyz"


def step_event(step: int, loss: float = 1.0, **changes) -> StepEvent:
    values = {
        "step": step,
        "epoch": 1,
        "learning_rate": 1e-4,
        "train_loss_batch": loss,
        "grad_norm": 0.5,
        "fwd_time": 0.25,
        "bwd_time": 0.5,
        "train_time_per_step": 0.875,
        "real_tokens": 900,
        "trained_tokens": 300,
        "trained_tokens_throughput": 343.0,
        "mfu": None,
        "peak_memory": 3 * 2**29,
        "time_total_s": 0.875 * step,
    }
    return StepEvent(**{**values, **changes})


def eval_event(step: int, loss: float, **changes) -> EvalEvent:
    values = {
        "step": step,
        "epoch": step / 10,
        "eval_loss": loss,
        "perplexity": math.exp(loss),
        "eval_time": 2.0,
    }
    return EvalEvent(**{**values, **changes})


def run_started(**changes) -> RunStarted:
    values = {
        "run": "lora-20260102-030405",
        "tag": TAG,
        "method": "lora",
        "model_id": "smollm2-135m-instruct-q4",
        "task": "instruction_tuning",
        "total_steps": 20,
        "epochs": 2,
        "header": {"method": "LoRA, r 8, alpha 16", "data": "train.jsonl, 160 rows"},
        "config": {"model_id": "smollm2-135m-instruct-q4", "learning_rate": 1e-4, "lora_config": {"r": 8}},
    }
    return RunStarted(**{**values, **changes})


def run_record(**changes) -> RunRecord:
    record = RunRecord(
        run="lora-20260102-030405",
        tag=TAG,
        method="lora",
        model_id="smollm2-135m-instruct-q4",
        task="instruction_tuning",
        status="finished",
        steps=20,
        epochs=2,
        rows=160,
        wall_seconds=65.0,
        seconds_to_first_step=3.5,
        real_tokens=18000,
        trained_tokens=6000,
        real_tokens_per_second=1028.0,
        trained_tokens_per_second=343.0,
        peak_rss_bytes=3 * 2**29,
        predicted_peak_rss_bytes=2**31,
        trainable_parameters=2_500_000,
        total_parameters=137_000_000,
        checkpoint_bytes=5 * 2**20,
        best_checkpoint="outputs/lora-20260102-030405/best",
        eval_loss=0.5,
        perplexity=math.exp(0.5),
        before=Score(50, 2.0, math.exp(2.0), "exact_match", 0.1, (0.04, 0.22)),
        after=Score(50, 0.5, math.exp(0.5), "exact_match", 0.82, (0.69, 0.9)),
        samples=(
            SampleAnswer("Name | of [bold]x[/bold]?", "Ada", "I do not know.\nReally.", " Ada\n"),
            SampleAnswer("2 + 2", "4", None, "5"),
            SampleAnswer("Empty?", "no", "", "no"),
        ),
        versions={"tunesmith": "0.1.0", "torch": "2.13.0"},
        machine={"cpu": "x86_64, 2 cores", "memory_bytes": 2**33},
        data={"train": {"path": "data/train.jsonl", "sha256": "ab" * 32, "rows": 160}},
    )
    return dataclasses.replace(record, **changes)


def run_events() -> list[Event]:
    """Twenty steps in two epochs with an evaluation and a checkpoint after each."""
    events: list[Event] = [
        run_started(),
        Notice("flash attention is not available here"),
        Progress("scoring", 1, 2),
    ]
    for step in range(1, 21):
        events.append(step_event(step, 2.0 - step / 20, epoch=1 if step <= 10 else 2))
        if step % 10 == 0:
            metrics = {"exact_match": step / 25}
            events.append(eval_event(step, 1.0 - step / 40, metrics=metrics))
            events.append(CheckpointEvent(step, f"outputs/run/checkpoints/step-{step:06d}", True, 0.5))
            events.append(EpochEvent(step // 10, step, 2.0 - step / 25, 8.75, 2.0))
    return [*events, RunFinished(run_record())]


@pytest.fixture
def events() -> list[Event]:
    return run_events()


@pytest.fixture
def make():
    """The builders above, for tests that need other values."""

    class Make:
        step = staticmethod(step_event)
        eval = staticmethod(eval_event)
        started = staticmethod(run_started)
        record = staticmethod(run_record)

    return Make
