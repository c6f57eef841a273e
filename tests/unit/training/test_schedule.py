"""Learning rate and steps, against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.training.schedule import learning_rate_at, plan_steps


def rates(kind: str, warmup: int, total: int) -> list[float]:
    return [
        learning_rate_at(step, peak=1.0, kind=kind, warmup_steps=warmup, total_steps=total)
        for step in range(1, total + 1)
    ]


def test_linear_rises_then_falls_in_equal_steps():
    assert rates("linear", 2, 6) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_down_in_the_middle():
    assert rates("cosine", 0, 4) == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )


def test_constant_stays_after_warm_up():
    assert rates("constant", 4, 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak():
    assert rates("cosine", 10, 3) == pytest.approx([0.1, 0.2, 0.3])


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 30), st.integers(1, 60))
def test_every_step_learns_and_none_beyond_the_peak(kind: str, warmup: int, total: int):
    assert all(0 < rate <= 1 for rate in rates(kind, warmup, total))


def test_short_last_steps_count_and_epochs_cover_the_least_number_of_steps():
    assert plan_steps(400, 8, 2, 100).total_steps == 100
    assert plan_steps(401, 8, 1, 100).steps_per_epoch == 51
    # 24 rows in steps of 8 are 3 steps an epoch; 100 steps need 34 epochs.
    assert plan_steps(24, 8, None, 100).epochs == 34
