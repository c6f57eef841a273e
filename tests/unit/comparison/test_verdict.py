"""Words from numbers: a winner only where an interval leaves 0 out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.comparison.record import Advice, Arm, ArmSummary, Difference, Estimate, Forgetting
from tunesmith.comparison.verdict import decide, undecided

ARMS = (Arm("full", "full-parameter", "full", None), Arm("lora", "LoRA", "lora", {"r": 8}))
FULL = ArmSummary(
    arm="full", learning_rate=1e-4, at_edge_of_grid=False, seeds=(1, 2, 3), failed_runs=0, eval_loss=None, metric=None,
    wall_seconds=120.0, training_seconds=100.0, tokens_per_second=10.0, peak_memory_bytes=1000, trainable_parameters=7,
    total_parameters=7, checkpoint_bytes=7000, training_cost=None, sweep_seconds=0.0, serving=None,
)  # fmt: skip
LORA = replace(FULL, arm="lora", training_seconds=60.0, peak_memory_bytes=410, checkpoint_bytes=100)
METRIC = Difference("exact_match", "full", "lora", 0.008, (-0.019, 0.034), 541, 3, False)
LOSS = Difference("eval_loss", "full", "lora", -0.01, (-0.02, 0.005), 541, 3, True)


def test_no_difference_is_said_as_such_with_what_was_saved():
    verdict = decide(ARMS, (FULL, LORA), (METRIC, LOSS))
    assert verdict.headline == (
        "no difference in exact match shown between full-parameter and LoRA on your 541 rows (+0.8 points, interval "
        "-1.9 to +3.4; 3 seeds each); LoRA used 41 % of the memory and 1/70 of the disk of full-parameter"
    )
    assert "LoRA trained in 60 % of the time of full-parameter" in verdict.sentences
    advice = {a.use: a for a in verdict.advice}
    assert advice["maximum quality"].arm is None
    assert advice["many models to serve"].arm == "lora"
    assert advice["rapid experiments"].arm == "lora"
    assert advice["one model"].arm == "lora"


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (
            replace(METRIC, value=0.05, interval=(0.01, 0.09)),
            "full-parameter is better than LoRA on your 541 rows: exact match 5.0 points higher "
            "(interval 1.0 to 9.0; 3 seeds each)",
        ),
        (
            replace(METRIC, value=-0.05, interval=(-0.09, -0.01)),
            "LoRA is better than full-parameter on your 541 rows: exact match 5.0 points higher "
            "(interval 1.0 to 9.0; 3 seeds each)",
        ),
        (
            replace(LOSS, value=-0.02, interval=(-0.03, -0.01)),
            "full-parameter is better than LoRA on your 541 rows: eval loss 0.0200 nats a token lower "
            "(interval 0.0100 to 0.0300; 3 seeds each)",
        ),
        (
            replace(LOSS, value=0.02, interval=(0.01, 0.03)),
            "LoRA is better than full-parameter on your 541 rows: eval loss 0.0200 nats a token lower "
            "(interval 0.0100 to 0.0300; 3 seeds each)",
        ),
    ],
)  # fmt: skip
def test_a_winner_is_named_with_its_advantage(difference, said):
    verdict = decide(ARMS, (FULL, LORA), (difference,))
    assert verdict.sentences[0] == said
    winner = next(a.arm for a in verdict.advice if a.use == "maximum quality")
    assert winner == ("full" if said.startswith("full") else "lora")


def test_cheapness_that_costs_quality_is_said_to():
    verdict = decide(ARMS, (FULL, LORA), (replace(METRIC, value=0.05, interval=(0.01, 0.09)),))
    many = verdict.advice[0]
    assert many == Advice(
        "many models to serve",
        "lora",
        "its checkpoint is the smallest, 1/70 of that of full-parameter; full-parameter is better, which is the price",
    )


def test_one_seed_is_said_to_be_one():
    verdict = decide(ARMS, (FULL, LORA), (replace(METRIC, seeds=1),))
    assert "1 seed each, so other seeds are not covered" in verdict.headline


def test_one_row_is_said_to_be_one():
    assert " on your one row (" in decide(ARMS, (FULL, LORA), (replace(METRIC, rows=1),)).headline


def test_what_was_not_measured_is_not_spoken_of():
    bare = replace(FULL, peak_memory_bytes=None, checkpoint_bytes=None, training_seconds=None)
    verdict = decide(ARMS, (bare, replace(bare, arm="lora")), (METRIC,))
    assert verdict.sentences == (verdict.headline,)
    assert all(a.arm is None for a in verdict.advice)
    assert decide(ARMS, (bare,), ()) is None


def test_forgetting_is_claimed_only_where_every_interval_is_above_0():
    def entry(arm: str, seed: int, change: float, low: float, high: float) -> Forgetting:
        estimate = Estimate(change, (low, high), 60)
        return Forgetting(arm, seed, "shipped", 60, 3.0, 3.0 + change, estimate, None, None)

    found = [
        entry("full", 1, 0.2, 0.1, 0.3), entry("full", 2, 0.3, 0.2, 0.4),
        entry("lora", 1, 0.1, -0.1, 0.3), entry("lora", 2, 0.3, 0.2, 0.4),
    ]  # fmt: skip
    sentences = decide(ARMS, (FULL, LORA), (METRIC,), found).sentences
    assert (
        "full-parameter has forgotten something: its loss on general text rose (+0.200, +0.300 nats a token, "
        "intervals from +0.100 to +0.400, 60 texts)"
    ) in sentences
    assert any(
        s.startswith("no change of the loss of LoRA on general text is shown in every run") for s in sentences
    )


NUMBERS = st.floats(-1, 1)


@given(
    st.lists(
        st.tuples(st.sampled_from(["token_f1", "eval_loss"]), NUMBERS, NUMBERS, NUMBERS),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 5),
)
def test_no_winner_where_the_interval_covers_0(cases, seeds):
    found = []
    for measure, value, a, b in cases:
        low, high = min(a, b, 0.0), max(a, b, 0.0)  # covers 0
        found.append(
            Difference(measure, "full", "lora", value, (low, high), 100, seeds, measure == "eval_loss")
        )
    verdict = decide(ARMS, (FULL, LORA), found)
    texts = [verdict.headline, *verdict.sentences, *(a.reason for a in verdict.advice)]
    assert not any("is better" in text for text in texts)
    assert next(a.arm for a in verdict.advice if a.use == "maximum quality") is None


@given(NUMBERS, NUMBERS, st.booleans())
def test_a_named_winner_is_the_one_the_numbers_name(a, b, lower):
    low, high = min(a, b), max(a, b)
    name = "eval_loss" if lower else "token_f1"
    d = Difference(name, "full", "lora", (low + high) / 2, (low, high), 100, 3, lower)
    sentence = decide(ARMS, (FULL, LORA), (d,)).sentences[0]
    first_wins = high < 0 if lower else low > 0
    second_wins = low > 0 if lower else high < 0
    assert sentence.startswith("full-parameter is better") == first_wins
    assert sentence.startswith("LoRA is better") == second_wins


def test_failed_runs_are_said_to_stand_in_no_number():
    verdict = decide(ARMS, (replace(FULL, failed_runs=1), LORA), (METRIC,))
    assert "1 of 4 runs of full-parameter failed and stand in no number" in verdict.sentences
    assert not any("runs of LoRA" in sentence for sentence in verdict.sentences)


def test_an_arm_that_never_ended_well_leaves_nothing_to_compare():
    verdict = undecided(ARMS, (replace(FULL, seeds=(), failed_runs=2), LORA))
    assert verdict.headline == "nothing can be compared: no run of full-parameter ended well"
    assert verdict.sentences == ("2 of 2 runs of full-parameter failed and stand in no number",)
    assert undecided(ARMS, ()).headline.endswith("no run of full-parameter and none of LoRA ended well")
    assert undecided(ARMS, (FULL, LORA)).headline.endswith("no two arms share a seed")


def test_of_three_arms_the_one_that_nobody_beats_is_advised_for_one_model():
    arms = (*ARMS, Arm("lora:r=2", "LoRA, r 2", "lora", {"r": 2}))
    found = (
        replace(METRIC, value=0.2, interval=(0.1, 0.3)),
        replace(METRIC, first="lora", second="lora:r=2", value=0.2, interval=(0.1, 0.3)),
        replace(METRIC, second="lora:r=2"),
    )
    advice = {a.use: a for a in decide(arms, (FULL, LORA), found).advice}
    assert advice["maximum quality"].arm is None
    assert advice["one model"] == Advice(
        "one model", "full", "full-parameter alone is not shown to be worse than another"
    )


def test_the_reference_leads_wherever_it_stands_among_the_arms():
    arms = (ARMS[1], Arm("lora:r=2", "LoRA, r 2", "lora", {"r": 2}), ARMS[0])
    found = (
        replace(METRIC, first="lora", second="lora:r=2"),
        replace(METRIC, first="lora", second="full"),
        replace(METRIC, first="lora:r=2", second="full"),
    )
    verdict = decide(arms, (FULL, LORA, replace(LORA, arm="lora:r=2", peak_memory_bytes=205)), found)
    assert verdict.headline.startswith(
        "no difference in exact match shown between LoRA and full-parameter on "
    )
    assert verdict.headline.endswith("LoRA used 41 % of the memory and 1/70 of the disk of full-parameter")
    assert verdict.sentences[1].startswith("no difference in exact match shown between LoRA, r 2 and full")
    assert "LoRA, r 2 used 20 % of the memory and 1/70 of the disk of full-parameter" in verdict.sentences
    assert "LoRA, r 2 used 50 % of the memory and 100 % of the disk of LoRA" in verdict.sentences
