import re
from pathlib import Path

from tunesmith.tracking.events import CheckpointEvent, EpochEvent, Notice
from tunesmith.tracking.scalars import Scalar, scalars

LLMFORGE_NAMES = {
    "epoch",
    "step",
    "learning_rate",
    "train_loss_batch",
    "avg_train_loss_epoch",
    "eval_loss",
    "perplexity",
    "fwd_time",
    "bwd_time",
    "train_time_per_step",
    "train_time_per_epoch",
    "eval_time_per_epoch",
    "trained_tokens",
    "trained_tokens_throughput",
    "time_total_s",
    "grad_norm",
    "mfu",
    "peak_memory",
}


def test_a_run_yields_every_documented_name_and_no_other_but_its_task_metrics(events, make):
    names = {point.name for event in [*events, make.step(1, mfu=0.4)] for point in scalars(event)}
    assert names == LLMFORGE_NAMES | {"exact_match"}


def test_values_of_a_step_are_its_fields_at_its_step(make):
    points = {point.name: point for point in scalars(make.step(7, 1.5, epoch=2, mfu=0.25))}
    assert points["train_loss_batch"] == Scalar("train_loss_batch", 1.5, 7)
    assert points["mfu"].value == 0.25
    assert points["epoch"].value == 2.0
    assert points["peak_memory"].value == 1610612736.0
    assert all(type(point.value) is float for point in points.values())


def test_an_unknown_mfu_is_left_out(make):
    assert "mfu" not in {point.name for point in scalars(make.step(1, mfu=None))}


def test_several_workers_add_who_was_slowest_under_the_documented_names(make):
    told = {
        "worker_times": (1.0, 3.5, 1.5),
        "slowest_worker": 1,
        "slowest_worker_time": 3.5,
        "mean_worker_time": 2.0,
    }
    alone, together = scalars(make.step(1)), scalars(make.step(1, **told))
    assert together[: len(alone)] == alone
    assert together[len(alone) :] == [
        Scalar("slowest_worker", 1.0, 1),
        Scalar("slowest_worker_time", 3.5, 1),
        Scalar("mean_worker_time", 2.0, 1),
    ]
    page = (Path(__file__).parents[3] / "docs" / "outputs.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| each step, of several workers also \| (.+) \|$", page, re.M)
    assert re.findall(r"`(\w+)`", row) == [point.name for point in together[len(alone) :]]


def test_evaluation_and_epoch(make):
    assert scalars(make.eval(4, 0.0, metrics={"f1": 0.5})) == [
        Scalar("eval_loss", 0.0, 4),
        Scalar("perplexity", 1.0, 4),
        Scalar("f1", 0.5, 4),
    ]
    assert scalars(EpochEvent(1, 10, 1.25, 8.0, 2.0)) == [
        Scalar("avg_train_loss_epoch", 1.25, 10),
        Scalar("train_time_per_epoch", 8.0, 10),
        Scalar("eval_time_per_epoch", 2.0, 10),
    ]


def test_no_name_comes_twice_at_one_step(events):
    seen = [(point.name, point.step) for event in events for point in scalars(event)]
    assert len(seen) == len(set(seen))


def test_other_events_carry_none():
    assert scalars(Notice("x")) == []
    assert scalars(CheckpointEvent(1, "p", True, 0.1)) == []
