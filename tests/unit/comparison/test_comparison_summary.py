"""From runs to arms and differences, and the record as JSON."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tunesmith.comparison.arms import parse_arms
from tunesmith.comparison.markdown import comparison_markdown
from tunesmith.comparison.record import FORMAT, ComparisonRecord, SweepPoint, from_json, to_json
from tunesmith.comparison.summary import differences, summarise
from tunesmith.comparison.verdict import decide
from tunesmith.errors import UserError
from tunesmith.evaluation.heldout_file import HeldOutValues

FULL, LORA = parse_arms(["full,lora"], None)


def run(seed: int, losses: list[float], values: list[float], wall: float = 10.0, before=None):
    record = SimpleNamespace(
        wall_seconds=wall,
        peak_rss_bytes=1000 + seed,
        trainable_parameters=5,
        total_parameters=9,
        checkpoint_bytes=77,
        before=before,
    )
    entry = SimpleNamespace(seed=seed, training_seconds=wall / 2, tokens_per_second=3.0)
    metric = "token_f1" if values else None
    heldout = HeldOutValues(tuple(losses), (2,) * len(losses), metric, tuple(values), ())
    return SimpleNamespace(record=record, entry=entry, values=heldout)


def summary(arm, runs):
    return summarise(arm, runs, [], 1e-4, at_edge=False, serving=None, price_per_hour=360.0)


def test_an_arm_is_the_mean_of_its_runs():
    found = summary(FULL, [run(1, [2.0, 4.0], [1.0, 0.0], 10), run(2, [4.0, 4.0], [1.0, 1.0], 30)])
    assert found.eval_loss.value == pytest.approx((6 / 4 + 8 / 4) / 2)
    assert found.metric.value == pytest.approx(0.75)
    assert (found.wall_seconds, found.training_seconds, found.training_cost) == (20, 10, 2.0)
    assert found.peak_memory_bytes == 1002
    assert found.seeds == (1, 2)


def test_an_arm_without_runs_has_no_numbers():
    found = summary(FULL, [])
    assert (found.eval_loss, found.wall_seconds, found.training_cost, found.seeds) == (None, None, None, ())


def test_differences_are_of_metric_and_loss_and_widen_with_the_number_of_pairs():
    runs = {
        "full": [run(1, [2.0, 4.0, 1.0], [1.0, 0.0, 1.0]), run(2, [2.5, 4.0, 1.0], [1.0, 0.0, 1.0])],
        "lora": [run(1, [3.0, 4.5, 2.0], [0.0, 0.0, 1.0]), run(2, [3.5, 4.0, 2.0], [0.0, 1.0, 1.0])],
    }
    metric, loss = differences((FULL, LORA), runs)
    assert (metric.measure, metric.value) == ("token_f1", pytest.approx(2 / 3 - 1 / 2))
    assert (loss.measure, loss.value) == ("eval_loss", pytest.approx((14.5 - 19) / 12))
    assert (loss.rows, loss.seeds, loss.confidence) == (3, 2, 0.95)
    third = parse_arms(["full,lora,lora:r=4"], None)
    wide = differences(third, {**runs, "lora:r=4": runs["lora"]})
    assert len(wide) == 6
    assert wide[0].confidence == pytest.approx(1 - 0.05 / 3)
    assert wide[0].interval[0] <= metric.interval[0] <= metric.interval[1] <= wide[0].interval[1]


def record(**changed) -> ComparisonRecord:
    runs = {"full": [run(1, [2.0, 4.0], [])], "lora": [run(1, [3.0, 4.5], [])]}
    summaries = tuple(summary(arm, runs[arm.name]) for arm in (FULL, LORA))
    found = differences((FULL, LORA), runs)
    fields = {
        "format": FORMAT, "name": "compare-mine", "status": "finished", "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5, "runs_done": 2, "runs_planned": 2, "model_id": "m", "task": None, "metric": None, "rows": 2,
        "metric_rows": None, "price_per_hour": None, "arms": (FULL, LORA), "base": None, "sweep": (), "runs": (),
        "summaries": summaries, "differences": found, "forgetting": (), "samples": (), "settings": {}, "options": {},
        "verdict": decide((FULL, LORA), summaries, found), "lineage": {}, "machine": {}, "versions": {}, "notes": (),
    }  # fmt: skip
    return ComparisonRecord(**{**fields, **changed})


def test_a_record_comes_back_from_json_as_it_was():
    assert from_json(to_json(record())) == record()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("rows"), "rows: Field required"),
        (lambda data: data.update(extra=1), "extra"),
        (lambda data: data.update(rows="2"), "rows: Input should be a valid integer"),
        (lambda data: data["arms"][0].update(method="half"), "arms.0.method"),
        (lambda data: data.update(format=99), "is of format 99"),
    ],
)
def test_what_is_no_record_is_refused_with_the_field(change, said):
    data = json.loads(to_json(record()))
    change(data)
    with pytest.raises(UserError, match=said):
        from_json(json.dumps(data))


def test_a_number_that_is_not_finite_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(record(seconds=float("nan")))


def test_the_markdown_says_the_verdict_and_shows_strange_text_literally():
    found = record(notes=("a | b <script>",))
    text = comparison_markdown(found)
    assert found.verdict.headline in text
    assert "a \\| b \\<script\\>" in text
    assert "| learning rate | 0.0001 | 0.0001 |" in text


def test_the_run_that_scored_the_base_counts_in_no_mean_of_time_and_memory():
    runs = [
        run(9, [2.0, 4.0], [], 50, before=object()),
        run(1, [2.0, 4.0], [], 10),
        run(2, [2.0, 4.0], [], 30),
    ]
    found = summary(FULL, runs)
    assert (found.wall_seconds, found.training_cost, found.peak_memory_bytes) == (20, 2.0, 1002)
    assert summary(FULL, runs[:1]).wall_seconds == 50


def test_arms_are_compared_over_the_seeds_that_both_have():
    runs = {
        "full": [run(1, [1.0, 1.0, 1.0], []), run(2, [7.0, 7.0, 7.0], [])],
        "lora": [run(2, [6.0, 8.0, 4.0], []), run(3, [0.0, 0.0, 0.0], [])],
    }
    (loss,) = differences((FULL, LORA), runs)
    assert (loss.value, loss.seeds) == (pytest.approx((21 - 18) / 6), 1)
    runs["lora"] = runs["lora"][1:]
    assert differences((FULL, LORA), runs) == ()


def test_all_right_and_all_wrong_are_no_certainty():
    found = summary(FULL, [run(1, [2.0] * 6, [1.0] * 6)]).metric
    # Wilson's bound at n of n is n / (n + z^2).
    assert found.interval == (pytest.approx(6 / (6 + 1.959963984540054**2)), 1.0)
    half = summary(FULL, [run(1, [2.0] * 6, [0.5] * 6)]).metric  # z / (2 sqrt(n + z^2)) to either side
    assert half.interval[1] - 0.5 == pytest.approx(
        1.959963984540054 / (2 * (6 + 1.959963984540054**2) ** 0.5)
    )


def test_a_name_that_is_no_utf8_does_not_spoil_the_record():
    found = record(name="caf\udce9", settings={"a\udce9": ["\udce9"]})
    again = from_json(to_json(found))
    assert (again.name, again.settings) == ("caf?", {"a?": ["?"]})
    comparison_markdown(found).encode()


def test_the_markdown_shows_entities_and_arms_literally():
    arm = replace(LORA, name="lora:targets=[a,b]", label="LoRA, [a] & <b>")
    point = SweepPoint(arm.name, 0, 1e-4, 10, 1.0, True)
    text = comparison_markdown(record(arms=(FULL, arm), sweep=(point,), notes=("&lt;b&gt;",)))
    assert "| LoRA, \\[a\\] \\& \\<b\\> | 1 |" in text
    assert "\\&lt;b\\&gt;" in text


def test_an_interval_stays_within_what_a_mean_can_be():
    # Of two seeds Student's t reaches twelve standard errors far.
    found = summary(FULL, [run(1, [0.1] * 9, [1.0] * 8 + [0.0]), run(2, [0.9] * 9, [0.0] * 8 + [1.0])])
    assert found.metric.interval == (0.0, 1.0)
    assert found.eval_loss.interval[0] == 0.0
    assert found.eval_loss.interval[1] > 1.0
    runs = {
        "full": [run(1, [1.0] * 9, [1.0] * 9), run(2, [1.0] * 9, [0.0] * 9)],
        "lora": [run(1, [1.0] * 9, [0.0] * 9), run(2, [1.0] * 9, [1.0] * 9)],
    }
    metric, _ = differences((FULL, LORA), runs)
    assert metric.interval == (-1.0, 1.0)
