import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_models import save_tiny_model, tiny_model, write_rows
from tunesmith.comparison import forgetting
from tunesmith.comparison.forgetting import (
    GENERAL_CHOICE,
    GENERAL_TEXT,
    SHIPPED,
    GeneralScore,
    compare_scores,
    measure_forgetting,
    measure_general,
    shipped_choices,
)
from tunesmith.errors import DataError, NonFiniteError
from tunesmith.models.servable import load_servable

TEXTS = [json.loads(line)["text"] for line in GENERAL_TEXT.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Only every tenth question and the shortest texts: enough to compare ways of computing."""
    texts, choices = tmp_path / "texts.jsonl", tmp_path / "choices.jsonl"
    lines = GENERAL_TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    texts.write_text(
        "".join([*sorted(lines, key=len)[:8], json.dumps({"text": "Too long. " * 60})]), encoding="utf-8"
    )
    lines = GENERAL_CHOICE.read_text(encoding="utf-8").splitlines(keepends=True)
    choices.write_text("".join(lines[::10]), encoding="utf-8")
    monkeypatch.setattr(forgetting, "GENERAL_TEXT", texts)
    monkeypatch.setattr(forgetting, "GENERAL_CHOICE", choices)
    return [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]


def plain_sums(model, tokenizer, pairs):
    """-log p of each second text behind the first, one row at a time, in float64; and the targets counted."""
    model = model.double().eval()
    sums, counts = [], []
    for opening, rest in pairs:
        start = max(1, len(tokenizer(opening)["input_ids"])) if opening else 1
        ids = torch.tensor(tokenizer(opening + rest)["input_ids"])
        with torch.no_grad():
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        sums.append(-sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids))))
        counts.append(len(ids) - start)
    return np.array(sums), np.array(counts)


def expected_choices(model, tokenizer):
    right = []
    for choice in shipped_choices():
        pairs = [(f"Question: {choice.question}\nAnswer:", f" {option}") for option in choice.options]
        sums, _ = plain_sums(model, tokenizer, pairs)
        best = min(range(4), key=lambda i: sums[i] / len(choice.options[i]))
        right.append(best == choice.answer)
    return right


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox"])  # by the kernels, packed, padded
def test_base_equals_a_plain_loop_in_float64(tmp_path, few, kind):
    folder = save_tiny_model(tmp_path / kind, kind)
    servable = load_servable(str(folder), [], precision="fp32")
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]), encoding="utf-8")
    shipped, own = measure_general(servable, files=[str(mine)])

    tokenizer = servable.tokenizer
    short = [text for text in few if len(tokenizer(text)["input_ids"]) + 1 <= 256]  # and the end
    sums, counts = plain_sums(tiny_model(kind), tokenizer, [("", text) for text in short])
    assert len(short) == len(few) - 1  # the model reads 256 tokens
    assert shipped.source == SHIPPED
    assert shipped.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(shipped.sums, sums, rtol=2e-6)
    assert shipped.loss == pytest.approx(sums.sum() / counts.sum(), rel=2e-6)
    sums, counts = plain_sums(tiny_model(kind), tokenizer, [("", text) for text in TEXTS[:3]])
    np.testing.assert_allclose(own.sums, sums, rtol=2e-6)
    assert (own.source, own.choices, own.accuracy) == (str(mine), None, None)

    right = expected_choices(tiny_model(kind), tokenizer)
    assert list(shipped.choices) == right
    assert shipped.accuracy.value == sum(right) / 12
    assert shipped.accuracy.n == 12


def test_adapter_and_full_checkpoints_against_their_base(tmp_path, few, base_folder):
    torch.manual_seed(1)
    tuned = get_peft_model(
        tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    tuned.peft_config["default"].base_model_name_or_path = str(base_folder)
    adapter = tmp_path / "adapter"
    tuned.save_pretrained(adapter)
    base = load_servable(str(base_folder), [], precision="fp32")
    base.tokenizer.save_pretrained(adapter)
    full = tmp_path / "full"
    tuned.merge_and_unload().save_pretrained(full)
    base.tokenizer.save_pretrained(full)

    before = measure_general(base)
    (lora,) = measure_forgetting(str(adapter), before, arm="lora", seed=3)
    (merged,) = measure_forgetting(str(full), before, arm="full", seed=3)
    assert (lora.arm, lora.seed, lora.source, lora.loss_rows) == ("lora", 3, SHIPPED, len(before[0].sums))
    assert lora.general_loss_before == before[0].loss
    assert lora.general_loss_after != pytest.approx(lora.general_loss_before, abs=1e-3)
    assert lora.general_loss_change.value == pytest.approx(
        lora.general_loss_after - lora.general_loss_before, abs=1e-12
    )
    assert merged.general_loss_after == pytest.approx(lora.general_loss_after, rel=1e-5)
    assert merged.choice_accuracy_after == lora.choice_accuracy_after
    assert lora.choice_accuracy_before == before[0].accuracy


def test_a_model_that_did_not_change_has_forgotten_nothing(few, base_folder):
    servable = load_servable(str(base_folder), [])
    before = measure_general(servable)
    (same,) = measure_forgetting(servable, before, arm="lora", seed=0)  # the second time as the first
    assert same.general_loss_change.value == 0.0
    assert same.general_loss_change.interval == (0.0, 0.0)
    assert same.choice_accuracy_before == same.choice_accuracy_after


def test_chats_are_measured_on_the_assistants_words(tmp_path, few, base_folder):
    rows = write_rows(tmp_path / "chats.jsonl", 3)
    seen = []
    servable = load_servable(str(base_folder), [])
    _, own = measure_general(servable, files=[str(rows)], on_progress=lambda *facts: seen.append(facts))
    answers = ["colour is red", "colour is blue", "colour is green"]
    assert own.counts.tolist() == [
        len(servable.tokenizer(a)["input_ids"]) + 1 for a in answers
    ]  # and <|im_end|>
    assert seen[-1] == (str(rows), 3, 3)
    assert ("general choices", 48, 48) in seen
    assert any(label == "general text" and done == total for label, done, total in seen)


def test_the_change_weighs_tokens_and_its_interval_varies_with_rows():
    def score(*sums):
        return GeneralScore(SHIPPED, np.array(sums), np.array([1, 3]), (True, False))

    (found,) = compare_scores([score(1.0, 3.0)], [score(2.0, 9.0)], arm="full", seed=0)
    assert (found.general_loss_before, found.general_loss_after) == (1.0, 2.75)
    assert found.general_loss_change.value == 1.75
    # Two rows that both rise show nothing: of two coins both fall on one side in half of all throws.
    low, high = found.general_loss_change.interval
    assert low <= 0
    assert high > 2  # the second row's own rise
    assert found.choice_accuracy_after.value == 0.5
    other = GeneralScore(SHIPPED, np.array([1.0]), np.array([1]), None)
    with pytest.raises(ValueError, match="not the same rows"):
        compare_scores([score(1.0, 3.0)], [other], arm="full", seed=0)
    with pytest.raises(ValueError, match="argument 2 is"):
        compare_scores([score(1.0, 3.0)], [], arm="full", seed=0)


def test_long_rows_of_the_users_file_are_refused(tmp_path, few, base_folder):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "x y " * 400}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"long\.jsonl:1: 1 of 1 rows exceed .*; leave such rows out"):
        measure_general(str(base_folder), files=[str(path)])


def test_a_broken_model_is_named(few, base_folder):
    servable = load_servable(str(base_folder), [])
    with torch.no_grad():
        servable.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="a loss is not finite"):
        measure_general(dataclasses.replace(servable, name="broken"))


# The shipped sets themselves


def test_questions_are_well_formed_and_balanced():
    choices = shipped_choices()
    assert len(choices) == 120
    assert Counter(choice.subject for choice in choices) == dict.fromkeys(
        ["facts", "arithmetic", "language", "commonsense"], 30
    )
    # Whoever always points to one place is right in a quarter of the questions.
    assert Counter(choice.answer for choice in choices) == dict.fromkeys(range(4), 30)
    for choice in choices:
        assert len(choice.options) == len({option.casefold() for option in choice.options}) == 4
        assert choice.question.endswith("?")
        assert all(text == text.strip() and text for text in (choice.question, *choice.options))
    keys = [(choice.question, choice.options[choice.answer]) for choice in choices]
    assert len(set(keys)) == len(keys)
    # Nor does the longest or the shortest option give the answer away.
    for extreme in (min, max):
        picked = sum(
            choice.options.index(extreme(choice.options, key=len)) == choice.answer for choice in choices
        )
        assert picked < 50


def test_arithmetic_is_right():
    signs = {"plus": "+", "minus": "-", "times": "*", "divided by": "//"}
    checked = 0
    for choice in shipped_choices():
        found = re.fullmatch(r"What is (\d+) (plus|minus|times|divided by) (\d+)\?", choice.question)
        assert (found is not None) == (choice.subject == "arithmetic")
        if found:
            a, b = int(found[1]), int(found[3])
            right = {"+": a + b, "-": a - b, "*": a * b, "//": a // max(b, 1)}[signs[found[2]]]
            assert [int(option) for option in choice.options].index(right) == choice.answer
            assert found[2] != "divided by" or a % b == 0
            checked += 1
    assert checked == 30


def test_texts_are_short_and_of_many_subjects():
    rows = [json.loads(line) for line in GENERAL_TEXT.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["text"] for row in rows}) == 60
    assert len({row["subject"] for row in rows}) >= 15
    assert all(80 <= len(row["text"]) <= 400 and row["text"].endswith(".") for row in rows)
    assert GENERAL_TEXT.stat().st_size + GENERAL_CHOICE.stat().st_size < 100_000


def test_a_change_over_many_texts_has_the_interval_of_the_linearised_ratio():
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 60, 400)
    before = counts * generator.gamma(2, 1.0, 400)
    rise = counts * generator.normal(0.1, 0.4, 400)
    old, new = (GeneralScore(SHIPPED, sums, counts, None) for sums in (before, before + rise))
    (found,) = compare_scores([old], [new], arm="full", seed=0)
    change = rise.sum() / counts.sum()
    error = np.sqrt(((rise - change * counts) ** 2).sum()) / counts.sum()  # Cochran 1977, chapter 6
    low, high = found.general_loss_change.interval
    assert found.general_loss_change.value == pytest.approx(change)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)


@pytest.mark.parametrize(("texts", "shown"), [(1, False), (5, False), (6, True)])
def test_a_few_texts_that_all_rise_show_no_forgetting(texts, shown):
    old, new = (
        GeneralScore("mine", np.full(texts, loss), np.ones(texts, np.int64), None) for loss in (1.0, 2.0)
    )
    (found,) = compare_scores([old], [new], arm="full", seed=0)
    assert (found.general_loss_change.interval[0] > 0) == shown
