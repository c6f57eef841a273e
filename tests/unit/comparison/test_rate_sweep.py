"""Successive halving, on losses that are functions of the rate."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.comparison.sweep import middle_rate, rate_grid, sweep

DEFAULTS = {"lora": 1e-4, "full": 1e-5}


def bowl(best: float, log: list[tuple[int, float, int]] | None = None):
    """Loss with its lowest point at ``best``."""

    def train(number: int, rate: float, steps: int) -> float:
        if log is not None:
            log.append((number, rate, steps))
        return math.log(rate / best) ** 2

    return train


def test_the_grid_is_five_rates_half_a_power_of_ten_apart():
    assert rate_grid(1e-4) == (1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3)


@pytest.mark.parametrize(
    ("method", "given_rate", "own", "middle"),
    [
        ("lora", None, "lora", 1e-4), ("full", None, "lora", 1e-5),
        ("lora", 4e-3, "lora", 4e-3), ("full", 4e-3, "lora", 4e-4), ("lora", 8e-4, "full", 8e-3),
    ],
)  # fmt: skip
def test_where_the_grid_is_centred(method, given_rate, own, middle):
    assert middle_rate(method, given_rate, own, DEFAULTS) == middle


def test_halving_spends_its_budget_in_equal_rounds():
    log: list[tuple[int, float, int]] = []
    result = sweep("lora", rate_grid(1e-4), 300, 3.0, bowl(1e-4, log))
    assert result.learning_rate == 1e-4
    assert not result.at_edge
    # 900 steps in three rounds of 300: 5 runs of 60, 3 of 100, 2 of 150.
    assert [(n, s) for n, _, s in log] == [(0, 60)] * 5 + [(1, 100)] * 3 + [(2, 150)] * 2
    assert [p.learning_rate for p in result.points if p.kept and p.round == 2] == [1e-4]


def test_the_grid_grows_until_the_best_is_inside():
    result = sweep("full", rate_grid(1e-5), 300, 3.0, bowl(1e-3))
    assert result.learning_rate == 1e-3
    assert not result.at_edge
    assert max(p.learning_rate for p in result.points) == 3.2e-3


def test_a_best_rate_out_of_reach_is_said_to_be_at_the_edge():
    result = sweep("full", rate_grid(1e-5), 300, 3.0, bowl(1.0))
    assert result.at_edge
    assert result.learning_rate == max(p.learning_rate for p in result.points) == 3.2e-3


def test_rates_that_the_user_named_are_all_there_is():
    log: list[tuple[int, float, int]] = []
    result = sweep("full", [1e-5, 1e-4], 300, 3.0, bowl(1.0, log), grows=False)
    assert result.learning_rate == 1e-4
    assert {rate for _, rate, _ in log} == {1e-5, 1e-4}
    assert result.at_edge  # a better one may lie beyond, whoever drew the edge


def test_the_edge_is_that_of_the_rate_which_was_chosen():
    def turns(number: int, rate: float, _steps: int) -> float:
        return abs(math.log(rate / (2.5 if number == 0 else 4.0)))

    assert sweep("full", [1.0, 2.0, 4.0], 300, 3.0, turns).at_edge
    assert not sweep("full", [1.0, 2.0, 4.0], 300, 3.0, lambda _n, rate, _s: abs(math.log(rate / 2))).at_edge


def test_one_rate_is_not_trained_for():
    assert sweep("full", [1e-5], 300, 3.0, bowl(1.0)).points == ()


def test_rates_that_diverge_are_given_up_and_lower_ones_tried():
    result = sweep("full", (1.0, 2.0), 100, 2.0, lambda _n, rate, _s: None if rate > 0.5 else rate)
    assert result.learning_rate is not None
    assert result.learning_rate <= 0.5
    assert sweep("full", (1.0, 2.0), 100, 2.0, lambda *_: None).learning_rate is None


@given(st.floats(1e-7, 1e-1), st.integers(1, 5000), st.floats(0.1, 20.0), st.floats(1e-6, 1e-2))
def test_the_choice_is_the_best_of_those_tried(best, steps, budget, middle):
    result = sweep("a", rate_grid(middle), steps, budget, bowl(best))
    tried = [p for p in result.points if p.round == 0]
    assert result.learning_rate == min(tried, key=lambda p: (p.eval_loss, p.learning_rate)).learning_rate
    assert all(1 <= p.steps <= steps for p in result.points)


def test_rates_that_diverge_only_in_long_runs_leave_the_best_below_them():
    # In a short round the high rates look best; in the next all that are left diverge.
    def train(number: int, rate: float, _steps: int) -> float | None:
        return 1 / rate if number == 0 or rate < 3e-4 else None

    result = sweep("full", rate_grid(1e-4), 300, 3.0, train, grows=False)
    assert result.learning_rate == 1e-4
    assert [p.learning_rate for p in result.points if p.round == 0 and p.kept] == [1e-4, 3.2e-4, 1e-3]
    gone = sweep("full", rate_grid(1e-4), 300, 3.0, lambda n, _r, _s: None if n else 1.0, grows=False)
    assert gone.learning_rate is None  # none lies below the lowest that diverged


def test_a_rate_that_was_let_go_is_marked_where_it_got_to():
    def train(number: int, rate: float, _steps: int) -> float | None:
        return 1 / rate if number == 0 else None

    result = sweep("full", rate_grid(1e-4), 300, 3.0, train, grows=False)
    assert result.learning_rate == 3.2e-5
    (point,) = [p for p in result.points if p.learning_rate == 3.2e-5]
    assert (point.round, point.kept) == (0, True)


def test_points_tell_the_steps_that_were_trained():
    log: list[tuple[int, float, int]] = []
    result = sweep(
        "lora", [1e-5, 1e-4], 300, 3.0, bowl(1e-4, log), grows=False, possible=lambda steps: steps // 70 * 70
    )
    assert [s for _, _, s in log] == [280, 280]
    assert {p.steps for p in result.points} == {280}
