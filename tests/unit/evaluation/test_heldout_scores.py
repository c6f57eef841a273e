import math
import subprocess
import sys

import pytest

from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation.heldout import check_expected, perplexity, score_answers


def test_right_or_wrong_gets_the_wilson_interval():
    expected = [str(i) for i in range(10)]
    answers = [*expected[:8], "x", "y"]
    score = score_answers(expected, answers, "exact_match", seed=0)
    assert (score.name, score.value) == ("exact_match", 0.8)
    assert score.per_row == (1.0,) * 8 + (0.0,) * 2
    assert score.interval == pytest.approx((0.4902, 0.9433), abs=5e-5)


def test_values_in_between_get_a_bootstrap_interval():
    # F1 of "x" against "x", "x y", "y": 1, 2/3, 0
    score = score_answers(["x", "x", "x"], ["x", "x y", "y"], "token_f1", seed=0)
    assert score.per_row == pytest.approx((1.0, 2 / 3, 0.0))
    assert score.value == pytest.approx(5 / 9)
    assert score.interval == (0.0, 1.0)  # all rows alike happens in 1 of 27 resamples on either side
    assert score == score_answers(["x", "x", "x"], ["x", "x y", "y"], "token_f1", seed=0)


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_one_value_are_no_certainty(rows):
    # F1 of "x" against "x y": 2/3. Wilson's bounds solve (p - b)^2 = z^2 b (1 - b) / n.
    low, high = score_answers(["x"] * rows, ["x y"] * rows, "token_f1", seed=0).interval
    for bound in (low, high):
        assert (2 / 3 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / rows, rel=1e-5)
    assert low < 2 / 3 < high
    assert score_answers(["x"] * rows, ["x"] * rows, "token_f1", seed=0).interval[1] == 1.0


def test_one_row_and_the_order_of_rows():
    score = score_answers(["a", "b"], ["b", "b"], "label_accuracy", seed=0)
    assert score.per_row == (0.0, 1.0)
    low, high = score_answers(["f(a[1])"], ["f(a[1])"], "record_match", seed=0).interval
    assert high == 1.0
    assert low == pytest.approx(1 / (1 + 1.959964**2), abs=1e-6)  # n / (n + z^2) for n of n


def test_a_row_the_metric_cannot_read_is_named():
    with pytest.raises(DataError, match=r"held-out row 2, evaluation\.metric record_match: .*'plain'"):
        score_answers(["f(a[1])", "plain"], ["", ""], "record_match", seed=0)
    with pytest.raises(DataError, match="row 1"):
        check_expected(["plain"], "record_match")
    check_expected(["plain"], "exact_match")


def test_nothing_to_score_and_unknown_metrics():
    with pytest.raises(DataError, match="no held-out rows"):
        score_answers([], [], "exact_match", seed=0)
    with pytest.raises(ConfigError, match="closest is exact_match"):
        check_expected(["a"], "exact")
    with pytest.raises(ValueError, match="1 answers to 2 rows"):
        score_answers(["a", "b"], ["a"], "exact_match", seed=0)


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(64)) == pytest.approx(64)
    assert perplexity(710.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_scoring_needs_no_torch():
    code = "import sys, tunesmith.evaluation.heldout; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
