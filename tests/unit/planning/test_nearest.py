"""Where a run does not fit: the settings that are named do fit, and the ones next to them do not."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tiny_models import tiny_model
from tunesmith import memory_plan
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import RunError
from tunesmith.memory_plan import TOKEN_BUDGETS, added_bytes, plan_memory, shapes_beside
from tunesmith.models.kernels.decoder import Decoder
from tunesmith.models.kernels.reading import read_decoder
from tunesmith.models.lora import attach, lora_config
from tunesmith.planning.nearest import NOTHING, Beside, default_adapter_bytes, nearest, with_default_adapter


def rows(count: int, length: int) -> TokenizedRows:
    ids = np.random.default_rng(0).integers(3, 400, count * length).astype(np.int32)
    return TokenizedRows(
        "rows", "0" * 64, ids, np.tile(np.arange(length) > 3, count), np.arange(count + 1) * length, ("rows",),
        np.zeros(count, np.int32), np.arange(count, dtype=np.int32),
    )  # fmt: skip


def needs(decoder: Decoder, data: TokenizedRows, trained: int, beside: Beside = NOTHING) -> int:
    return added_bytes(
        decoder, shapes_beside(data, 8, 0, TOKEN_BUDGETS[-1], beside), trained, beside.answering
    )


def held(length: int, kept: int = 0) -> Beside:
    """Held-out rows that are answers from end to end."""
    return Beside(evaluated=length, predicted=length, kept=kept)


def trained_bytes(model: object) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)  # type: ignore[attr-defined]


def test_the_default_adapter_is_pefts():
    model = attach(m := tiny_model(), lora_config({}, m, "x"), 0, "x")
    assert default_adapter_bytes(read_decoder(tiny_model())) == trained_bytes(model)


def test_the_named_context_length_is_the_longest_that_fits():
    model, data = tiny_model(), rows(16, 1000)
    decoder, trained = read_decoder(model), trained_bytes(model)
    free = needs(decoder, data, trained) * 2 // 3
    text = nearest(needs, decoder, data, trained, free)
    length = int(re.search(r"context_length: (\d+)", text)[1])  # type: ignore[index]
    assert needs(decoder, fit_to_length(data, length, "truncate"), trained) <= free
    assert needs(decoder, fit_to_length(data, length + 32, "truncate"), trained) > free


def test_checkpointing_is_named_exactly_where_it_is_enough():
    model, data = tiny_model(), rows(16, 1000)
    decoder, trained = read_decoder(model), trained_bytes(model)
    enough = needs(replace(decoder, saves_activations=False), data, trained)
    assert enough < needs(decoder, data, trained)
    assert "gradient_checkpointing: true" in nearest(needs, decoder, data, trained, enough)
    assert "gradient_checkpointing" not in nearest(needs, decoder, data, trained, enough - 1)


def test_lora_is_named_where_the_optimizer_is_what_does_not_fit():
    model, data = tiny_model(), rows(16, 40)
    decoder = read_decoder(model)
    trained = 50_000_000  # as if the model were larger
    text = nearest(needs, decoder, data, trained, 20_000_000)
    assert text == "it would fit with lora_config instead of full-parameter"


def test_changes_that_are_enough_only_together_are_named_together():
    model, data = tiny_model(), rows(16, 1000)
    decoder, trained = read_decoder(model), 50_000_000
    lora = default_adapter_bytes(decoder)
    free = needs(read_decoder(model), data, lora) * 2 // 3
    text = nearest(needs, decoder, data, trained, free)
    assert re.fullmatch(
        r"it would fit with lora_config instead of full-parameter and gradient_checkpointing: true", text
    ) or re.fullmatch(
        r"it would fit with lora_config instead of full-parameter, gradient_checkpointing: true and "
        r"context_length: \d+ with .*",
        text,
    )
    assert nearest(needs, decoder, data, trained, 1000).endswith("take a smaller model")


def test_a_refused_run_names_what_would_fit(monkeypatch: pytest.MonkeyPatch):
    model, data = tiny_model(), rows(16, 1000)
    decoder, trained = read_decoder(model), trained_bytes(model)
    least = needs(decoder, data, trained)
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: least * 2 // 3)
    with pytest.raises(
        RunError, match=r"it would fit with .*context_length: \d+ with on_too_long: truncate"
    ) as caught:
        plan_memory(decoder, data, 8, 0, trained)
    assert "\n" not in str(caught.value)
    length = int(re.search(r"context_length: (\d+)", str(caught.value))[1])  # type: ignore[index]
    plan_memory(decoder, fit_to_length(data, length, "truncate"), 8, 0, trained)  # and it does


def test_the_adapter_that_is_counted_is_the_one_that_would_be_trained():
    """Its dropout and low products take memory too: a remedy that leaves them out may not be one."""
    data, model = rows(16, 1000), tiny_model()
    real = attach(m := tiny_model(), lora_config({}, m, "x"), 0, "x")
    trained = trained_bytes(real)
    counted = needs(with_default_adapter(read_decoder(model)), data, trained)
    assert counted == needs(read_decoder(real), data, trained)
    assert counted > needs(read_decoder(model), data, trained)


def test_settings_that_are_set_already_are_not_named():
    data = rows(16, 1000)
    model = attach(m := tiny_model(), lora_config({}, m, "x"), 0, "x")
    light = replace(read_decoder(model), saves_activations=False)
    text = nearest(needs, light, data, trained_bytes(model), 1000)
    assert text == "no setting would make it fit: take a smaller model"
    text = nearest(
        needs, light, data, trained_bytes(model), needs(light, data, trained_bytes(model)) * 2 // 3
    )
    assert text.startswith("it would fit with context_length: ")
    assert "checkpointing" not in text
    assert text.endswith(" (which cuts 100% of the rows)")


def test_a_held_out_row_that_is_longer_than_all_is_what_has_to_be_shorter():
    model, data = tiny_model(), rows(16, 200)
    decoder, trained = read_decoder(model), trained_bytes(model)
    free = needs(decoder, data, trained, held(600))
    beside = held(3000, kept=3000)  # of a test file, which context_length does not cut
    assert needs(decoder, data, trained, beside) > free
    text = nearest(needs, decoder, data, trained, free, beside)
    assert "context_length" not in text
    length = int(re.search(r"held-out rows of at most (\d+) tokens \(the longest has 3,000\)", text)[1])  # type: ignore[index]
    assert needs(decoder, data, trained, held(length)) <= free
    assert needs(decoder, data, trained, held(length + 32)) > free


def test_a_smaller_context_length_cuts_validation_rows_with_the_others():
    model, data = tiny_model(), rows(16, 200)
    decoder, trained = read_decoder(model), trained_bytes(model)
    free = needs(decoder, data, trained, held(600))
    text = nearest(needs, decoder, data, trained, free, held(3000))
    length = int(re.search(r"context_length: (\d+) with on_too_long: truncate", text)[1])  # type: ignore[index]
    assert length == 576  # 600 is no multiple of 32
    assert "of the rows" not in text  # no row that is trained on is cut
    assert needs(decoder, data, trained, held(length)) <= free
    assert needs(decoder, data, trained, held(length + 32)) > free


def test_rows_need_not_be_padded():
    model, data = tiny_model(), rows(16, 200)
    decoder, trained = read_decoder(model), trained_bytes(model)
    text = nearest(needs, decoder, data, trained, needs(decoder, data, trained), Beside(padded=4000))
    assert "padding: longest" in text
    # A context length that the rows reach pads them no further, and is named too.
    assert re.search(r"context_length: \d+ with on_too_long: truncate", text)


def test_answers_that_do_not_fit_are_named_as_what_they_are():
    model, data = tiny_model(), rows(16, 200)
    decoder, trained = read_decoder(model), trained_bytes(model)
    free = needs(decoder, data, trained)
    text = nearest(needs, decoder, data, trained, free, Beside(answering=3_000_000_000))
    assert text == "it would fit with evaluation left out (its answers take 3.0 GB)"


def test_no_more_is_named_together_than_is_needed():
    model, data = tiny_model(), rows(16, 200)
    decoder, trained = read_decoder(model), trained_bytes(model)
    beside = Beside(padded=4000, answering=3_000_000_000)
    text = nearest(needs, decoder, data, trained, needs(decoder, data, trained), beside)
    assert text == (
        "it would fit with padding: longest and evaluation left out (its answers take 3.0 GB)"
    )  # and neither LoRA nor checkpointing


def test_what_is_named_together_is_enough_together():
    model, data = tiny_model(), rows(16, 1000)
    decoder, trained = read_decoder(model), trained_bytes(model)
    beside = held(4000, kept=4000)
    short = needs(replace(decoder, saves_activations=False), rows(16, 300), trained)
    text = nearest(needs, decoder, data, trained, short, beside)
    found = re.search(r"context_length: (\d+) .*held-out rows of at most ([\d,]+) tokens", text)
    assert found is not None, text
    length, heldout = int(found[1]), int(found[2].replace(",", ""))
    lora = with_default_adapter(decoder) if "lora_config" in text else decoder
    light = replace(lora, saves_activations="gradient_checkpointing: true" not in text)
    size = default_adapter_bytes(decoder) if "lora_config" in text else trained
    loaded = size if "lora_config" in text else 0
    assert needs(light, fit_to_length(data, length, "truncate"), size, held(heldout)) + loaded <= short


def test_a_refused_run_does_not_rely_on_cutting_rows_that_stay(monkeypatch: pytest.MonkeyPatch):
    model, data = tiny_model(), rows(16, 200)
    decoder, trained = read_decoder(model), trained_bytes(model)
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: needs(decoder, data, trained))
    for kept, named in ((3000, "held-out rows"), (0, "context_length")):
        with pytest.raises(RunError) as caught:
            plan_memory(decoder, data, 8, 0, trained, beside=held(3000, kept=kept))
        assert named in str(caught.value)
        assert ("context_length" in str(caught.value)) == (kept == 0)
