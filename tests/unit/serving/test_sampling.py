"""Choosing tokens: against distributions computed here, and reproducible whatever else runs."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_parts import ALL, ask, prompt, save_base, save_lora
from tunesmith.serving.engine import CpuEngine
from tunesmith.serving.sampling import Chooser, choose_all, logprobs
from tunesmith.serving.seam import Sampling

LOGITS = [1.0, 3.0, -2.0, 2.5, 0.0, 2.0]


def distribution(
    logits: list[float], temperature: float, top_p: float, bias: dict[int, float]
) -> list[float]:
    """In plain Python, from the definitions."""
    scaled = [(x + bias.get(token, 0.0)) / temperature for token, x in enumerate(logits)]
    powers = [math.exp(x - max(scaled)) for x in scaled]
    chances = [power / sum(powers) for power in powers]
    kept, held = set(), 0.0
    for token in sorted(range(len(chances)), key=lambda token: -chances[token]):
        if held >= top_p:
            break
        kept.add(token)
        held += chances[token]
    return [chance / held if token in kept else 0.0 for token, chance in enumerate(chances)]


@pytest.mark.parametrize(
    ("temperature", "top_p", "bias"),
    [(1.0, 1.0, {}), (0.5, 1.0, {}), (2.0, 0.8, {}), (1.0, 0.3, {}), (1.0, 0.9, {2: 5.0, 1: -100.0})],
)
def test_tokens_come_as_often_as_the_distribution_says(temperature, top_p, bias):
    sampling = Sampling(1, temperature=temperature, top_p=top_p, seed=3, logit_bias=bias)
    chooser, count = Chooser(sampling), 4000
    logits = torch.tensor(LOGITS)
    drawn = Counter(chooser.choose(logits) for _ in range(count))
    for token, chance in enumerate(distribution(LOGITS, temperature, top_p, bias)):
        # Five standard deviations of a binomial.
        assert abs(drawn[token] / count - chance) <= 5 * math.sqrt(chance * (1 - chance) / count)
    assert logits.tolist() == LOGITS


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=300),
    st.floats(0.01, 5),
    st.floats(0.01, 1),
    st.integers(0, 2**64),
)
def test_a_token_outside_the_nucleus_is_never_chosen(logits, temperature, top_p, seed):
    chooser = Chooser(Sampling(1, temperature=temperature, top_p=top_p, seed=seed))
    tensor = torch.tensor(logits)
    token = chooser.choose(tensor)
    exact = ((tensor - tensor.max()).double() / temperature).softmax(0)
    above = exact[exact > exact[token] * (1 + 1e-4)].sum()
    assert above < top_p + 1e-5


def test_the_nucleus_is_found_however_flat_the_distribution_is():
    chooser = Chooser(Sampling(1, top_p=0.99, seed=0))
    tokens = {chooser.choose(torch.zeros(3000)) for _ in range(300)}
    assert len(tokens) > 250


def test_the_inverse_of_the_cumulative_distribution_of_the_seeds_own_numbers():
    chooser, numbers = Chooser(Sampling(1, seed=11)), random.Random(11)
    chances = distribution(LOGITS, 1.0, 1.0, {})
    for _ in range(50):
        left, token = numbers.random(), 0
        while left >= chances[token]:
            left -= chances[token]
            token += 1
        assert chooser.choose(torch.tensor(LOGITS)) == token


def test_temperature_zero_is_greedy_with_and_without_bias():
    rows = torch.tensor([LOGITS, LOGITS, [math.nan] * 6, [-math.inf] * 6])
    greedy, biased = (
        Chooser(Sampling(1, temperature=0.0)),
        Chooser(Sampling(1, temperature=0.0, logit_bias={4: 9.0})),
    )
    assert choose_all(rows, [greedy, biased, greedy, biased]) == [1, 4, -1, -1]


def test_logprobs_are_those_of_the_plain_softmax():
    total = math.log(sum(map(math.exp, LOGITS)))
    chosen, top = logprobs(torch.tensor(LOGITS), 4, 2)
    assert chosen == pytest.approx(0.0 - total, abs=1e-6)
    assert [token for token, _ in top] == [1, 3]
    assert [value for _, value in top] == pytest.approx([3.0 - total, 2.5 - total], abs=1e-6)
    assert logprobs(torch.tensor(LOGITS), 0, 50)[1][5][0] == 2


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    base = save_base(folder / "base")
    engine = CpuEngine(base)
    keys = [engine.load(save_lora(base, folder / str(seed), seed, target_modules=ALL)) for seed in range(3)]
    yield engine, [None, *keys]
    engine.close()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_seed_gives_the_same_tokens_alone_and_beside_others(served, top_p):
    engine, keys = served
    settings = [{"temperature": 1.3, "top_p": top_p, "seed": seed} for seed in range(12)]
    alone = [ask(engine, prompt(3 + n, n), keys[n % 4], 15, **settings[n]).ids() for n in range(12)]
    answers = [ask(engine, prompt(3 + n, n), keys[n % 4], 15, **settings[n]) for n in range(12)]
    assert [answer.ids() for answer in answers] == alone
    assert len({tuple(ids) for ids in alone}) == 12


def test_logprobs_do_not_follow_temperature_or_bias(served):
    engine, _ = served
    plain = ask(engine, prompt(6), None, 1, top_logprobs=3).tokens()[0]
    bent = ask(engine, prompt(6), None, 1, top_logprobs=3, logit_bias={7: 100.0}, temperature=3.0).tokens()[0]
    assert bent.id == 7
    assert [token for token, _ in bent.top] == [token for token, _ in plain.top]
    assert [value for _, value in bent.top] == pytest.approx([value for _, value in plain.top], abs=1e-4)
    assert ask(engine, prompt(6), None, 1).tokens()[0].logprob is None
    assert ask(engine, prompt(6), None, 1, top_logprobs=0).tokens()[0].top == ()
