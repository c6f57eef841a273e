"""What a training of a comparison is, and what it is recognised by."""

import pytest

from tunesmith.comparison.arms import parse_arms
from tunesmith.comparison.record import LossPoint
from tunesmith.comparison.trials import TrainRows, _thinned, final_trial, sweep_trial

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


def test_a_long_curve_is_thinned_by_means_that_leave_no_step_out():
    points = [LossPoint(step, step / 100, float(step)) for step in range(1, 401)]
    found = _thinned(points)
    assert len(found) == 200
    assert (found[0].step, found[0].loss, found[-1].step, found[-1].loss) == (2, 1.5, 400, 399.5)
    assert _thinned(points[:7]) == tuple(points[:7])
