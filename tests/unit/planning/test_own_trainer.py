"""Memory of this program's own trainer, as a plan counts it."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tiny_models import tiny_model
from tunesmith.models.kernels.reading import UnreadableError
from tunesmith.planning.own_trainer import own_trainer
from tunesmith.planning.workload import Asked, Workload, made_rows


def test_a_model_the_kernels_do_not_know_is_planned_by_formula_where_answers_are_asked_for_too():
    """GPT-2's config.json has no intermediate_size; nobody needs it."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    work = Workload(
        source="", rows=8, tokens=800, targets=400, longest=100, most_targets=25, attended=100.0, computed=1.0,
        rows_per_step=8, num_epochs=1, min_update_steps=1, context_length=100, examples=made_rows(8, 100),
        asked=(Asked((10, 20), 8),),
    )  # fmt: skip
    with pytest.raises(UnreadableError):
        own_trainer(model, work, False)


def test_answers_take_what_the_larger_of_two_times_takes():
    """A run answers test rows and validation rows at two times, not together."""
    base = Workload(
        source="", rows=8, tokens=800, targets=400, longest=100, most_targets=25, attended=100.0, computed=1.0,
        rows_per_step=8, num_epochs=1, min_update_steps=1, context_length=100, examples=made_rows(8, 100),
    )  # fmt: skip
    one, other = Asked((10, 20), 8), Asked((50,), 8)

    def answering(*asked: Asked) -> int:
        return own_trainer(tiny_model(), replace(base, asked=asked), False).answering_bytes

    assert answering(one, other) == max(answering(one), answering(other)) > 0
