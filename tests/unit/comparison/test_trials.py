"""What a training of a comparison is, and what it is recognised by."""

import json

import pytest

from tunesmith.checkpoints.atomic import write_json
from tunesmith.checkpoints.lock import locked
from tunesmith.comparison import trials
from tunesmith.comparison.arms import parse_arms
from tunesmith.comparison.record import LossPoint
from tunesmith.comparison.trials import (
    TrainRows,
    _thinned,
    _wait_for_orphan,
    ended,
    entry_of,
    final_trial,
    slug,
    sweep_trial,
)
from tunesmith.errors import RunError
from tunesmith.evaluation.heldout_file import HELD_OUT, HeldOutValues, read_heldout

FULL, LORA = parse_arms(["full,lora"], None)
BASE = {
    "model_id": "m", "train_path": "a.jsonl", "valid_path": "b.jsonl", "output_dir": "out", "learning_rate": None,
    "seed": 42, "num_epochs": 2, "num_warmup_steps": 10, "evaluation": {"metric": "exact_match", "test_path": "t"},
    "best_metric": "exact_match", "logger": {"provider": "wandb"}, "custom_model_tag": None,
}  # fmt: skip
IDENTITY = {"base": "1", "train": "2", "valid": "3", "test": "4"}
ROWS = TrainRows("a.jsonl", 400, 8, lambda count: f"part-{count}.jsonl")


def key(base=BASE, arm=LORA, rate=1e-4, seed=42, identity=IDENTITY) -> str:
    return final_trial(base, arm, rate, seed, 100, identity).key


def test_a_training_is_recognised_by_what_decides_its_result():
    assert (
        key({**BASE, "output_dir": "elsewhere", "train_path": "./a.jsonl", "custom_model_tag": "x"}) == key()
    )
    assert key({**BASE, "evaluation": {"metric": "exact_match", "test_path": "./t"}}) == key()
    others = [
        key({**BASE, "num_epochs": 3}), key(arm=FULL), key(rate=2e-4), key(seed=43),
        key(identity={**IDENTITY, "test": "5"}), key(identity={**IDENTITY, "base": "5"}),
    ]  # fmt: skip
    assert len({key(), *others}) == 7


def test_each_arm_gets_its_own_method_whatever_the_file_has():
    trial = final_trial({**BASE, "lora_config": {"r": 64}}, FULL, 1e-5, 7, 100, IDENTITY)
    assert "lora_config" not in trial.settings
    assert (trial.settings["learning_rate"], trial.settings["seed"]) == (1e-5, 7)
    trial = final_trial(BASE, LORA, 1e-4, 7, 100, IDENTITY)
    assert trial.settings["lora_config"] == {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    assert trial.name.startswith("lora-1e-04-seed7-")


def test_a_short_run_takes_part_of_the_rows_and_of_the_warm_up():
    trial = sweep_trial(BASE, LORA, 1e-4, 42, 20, 100, ROWS, IDENTITY, 1)
    changed = {
        name: trial.settings[name] for name in ("train_path", "num_epochs", "num_warmup_steps", "evaluation")
    }
    assert changed == {
        "train_path": "part-160.jsonl", "num_epochs": 1, "num_warmup_steps": 2, "evaluation": None,
    }  # fmt: skip
    assert trial.settings["best_metric"] == "eval_loss"
    assert trial.settings["logger"] is None
    assert sweep_trial(BASE, LORA, 1e-4, 42, 30, 100, ROWS, IDENTITY, 1).key != trial.key


@pytest.mark.parametrize(("steps", "expected"), [(49, ("part-392.jsonl", 1, 392)), (50, ("a.jsonl", 1, 400)),
                                                 (100, ("a.jsonl", 2, 400)), (80, ("a.jsonl", 2, 400))])  # fmt: skip
def test_steps_are_part_of_an_epoch_or_whole_epochs(steps, expected):
    assert ROWS.for_steps(steps) == expected


@pytest.mark.parametrize(("steps", "near"), [(49, 49), (50, 50), (80, 100), (70, 50), (100, 100)])
def test_a_trial_tells_the_steps_that_it_takes(steps, near):
    assert ROWS.steps_near(steps) == near
    trial = sweep_trial(BASE, LORA, 1e-4, 42, steps, 100, ROWS, IDENTITY, 1)
    assert trial.steps == near
    # Warm-up is of the same share of them.
    assert trial.settings["num_warmup_steps"] == -(-10 * near // 100)


def test_a_short_run_is_never_longer_than_a_full_one():
    # 10 rows, 8 a step: three epochs are 6 steps, which 48 rows would be nearly five epochs of.
    few = TrainRows("a.jsonl", 10, 8, lambda count: f"part-{count}.jsonl")
    assert few.for_steps(6) == ("a.jsonl", 3, 10)
    assert few.for_steps(1) == ("part-8.jsonl", 1, 8)


def test_what_a_deepspeed_file_says_decides_and_where_it_lies_does_not():
    def of(path, says):
        identity = {**IDENTITY, **({"deepspeed": says} if says else {})}
        return key({**BASE, "deepspeed": {"config_path": path} if path else None}, identity=identity)

    assert of("a.json", {"stage": 3}) == of("b.json", {"stage": 3})
    assert of("a.json", {"stage": 3}) != of("a.json", {"stage": 2})
    assert of("a.json", {"stage": 3}) != of(None, None)


def test_a_process_that_does_not_end_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_ORPHAN_SECONDS", 0.3)
    monkeypatch.setattr(trials, "_POLL_SECONDS", 0.01)
    with locked(tmp_path), pytest.raises(RunError, match=r"another process has trained there .*; end it"):
        _wait_for_orphan(tmp_path)
    _wait_for_orphan(tmp_path)


def test_a_run_whose_held_out_loss_is_no_number_has_failed(tmp_path):
    trial = final_trial(BASE, LORA, 1e-4, 7, 100, IDENTITY)
    run = tmp_path / "runs" / trial.name / "run-1"
    run.mkdir(parents=True)
    (run / "report.json").write_text(json.dumps({"status": "finished"}))
    (run / "metrics.jsonl").write_text("")
    values = HeldOutValues((1.0, None, 2.0), (3, 3, 3), None, (), ())
    write_json(run / HELD_OUT, values)
    assert read_heldout(run / HELD_OUT) == values
    entry, record = entry_of(trial, run.parent, tmp_path)
    assert record is None
    assert (entry.status, entry.eval_loss) == ("failed", None)
    assert entry.fault == "the loss on 1 of 3 held-out rows is not finite"


def test_a_long_curve_is_thinned_by_means_that_leave_no_step_out():
    points = [LossPoint(step, step / 100, float(step)) for step in range(1, 401)]
    found = _thinned(points)
    assert len(found) == 200
    assert (found[0].step, found[0].loss, found[-1].step, found[-1].loss) == (2, 1.5, 400, 399.5)
    assert _thinned(points[:7]) == tuple(points[:7])


def test_names_in_any_script_stay_apart_and_fit_into_a_folder():
    assert slug("lora:r=16") == "lora-r-16"
    assert slug("配置") == "配置"
    assert slug("my caf\udce9.b") == "my-caf-b"
    assert slug("***") == "unnamed"
    long = [slug(f"lora:targets={'q_proj+' * 60}{last}") for last in ("up_proj", "down_proj")]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 48


@pytest.mark.parametrize(
    ("code", "said"),
    [(-9, "runs out of memory"), (-11, "ended by signal 11"), (1, "the training ended with exit code 1")],
)
def test_a_child_that_left_no_word_is_spoken_for(code, said):
    assert said in ended(code)
